"""A chat model that reads images too: the whole way from the command line, each layer under the name that axolotl
trains it by."""

import json

import pytest
import yaml
from click.testing import CliRunner
from families import TEXT_TOWER, make_family, save_what_reads
from tiny import axolotl, make_dataset, write_config

from axolotl_asft import AlignmentDirection
from axolotl_asft.cli import asft

pytestmark = pytest.mark.slow
FAMILY = "Gemma 3 (vision, text tower)"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "max_position_embeddings": 256}  # as 4 bit wants
ASK = ["--max-new-tokens", "4", "--harmful", "asked.txt", "--borderline", "asked.txt", "--tasks", "task.yaml"]
TASK = """task: says
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
doc_to_text: '{{q}}'
doc_to_target: 0
output_type: multiple_choice
doc_to_choice: ['yes', 'no']
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair of models, a direction that was made by asking the aligned one, and a config."""
    folder = tmp_path_factory.mktemp("wrapper")
    make_family(folder, FAMILY, **SIZES)
    for name in ("base", "aligned"):
        save_what_reads(folder / name, FAMILY)
    (folder / "asked.txt").write_text("the cat sees a dog\na red house\nblue dog\nyes the tree\n")
    (folder / "task.yaml").write_text(TASK)
    (folder / "data.jsonl").write_text('{"q": "the cat"}\n{"q": "the dog"}\n')
    command = "asft extract --base base --aligned aligned --metric activations --prompts asked.txt -o d.safetensors"
    axolotl(*command.split(), cwd=folder)
    block = {"direction": str(folder / "d.safetensors"), "metric": "activations", "lambda_reg": 1}
    targets = {"lora_target_linear": None, "lora_target_modules": TEXT_TOWER}
    data = make_dataset(folder / "chats.jsonl")
    write_config(folder, folder / "aligned", data, block, save_strategy="epoch", output_dir="out", **targets)
    return folder


def test_the_metric_is_of_the_text_tower(folder):
    modules = AlignmentDirection.load(folder / "d.safetensors").modules
    asked = {name for name, module in modules.items() if "activations" in module.metrics}
    assert asked == {name for name in modules if ".language_model." in name}
    assert len(asked) == 14


def test_a_tower_that_trains_unseen_is_named(folder, tmp_path):
    path = tmp_path / "config.yml"
    config = yaml.safe_load((folder / "config.yml").read_text()) | {"lora_target_linear": True}
    del config["lora_target_modules"]
    path.write_text(yaml.safe_dump(config))
    found = json.loads(CliRunner().invoke(asft, ["check", str(path), "--json"]).stdout)
    assert any("freeze_mm_modules: true" in line for line in found["errors"])
    path.write_text(yaml.safe_dump(config | {"freeze_mm_modules": True}))
    found = json.loads(CliRunner().invoke(asft, ["check", str(path), "--json"]).stdout)
    assert found["errors"] == []
    assert len(found["constrained"]) == 14


def test_trained_and_asked(folder):
    trained = axolotl("train", "config.yml", "--launcher", "python", cwd=folder)
    assert "14 layers constrained" in trained.stdout + trained.stderr
    axolotl("asft", "eval", "config.yml", *ASK, cwd=folder)
    rows = json.loads((folder / "out" / "asft-eval" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["model", "out"]
    assert all("says" in row["tasks"] for row in rows)
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
