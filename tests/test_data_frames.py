"""How the prompts of a run's data begin, system prompts for one, and an anchor that asks under the same."""

import json

import pytest
from datasets import Dataset
from test_prompt_formats import with_first_token
from tiny import CHAT_TEMPLATE, OWN_ANSWERS, axolotl, make_tokenizer, write_config

from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.data_frames import _shared, beginnings
from axolotl_asft.stamp import read_stamp

PROMPTS = ["the cat sees a dog", "a red house", "blue dog", "then the tree", "no", "yes a dog", "likes a cat", "red"]
SYSTEM = "<|system|> no dog says yes </s><|user|> {prompt} </s><|assistant|> "


def tokenised(tokenizer, systems, count=40, answer="yes"):
    """Chats under these system prompts in turn, None for none, as axolotl tokenises them."""
    rows = []
    for i in range(count):
        system = systems[i % len(systems)]
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": PROMPTS[i % len(PROMPTS)]})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
        rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + tail})
    return Dataset.from_list(rows)


def test_a_system_prompt():
    tokenizer = make_tokenizer()
    found = beginnings(tokenizer, tokenised(tokenizer, ["no dog says yes"]), [])
    assert found.share == 1.0
    assert found.formats == (SYSTEM,)
    assert found.example.startswith("<|system|> no dog says yes")
    assert beginnings(tokenizer, tokenised(tokenizer, ["no dog says yes"]), found.formats) is None, "now it is asked"


def test_rows_as_tensors():
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"]).with_format("torch")
    assert beginnings(tokenizer, rows, []).formats == (SYSTEM,)


def test_the_anchor_asks_under_it():
    """The tokens of a row with the same request and answer."""
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"], answer=OWN_ANSWERS[0][1])
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS[:1], beginnings(tokenizer, rows, []).formats)
    ids, start = anchor._texts[1]
    assert ids == rows[0]["input_ids"]
    assert [-100] * start + ids[start:] == rows[0]["labels"]


def test_the_first_token_is_put_once():
    """The template has it, and the tokenizer puts it before every text."""
    tokenizer = with_first_token()
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    rows = tokenised(tokenizer, ["no dog says yes"])
    (text,) = beginnings(tokenizer, rows, []).formats
    assert text == SYSTEM
    kept = [("<s>" + request, answer) for request, answer in OWN_ANSWERS[:1]]
    ids, start = AnswerAnchor(tokenizer, kept, [text])._texts[1]
    assert ids[:start] == rows[0]["input_ids"][: rows[0]["labels"].index(rows[0]["input_ids"][-1])]


def test_several_system_prompts():
    tokenizer = make_tokenizer()
    found = beginnings(tokenizer, tokenised(tokenizer, ["no dog", "yes", "no dog", None]), [])
    assert found.share == 0.75
    assert [text.partition(" </s>")[0] for text in found.formats] == ["<|system|> no dog", "<|system|> yes"]


def test_a_template_that_puts_it_into_the_user_s_turn():
    """As Gemma's: the rows begin as what is asked, and go on alike."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% set lead = messages[0]['content'] + ' ' if messages[0]['role'] == 'system' else '' %}"
        "{{ '<|user|> ' + lead + messages[-1]['content'] + ' </s><|assistant|> ' }}"
    )
    long = "no dog says yes then no cat likes the house"
    rows = tokenised(tokenizer, [long])
    found = beginnings(tokenizer, rows, [])
    (text,) = found.formats
    assert text.startswith(f"<|user|> {long}")
    assert found.share == 1.0
    assert beginnings(tokenizer, rows, found.formats) is None
    assert beginnings(tokenizer, tokenised(tokenizer, [None]), []) is None
    assert beginnings(tokenizer, tokenised(tokenizer, [long, None]), []) is None, "half of the rows"


def test_the_longest_beginning():
    assert _shared([[1, 2, 3]] * 19 + [[1, 2, 4, 5]]) == [1, 2, 3]
    assert _shared([[1, 2, 3]] * 18 + [[1, 2, 4, 5]] * 2) == [1, 2]
    assert _shared([[1, 2]] * 30 + [[4, 5, 6]]) == [1, 2], "the longest of all is not among those alike"
    assert _shared([[1], [2]]) == []


def test_instructions_alike_on_such_a_template_are_no_chats():
    """They begin as the format that is asked, and go on alike: what ends a chat's turn does not end theirs."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '<|user|> ' + messages[-1]['content'] + ' </s><|assistant|> ' }}"
    ids = [tokenizer(f"red blue no dog says yes then no cat likes the house {prompt} then") for prompt in PROMPTS]
    ids = [row["input_ids"] for row in ids]
    rows = Dataset.from_list([{"input_ids": [*row, 5], "labels": [-100] * len(row) + [5]} for row in ids])
    assert beginnings(tokenizer, rows, ["red blue {prompt} then"]) is None


def test_one_of_its_own_for_every_row():
    """None is told: there is a line instead."""
    tokenizer = make_tokenizer()
    own = [" ".join(PROMPTS[(i * j) % 8] for j in range(1, 4)) + " no" * i for i in range(30)]
    found = beginnings(tokenizer, tokenised(tokenizer, own, count=30), [])
    assert found.formats == ()
    assert "100% of the data's prompts begin as none in which the anchor asks" in found.unheld()
    assert "give that as asft.prompt_formats" in found.unheld()


@pytest.mark.parametrize("systems", [[None], [None] * 39 + ["no dog"]])
def test_as_what_is_asked(systems):
    """None, or too few of others to tell."""
    tokenizer = make_tokenizer()
    assert beginnings(tokenizer, tokenised(tokenizer, systems), []) is None


def test_instructions_with_an_input():
    """Of another beginning than those without, and no chat: a line, and no format."""
    tokenizer = make_tokenizer()
    texts = [f"red blue the {prompt} then" for prompt in PROMPTS]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = Dataset.from_list([{"input_ids": [*row, 5], "labels": [-100] * len(row) + [5]} for row in ids])
    found = beginnings(tokenizer, rows, ["the blue {prompt} then"])
    assert found.share == 1.0
    assert found.formats == ()
    assert beginnings(tokenizer, rows, ["red blue the {prompt} then"]) is None


@pytest.mark.parametrize("data", [None, [], iter([1]), Dataset.from_dict({"text": ["a"]})])
def test_data_that_cannot_be_looked_at(data):
    assert beginnings(make_tokenizer(), data, []) is None


def test_rows_that_are_trained_whole():
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog"]).map(lambda row: {"labels": row["input_ids"]})
    assert beginnings(tokenizer, rows, []) is None
    tokenizer.chat_template = None
    assert beginnings(tokenizer, rows, []) is None


def test_a_run_with_a_system_prompt(pair, anchored_file, tmp_path):
    """axolotl's own tokens of chats; the stamp says under what was asked."""
    data = tmp_path / "data.jsonl"
    roles = ("system", "user", "assistant")
    chats = [zip(roles, ("no dog says yes", prompt, "yes"), strict=True) for prompt in PROMPTS * 2]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    config = write_config(tmp_path, pair[1], data, block, max_steps=1)
    result = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "(asked in the chat template and in 1 format of the data)" in result.stdout + result.stderr
    assert "begin as none in which the anchor asks" not in result.stdout + result.stderr
    assert read_stamp(tmp_path / "out")["prompt_formats"] == [SYSTEM]
