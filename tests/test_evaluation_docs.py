"""docs/evaluation.md says what the code does."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from tiny import axolotl

from axolotl_asft.evaluation.judge_ways import WAYS
from axolotl_asft.evaluation.prompts import COLUMNS, FILES, load_prompts

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["harmful", "borderline"])
def test_the_sets_are_as_described(name):
    (row,) = (line.split("|") for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
    held_out = load_prompts(name, "heldout")
    assert (int(row[2]), int(row[3])) == (len(load_prompts(name, "train")), len(held_out))
    assert row[4].strip().split(", ") == list(dict.fromkeys(prompt.category for prompt in held_out))


def test_every_family_of_judges_is_described():
    described = "".join(line.lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("| "))
    assert not [way.family for way in WAYS if not re.search(way.family, described)]


def test_every_kind_of_file_and_every_column_is_described():
    assert re.findall(r"^- `(\.\w+)`: ", TEXT, re.M) == list(FILES)
    (columns,) = re.findall(r"The column is the first of (.*?);", TEXT, re.S)
    assert re.findall(r"`(\w+)`", columns) == list(COLUMNS)


@pytest.mark.slow
def test_axolotl_s_lm_eval_tasks(pair, tmp_path):
    """The keys of the docs, with a tiny model and an adapter on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), config).save_pretrained(tmp_path / "out")
    keys = yaml.safe_load(textwrap.dedent(TEXT[TEXT.index("    plugins:\n") :].split("\n\n")[0]))
    assert keys["lm_eval_model"] == "path/to/chat-model,peft=out,add_bos_token=False"
    model = f"{pair[1]},peft={tmp_path / 'out'},add_bos_token=False"
    keys |= {"lm_eval_model": model, "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"base_model": str(pair[1]), "adapter": "lora", **keys}))
    axolotl("lm-eval", str(tmp_path / "config.yml"), cwd=tmp_path)
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert {"asft_harmfulness", "asft_over_refusal"} <= set(results["results"])
    assert results["n-samples"]["asft_harmfulness"]["effective"] == len(load_prompts("harmful"))
    assert "peft" in json.dumps(results["config"]["model_args"])
    assert results["chat_template"]
