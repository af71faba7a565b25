"""`axolotl asft answers`: what the anchor asks for, as training data, read by axolotl itself."""

import json

import pytest
import yaml
from click.testing import CliRunner
from datasets import load_from_disk
from test_prompt_formats import with_first_token
from tiny import OWN_ANSWERS, make_tokenizer, write_config

from axolotl_asft.anchor import AnswerAnchor, _encoded
from axolotl_asft.answer_data import TYPE
from axolotl_asft.cli import asft
from axolotl_asft.general_formats import ASKED, general_formats

FIRST = "--no-general-formats"


def run(*arguments):
    return CliRunner().invoke(asft, ["answers", *map(str, arguments)])


def written(path):
    return [tuple(part["text"] for part in json.loads(line)["segments"]) for line in path.read_text().splitlines()]


def test_each_answer_once(anchored_file, tmp_path):
    result = run(anchored_file, "-o", tmp_path / "own.jsonl", FIRST)
    assert result.exit_code == 0
    assert written(tmp_path / "own.jsonl") == [tuple(turn) for turn in OWN_ANSWERS]
    assert f"own.jsonl: {len(OWN_ANSWERS)} lines of {len(OWN_ANSWERS)} answers, " in result.stdout
    assert f"      type: {TYPE}" in result.stdout


@pytest.mark.parametrize("name", ["own.jsonl", "own: a #b.jsonl", "- own.jsonl"])
def test_what_is_printed_is_yaml(anchored_file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    printed = run(anchored_file, "-o", name, FIRST).stdout.partition("Use it, beside your own data:\n")[2]
    assert yaml.safe_load(printed) == {"datasets": [{"path": name, "type": TYPE}]}
    assert ("- path: own.jsonl\n" in printed) == (name == "own.jsonl")


@pytest.mark.parametrize("lines", [1, 50])
def test_as_many_lines_as_asked_for(anchored_file, tmp_path, lines):
    result = run(anchored_file, "-o", tmp_path / "own.jsonl", "--lines", lines, FIRST, "--json")
    assert json.loads(result.stdout)["lines"] == lines
    assert written(tmp_path / "own.jsonl") == [tuple(OWN_ANSWERS[i % len(OWN_ANSWERS)]) for i in range(lines)]


def test_in_what_the_anchor_asks_in(anchored_file, pair, tmp_path):
    result = run(anchored_file, "-o", tmp_path / "own.jsonl", "--model", pair[1], "--json")
    assert result.exit_code == 0, result.stderr
    found, general = written(tmp_path / "own.jsonl"), general_formats(make_tokenizer())
    assert json.loads(result.stdout)["lines"] == len(found) == 2 * len(OWN_ANSWERS)
    assert len(general) == len(ASKED)
    assert found[:2] == [tuple(turn) for turn in OWN_ANSWERS[:2]]
    for (request, answer), (asked, same) in zip(OWN_ANSWERS[:2], found[2:4], strict=True):
        head, _, tail = general[0].partition("{prompt}")
        words = asked.removeprefix(head).removesuffix(tail)
        assert asked == head + words + tail
        assert words in request
        assert same == answer
    anchor = AnswerAnchor(make_tokenizer(), [tuple(turn) for turn in OWN_ANSWERS], general=general)
    assert [_encoded(make_tokenizer(), *turn) for turn in found] == anchor._texts


ALPACA = {"datasets": [{"path": "mine.jsonl", "type": "alpaca"}, {"path": "chats.jsonl", "type": "chat_template"}]}


@pytest.mark.parametrize("in_first_turns", [True, False])
@pytest.mark.parametrize("first_token", [True, False])
def test_in_the_format_of_a_config_s_data(anchored_file, pair, tmp_path, in_first_turns, first_token):
    """As axolotl tokenises data in it, and the anchor asks: with the token that the tokenizer puts before a text."""
    tokenizer = with_first_token() if first_token else make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump({"base_model": str(tmp_path / "model"), **ALPACA}))
    output = tmp_path / "own.jsonl"
    result = run(anchored_file, config, "-o", output, "--json", *([FIRST] if in_first_turns else []))
    assert result.exit_code == 0, result.stderr
    (text,) = json.loads(result.stdout)["prompt_formats"]
    assert "### Instruction:\n{prompt}\n\n### Response:\n" in text
    turns = [tuple(turn) for turn in OWN_ANSWERS]
    general = [] if in_first_turns else general_formats(tokenizer)
    texts = AnswerAnchor(tokenizer, turns, [text], general)._texts
    found = written(output)
    assert len(found) == len(texts) == (2 if in_first_turns else 3) * len(turns)

    def alone(part):  # as axolotl reads a segment
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    read = [(alone(request) + alone(answer), len(alone(request))) for request, answer in found]
    assert read == texts
    assert (tokenizer("a")["input_ids"][0] == read[2][0][0]) == first_token


