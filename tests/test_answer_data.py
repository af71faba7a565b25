"""`axolotl asft answers`: what the anchor asks for, as training data, read by axolotl itself."""

import json

import pytest
import yaml
from click.testing import CliRunner
from datasets import load_from_disk
from tiny import OWN_ANSWERS, make_tokenizer, write_config

from axolotl_asft.anchor import _encoded
from axolotl_asft.answer_data import TYPE
from axolotl_asft.cli import asft


def run(*arguments):
    return CliRunner().invoke(asft, ["answers", *map(str, arguments)])


def written(path):
    return [tuple(part["text"] for part in json.loads(line)["segments"]) for line in path.read_text().splitlines()]


def test_each_answer_once(anchored_file, tmp_path):
    result = run(anchored_file, "-o", tmp_path / "own.jsonl")
    assert result.exit_code == 0
    assert written(tmp_path / "own.jsonl") == [tuple(turn) for turn in OWN_ANSWERS]
    assert f"own.jsonl: {len(OWN_ANSWERS)} lines of {len(OWN_ANSWERS)} answers, " in result.stdout
    assert f"      type: {TYPE}" in result.stdout


@pytest.mark.parametrize("name", ["own.jsonl", "own: a #b.jsonl", "- own.jsonl"])
def test_what_is_printed_is_yaml(anchored_file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    printed = run(anchored_file, "-o", name).stdout.partition("Use it, beside your own data:\n")[2]
    assert yaml.safe_load(printed) == {"datasets": [{"path": name, "type": TYPE}]}
    assert ("- path: own.jsonl\n" in printed) == (name == "own.jsonl")


@pytest.mark.parametrize("lines", [1, 50])
def test_as_many_lines_as_asked_for(anchored_file, tmp_path, lines):
    result = run(anchored_file, "-o", tmp_path / "own.jsonl", "--lines", lines, "--json")
    assert json.loads(result.stdout)["lines"] == lines
    assert written(tmp_path / "own.jsonl") == [tuple(OWN_ANSWERS[i % len(OWN_ANSWERS)]) for i in range(lines)]


def test_refused(anchored_file, direction_file, tmp_path):
    output = tmp_path / "own.jsonl"
    result = run(direction_file, "-o", output)
    assert result.exit_code == 2
    assert "the direction file holds no answers of the aligned model; make it again" in result.stderr
    assert not output.exists()
    assert run(anchored_file, "-o", output, "--lines", 0).exit_code == 2
    output.write_text("mine")
    assert "exists; give another --output, or --force" in run(anchored_file, "-o", output).stderr
    assert output.read_text() == "mine"
    assert run(anchored_file, "-o", output, "--force").exit_code == 0


def test_a_full_fine_tuning_reads_what_the_anchor_reads(forked_train, anchored_file, pair, dataset, tmp_path):
    """Where the plugin has no place: the same tokens, and a loss on the answer alone."""
    run(anchored_file, "-o", tmp_path / "own.jsonl", "--lines", 30)
    sets = [
        {"path": str(dataset), "type": "chat_template", "field_messages": "messages"},
        {"path": str(tmp_path / "own.jsonl"), "type": TYPE},
    ]
    whole = {"adapter": None, "load_in_4bit": None, "lora_r": None, "lora_alpha": None, "lora_target_linear": None}
    config = write_config(tmp_path / "run", pair[1], dataset, datasets=sets, max_steps=2, **whole)
    status, output = forked_train(config)
    assert status == 0, output
    (prepared,) = (path for path in (tmp_path / "run" / "prepared").iterdir() if path.is_dir())
    found = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in load_from_disk(str(prepared))}
    for request, answer in OWN_ANSWERS:
        ids, start = _encoded(make_tokenizer(), request, answer)
        assert (tuple(ids), (*[-100] * start, *ids[start:])) in found
