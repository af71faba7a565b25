"""Real QLoRA runs of axolotl under the constraint, on a tiny Llama in 4 bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import axolotl, child_environment, interruptible, log_history, train, write_config

STEPS = 6
LAMBDA = 30.0
CHECKPOINTS = {"save_strategy": "steps", "save_steps": STEPS}


@pytest.fixture(scope="module")
def trained(forked_train, pair, dataset, direction_file, tmp_path_factory):
    """Train once for every set of keys of the asft block; returns the config."""
    configs: dict[str, Path] = {}

    def run(block: dict | None, **changes) -> Path:
        key = json.dumps([block, changes], sort_keys=True)
        if key not in configs:
            full = None if block is None else {"direction": str(direction_file), "projector": "subspace", **block}
            config = write_config(tmp_path_factory.mktemp("train"), pair[1], dataset, full, **CHECKPOINTS, **changes)
            status, output = forked_train(config)
            assert status == 0, output
            configs[key] = config
        return configs[key]

    return run


def adapter_weights(config: Path) -> dict[str, torch.Tensor]:
    return load_file(str(config.parent / "out" / "adapter_model.safetensors"))


def training_lines(config: Path) -> list[dict]:
    return [line for line in log_history(config) if "loss" in line]


def orthogonal_norm(line: dict) -> float:
    return line["asft/drift"] * line["asft/update_norm"]


def test_lambda_zero_gives_the_same_weights_as_no_plugin(trained):
    without, zero = adapter_weights(trained(None)), adapter_weights(trained({"lambda_reg": 0}))
    assert without.keys() == zero.keys()
    for name, weight in without.items():
        assert torch.equal(weight, zero[name]), name
    assert any(weight.abs().max() > 0 for name, weight in zero.items() if "lora_B" in name)


def test_the_orthogonal_part_is_far_smaller_step_by_step(trained):
    plain = training_lines(trained({"lambda_reg": 0}))
    constrained = training_lines(trained({"lambda_reg": LAMBDA}))
    assert [line["step"] for line in constrained] == list(range(1, STEPS + 1))
    # The first step is the optimizer's alone: at B = 0 the penalty has no gradient.
    for before, after in zip(plain[1:], constrained[1:], strict=True):
        assert orthogonal_norm(after) < 0.7 * orthogonal_norm(before)
    assert orthogonal_norm(constrained[-1]) < 0.25 * orthogonal_norm(plain[-1])


def test_logged_numbers(trained):
    zero, constrained = training_lines(trained({"lambda_reg": 0})), training_lines(trained({"lambda_reg": LAMBDA}))
    assert zero[0]["loss"] == constrained[0]["loss"], "the logged loss is the task's"
    for line in constrained:
        assert line["asft/penalty"] == pytest.approx(LAMBDA * orthogonal_norm(line) ** 2, rel=1e-4)
        assert 0 <= line["asft/drift"] <= 1
    assert all(line["asft/penalty"] == 0 and line["asft/update_norm"] > 0 for line in zero)
    stamp = json.loads((trained({"lambda_reg": LAMBDA}).parent / "out" / "adapter_config.json").read_text())["asft"]
    assert stamp["penalty_peak"] >= max(line["asft/penalty"] for line in constrained[:-1]) * (1 - 1e-5)


def test_accumulation_counts_the_penalty_once(trained):
    """One optimizer step of 8 rows, in 2 x 4 or 1 x 8: the same run."""
    two = training_lines(trained({"lambda_reg": LAMBDA}))
    one = training_lines(trained({"lambda_reg": LAMBDA}, micro_batch_size=8, gradient_accumulation_steps=1))
    for a, b in zip(one, two, strict=True):
        assert a["asft/update_norm"] == pytest.approx(b["asft/update_norm"], rel=0.02)
        assert a["asft/penalty"] == pytest.approx(b["asft/penalty"], rel=0.05)


def test_saved_adapters_are_stamped(trained):
    from axolotl_asft import AlignmentDirection
    from axolotl_asft.diagnostics import adapter_drift

    config = trained({"lambda_reg": LAMBDA})
    block = yaml.safe_load(config.read_text())["asft"]
    direction = AlignmentDirection.load(block["direction"])
    for folder in (config.parent / "out", config.parent / "out" / f"checkpoint-{STEPS}"):
        stamp = json.loads((folder / "adapter_config.json").read_text())["asft"]
        assert stamp["direction_sha256"] == direction.sha256
        assert (stamp["lambda_reg"], stamp["projector"], stamp["layers"]) == (LAMBDA, "subspace", 14)
        report = adapter_drift(folder, direction, "subspace")
        assert stamp["drift"] == pytest.approx(report.drift, rel=1e-4)
        assert stamp["update_norm"] == pytest.approx(report.update_norm, rel=1e-4)
    card = (config.parent / "out" / "README.md").read_text()
    assert card.count("## Safety constraint") == 1
    assert direction.sha256 in card
    assert "lambda_reg`: 30" in card
    assert "- asft" in card.split("---")[1], "the tag"


def test_peft_loads_a_stamped_adapter(trained, pair):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = trained({"lambda_reg": LAMBDA})
    with pytest.warns(UserWarning, match="asft"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), config.parent / "out")
    assert model.peft_config["default"].r == 8


def test_an_unconstrained_adapter_is_not_stamped(trained):
    assert "asft" not in json.loads((trained(None).parent / "out" / "adapter_config.json").read_text())


@pytest.mark.parametrize("projector", ["paper", "normalized"])
def test_other_projectors_train(trained, projector):
    lines = training_lines(trained({"projector": projector, "lambda_reg": LAMBDA}))
    assert orthogonal_norm(lines[-1]) < 0.25 * orthogonal_norm(training_lines(trained({"lambda_reg": 0}))[-1])


def test_a_budget_is_kept(trained):
    free = training_lines(trained({"lambda_reg": 0}))
    budget = 0.5 * free[-1]["asft/max_drift"]
    config = trained({"max_drift": budget})
    lines = training_lines(config)
    assert all(0 < line["asft/max_drift"] <= 1.01 * budget for line in lines)
    assert all(line["asft/penalty"] == 0 for line in lines), "a budget alone is no penalty"
    assert lines[-1]["loss"] < lines[0]["loss"]
    stamp = json.loads((config.parent / "out" / "adapter_config.json").read_text())["asft"]
    assert (stamp["max_drift"], stamp["metric"], stamp["lambda_reg"]) == (budget, "weights", 0)


def test_an_anchor_holds_the_answers(trained, anchored_file):
    """QLoRA on 4-bit weights: what is remembered is what the quantised model says."""
    block = {"direction": str(anchored_file), "lambda_reg": 0}
    free, held = (trained({**block, "anchor_weight": weight}) for weight in (1e-6, 10.0))
    assert training_lines(held)[-1]["asft/anchor_kl"] > 0
    assert training_lines(held)[-1]["loss"] < training_lines(held)[0]["loss"]
    stamps = [json.loads((c.parent / "out" / "adapter_config.json").read_text())["asft"] for c in (free, held)]
    assert [stamp["anchor_weight"] for stamp in stamps] == [1e-6, 10.0]
    # of all the answers, of the weights that were saved; a line of the log is of its step's alone
    assert 0 < stamps[1]["anchor_kl"] < 0.5 * stamps[0]["anchor_kl"]
    card = (held.parent / "out" / "README.md").read_text()
    assert "`anchor_weight`: 10" in card
    assert "divergence from the aligned model's own answers" in card


@pytest.mark.parametrize("metric", ["activations", "fisher"])
def test_other_metrics_train(trained, pair, tmp_path, metric):
    from tiny import make_tokenizer
    from transformers import AutoModelForCausalLM

    from axolotl_asft import extract_direction
    from axolotl_asft.metrics import activation_metric, fisher_metric

    model = AutoModelForCausalLM.from_pretrained(pair[1])
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    turns = [("<|user|> the cat sees a dog </s><|assistant|> ", "yes no")]
    path = tmp_path / "with-metric.safetensors"
    take = {"activations": activation_metric, "fisher": fisher_metric}[metric]
    extract_direction(*pair, rank=8, metrics=[take(model, make_tokenizer(), turns, names)]).save(path)
    block = {"direction": str(path), "metric": metric, "rank": 0}
    free, held = (training_lines(trained({**block, "lambda_reg": value})) for value in (1e-6, 3))
    assert held[-1]["asft/penalty"] / 3 < 0.1 * free[-1]["asft/penalty"] / 1e-6
    assert held[-1]["asft/update_norm"] > 0.1 * free[-1]["asft/update_norm"], "elsewhere the weights move"


@pytest.mark.parametrize("precision", [{"bf16": True}, {"bfloat16": True}], ids=["autocast", "pure"])
def test_lora_in_bf16(forked_train, pair, dataset, direction_file, tmp_path, precision):
    block = {"direction": str(direction_file), "lambda_reg": LAMBDA, "projector": "subspace"}
    changes = {"adapter": "lora", "load_in_4bit": None, "plugins": ["asft", "cpu_plugin.CpuPlugin"], **precision}
    config = write_config(tmp_path, pair[1], dataset, block, **changes, **CHECKPOINTS)
    status, output = forked_train(config)
    assert status == 0, output
    lines = training_lines(config)
    assert orthogonal_norm(lines[-1]) < 0.5 * orthogonal_norm(lines[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asft", "axolotl_asft.AsftPlugin"])
def test_both_names_through_accelerate(trained, pair, dataset, direction_file, tmp_path, name):
    """The default launcher starts a child by `accelerate launch -m axolotl.cli.train`."""
    block = {"direction": str(direction_file), "lambda_reg": LAMBDA, "projector": "subspace"}
    config = write_config(tmp_path, pair[1], dataset, block, plugins=[name], **CHECKPOINTS)
    result = train(config, launcher="accelerate")
    assert "14 layers constrained" in result.stdout + result.stderr
    plain = training_lines(trained({"lambda_reg": 0}))
    assert orthogonal_norm(training_lines(config)[-1]) < 0.25 * orthogonal_norm(plain[-1])


@pytest.mark.slow
def test_merge_lora(trained, pair, direction_file):
    """`axolotl merge-lora` merges the stamped adapter with the plugin listed: W + scaling B A."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    config = trained({"lambda_reg": LAMBDA})
    axolotl("merge-lora", str(config), cwd=config.parent)
    merged = load_file(str(config.parent / "out" / "merged" / "model.safetensors"))
    adapter = adapter_weights(config)
    module = "model.layers.1.mlp.up_proj"
    A, B = (adapter[f"base_model.model.{module}.lora_{factor}.weight"].float() for factor in "AB")
    aligned = load_file(str(pair[1] / "model.safetensors"))[f"{module}.weight"].float()
    # axolotl merges a QLoRA adapter into the weight that it was trained on: rounded to 4 bit and back
    quantized, state = quantize_4bit(aligned, blocksize=64, quant_type="nf4", compress_statistics=True)
    change = merged[f"{module}.weight"].float() - dequantize_4bit(quantized, state)
    torch.testing.assert_close(change, 2.0 * B @ A, rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_what_is_saved_at_ctrl_c_says_how_it_was_trained(pair, dataset, direction_file, tmp_path):
    block = {"direction": str(direction_file), "lambda_reg": 2, "projector": "subspace"}
    config = write_config(tmp_path, pair[1], dataset, block, max_steps=5000)
    out, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "axolotl.cli.train", str(config)], cwd=tmp_path, env=child_environment(),
            stdout=file, stderr=subprocess.STDOUT, preexec_fn=interruptible,
        )  # fmt: skip
        history = out / "asft_history.jsonl"
        while process.poll() is None and (not history.is_file() or len(history.read_text().splitlines()) < 4):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()  # axolotl's own handler ends so
    stamp = json.loads((out / "adapter_config.json").read_text())["asft"]
    step, steps = stamp["interrupted_at"]
    assert 3 <= step < steps
    assert stamp["lambda_reg"] == 2
    assert stamp["projector"] == "subspace"
    assert "drift" not in stamp
    assert f"interrupted after {step} of {steps} steps" in (out / "README.md").read_text()
    assert any(weight.abs().max() > 0 for name, weight in adapter_weights(config).items() if "lora_B" in name)