def test_in_a_format_that_is_given(anchored_file, pair, tmp_path):
    (tmp_path / "format.txt").write_text("Q: {prompt}\nA:\n")
    options = ("--model", pair[1], FIRST, "--prompt-format", f"@{tmp_path}/format.txt")
    assert run(anchored_file, "-o", tmp_path / "own.jsonl", *options).exit_code == 0
    requests = [request for request, _ in written(tmp_path / "own.jsonl")]
    assert sum(text.startswith("Q: ") and text.endswith("\nA:") for text in requests) == len(OWN_ANSWERS)
    result = run(anchored_file, "-o", tmp_path / "other.jsonl", "--model", pair[1], "--prompt-format", "Q:")
    assert result.exit_code == 2
    assert "'Q:' is no prompt format" in result.stderr


def test_a_config_whose_data_s_format_cannot_be_told(anchored_file, pair, tmp_path):
    config = tmp_path / "config.yml"
    data = [{"path": "mine.jsonl", "type": "orcamini"}]
    config.write_text(yaml.safe_dump({"base_model": str(pair[1]), "datasets": data}))
    result = run(anchored_file, config, "-o", tmp_path / "own.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompt_formats"] == []
    assert "datasets: mine.jsonl is of type orcamini, in whose prompts nothing is asked; give" in result.stderr


def test_where_general_forms_cannot_be_asked(anchored_file, pair, tmp_path, monkeypatch):
    output = tmp_path / "own.jsonl"
    result = run(anchored_file, "-o", output, "--model", tmp_path)
    assert result.exit_code == 2
    assert "give --model, or write first turns alone (--no-general-formats)" in result.stderr
    monkeypatch.chdir(pair[1].parent)  # where a folder of that name lies, which may be another
    result = run(anchored_file, "-o", output)
    assert result.exit_code == 2
    assert "no more than a name for the aligned model ('aligned'), whose tokenizer is needed: give" in result.stderr
    assert run(anchored_file, "-o", output, "--model", pair[1], FIRST).exit_code == 2
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "other")
    result = run(anchored_file, "-o", output, "--model", tmp_path / "other")
    assert result.exit_code == 2
    assert "takes neither a system prompt nor an earlier turn; give the aligned model as --model" in result.stderr
    assert not output.exists()


def test_refused(anchored_file, direction_file, tmp_path):
    output = tmp_path / "own.jsonl"
    result = run(direction_file, "-o", output)
    assert result.exit_code == 2
    assert "the direction file holds no answers of the aligned model; make it again" in result.stderr
    assert not output.exists()
    assert run(anchored_file, "-o", output, "--lines", 0, FIRST).exit_code == 2
    output.write_text("mine")
    assert "exists; give another --output, or --force" in run(anchored_file, "-o", output).stderr
    assert output.read_text() == "mine"
    assert run(anchored_file, "-o", output, "--force", FIRST).exit_code == 0


def test_a_full_fine_tuning_reads_what_the_anchor_reads(forked_train, anchored_file, pair, dataset, tmp_path):
    """Where the plugin has no place: the same tokens, and a loss on the answer alone."""
    assert run(anchored_file, "-o", tmp_path / "own.jsonl", "--lines", 30, "--model", pair[1]).exit_code == 0
    turns = written(tmp_path / "own.jsonl")
    assert len(set(turns)) == 2 * len(OWN_ANSWERS)
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
    for request, answer in turns:
        ids, start = _encoded(make_tokenizer(), request, answer)
        assert (tuple(ids), (*[-100] * start, *ids[start:])) in found
