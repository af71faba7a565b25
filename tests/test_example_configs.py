"""The shipped configs, through axolotl's own validation with the plugin, and through `axolotl asft check`."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from families import FAMILIES, save_what_reads
from tiny import OWN_ANSWERS, random_metric, train

from axolotl_asft import extract_direction
from axolotl_asft.args import parse_block
from axolotl_asft.cli import asft

CONFIGS = sorted((Path(__file__).parent.parent / "example_configs").glob("*.yml"))
NAMES = [path.stem for path in CONFIGS]
# which tiny model of tests/families.py has the architecture of the config's
STAND_INS = {
    "llama-3": "Llama",
    "smollm2": "Llama",
    "qwen-2.5": "Qwen2",
    "qwen-3.5": "Qwen3.5 (vision, text tower)",
    "qwen-3": "Qwen3",
    "mistral": "Mistral",
    "gemma-2": "Gemma 2",
    "gemma-3-1b": "Gemma 3 (text)",
    "gemma-3-4b": "Gemma 3 (vision, text tower)",
    "phi-3": "Phi-3 (fused qkv)",
}

CPU = {
    "bf16": False, "fp16": False, "tf32": False, "optimizer": "adamw_torch", "dataset_num_proc": 1,
    "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_plugins_left():
    """axolotl's plugin manager outlives a test."""
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The folder of a tiny aligned model of a family, and of its direction with the Fisher metric; made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family in made:
            return made[family]
        folder = tmp_path_factory.mktemp("stand-in")
        config_class, arguments, model_class, _, _ = FAMILIES[family]
        config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1e-3 * torch.randn_like(weight)
        model.save_pretrained(folder / "aligned")
        save_what_reads(folder / "aligned", family)
        metric = random_metric(extract_direction(*_pair(folder), rank=4))
        file = folder / "direction.safetensors"
        extract_direction(*_pair(folder), rank=4, metrics=[metric], own_answers=OWN_ANSWERS).save(file)
        made[family] = folder / "aligned", file
        return made[family]

    return make


def _pair(folder: Path) -> tuple[Path, Path]:
    return folder / "base", folder / "aligned"


def test_every_family_and_size_of_card():
    assert len(CONFIGS) >= 14
    for card in ("8gb", "12gb", "16gb", "24gb", "fsdp2", "dpo", "cpu"):
        assert any(card in name for name in NAMES), card
    for family in STAND_INS:
        assert any(name.startswith(family) for name in NAMES), family


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_valid_with_the_plugin(path):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    text = path.read_text()
    cfg = DictDefault(yaml.safe_load(text))
    prepare_plugins(cfg)
    validated = validate_config(
        cfg,
        capabilities={
            "bf16": True,
            "fp8": False,
            "n_gpu": 2 if "fsdp" in path.stem else 1,
            "compute_capability": "sm_89",
        },
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert parse_block(validated.asft.to_dict()).direction == yaml.safe_load(text)["asft"]["direction"]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_every_layer_of_a_stand_in_is_constrained(path, stand_in, tmp_path):
    """`axolotl asft check` on the config, with a tiny model of the same architecture in its place."""
    family = next(family for start, family in STAND_INS.items() if path.stem.startswith(start))
    model, direction = stand_in(family)
    config = yaml.safe_load(path.read_text())
    config["base_model"] = str(model)
    config["asft"]["direction"] = str(direction)
    (tmp_path / path.name).write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(asft, ["check", str(tmp_path / path.name), "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["errors"], found["unconstrained"]) == (0, [], {})
    assert len(found["constrained"]) == found["model"]["lora_layers"] == FAMILIES[family][-1]
    assert found["model"]["architecture"] == FAMILIES[family][2]
    expected = []
    if not importlib.util.find_spec("torchvision"):  # of which a model's processor wants to have videos prepared
        expected.append("requires the Torchvision library")
    if config.get("chat_template", "tokenizer_default") != "tokenizer_default":
        # the stand-in was asked under a template of its own
        expected += ["the run's chat template opens", "the anchor asks in the first turn of a chat alone"]
    if "metric" not in config["asft"]:
        expected += ["holds the metric fisher, which is not used", "a penalty on the weights alone"]
    assert [line for line in found["warnings"] if not any(text in line for text in expected)] == []


def test_a_block_with_a_direction_alone_asks_for_the_same(stand_in, tmp_path):
    """The recipes write out what a run does by itself with a file that `extract --metric fisher` made."""
    model, direction = stand_in("Llama")
    config = yaml.safe_load(next(path for path in CONFIGS if path.stem == "llama-3.1-8b-qlora-12gb").read_text())
    config["base_model"] = str(model)
    found = {}
    for name, block in {"written": config["asft"], "alone": {}}.items():
        config["asft"] = {**block, "direction": str(direction)}
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(config))
        printed = CliRunner().invoke(asft, ["check", str(tmp_path / f"{name}.yml"), "--json"]).stdout
        found[name] = json.loads(printed)
    metric, *written = found["written"]["settings"]
    by_itself, *alone = found["alone"]["settings"]
    assert by_itself == metric.replace("fisher:", "fisher, since the direction file holds it:")
    assert [line.replace(", since the direction file holds the answers", "") for line in alone] == written
    assert any(line.startswith("lambda_reg 0.1:") for line in alone)
    assert any(line.startswith("anchor_weight 3, since") for line in alone)
    assert (found["alone"]["errors"], found["alone"]["warnings"]) == ([], [])


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_says_what_a_reader_needs(path):
    text = path.read_text()
    config = yaml.safe_load(text)
    comment = text.partition("\nbase_model:")[0]
    aligned = config["base_model"].removeprefix("./")
    assert f"-o {config['asft']['direction'].removeprefix('./')}" in comment
    assert "axolotl asft extract --base " in comment
    assert f"--aligned {aligned} " in comment.replace("\\\n", "\n")
    assert f"axolotl asft check {path.name}" in comment
    assert f"axolotl train {path.name}" in comment
    asked = config["asft"].get("metric") or config["asft"].get("anchor_weight")
    assert ("--metric fisher" in comment) == bool(asked), "the file that it has made holds what the run asks of it"
    assert "of memory" in comment or "Memory: about" in comment
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_turns_end_as_the_family_ends_them(path):
    """Where the tokenizer's eos ends no turn, axolotl has to be told what does, or the end is not trained."""
    config = yaml.safe_load(path.read_text())
    ends = {"gemma": ["<end_of_turn>"], "phi": ["<|end|>"]}
    assert config.get("eot_tokens") == ends.get(path.stem.partition("-")[0])
    assert "chat_template" in config or config["datasets"][0]["type"] == "chat_template"


@pytest.mark.slow
def test_preferences_as_the_recipe_says_train(pair, direction_file, tmp_path):
    """The DPO recipe on a tiny model: its data format is the one that it describes."""
    path = next(path for path in CONFIGS if "dpo" in path.stem)
    config = yaml.safe_load(path.read_text()) | CPU
    config |= {"base_model": str(pair[1]), "asft": {"direction": str(direction_file)}, "max_steps": 1}
    turns = {role: {"role": role, "content": "the cat sees"} for role in ("user", "assistant")}
    rejected = {"role": "assistant", "content": "a red dog"}
    row = {"messages": [turns["user"]], "chosen": turns["assistant"], "rejected": rejected}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = train(tmp_path / "config.yml")
    assert "14 layers constrained" in result.stdout + result.stderr
