"""Sets of prompts as people keep them: spreadsheets, training sets, odd characters; what is none is refused."""

import json

import pytest
from datasets import Dataset

from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.prompts import load_chats, load_prompts


def texts(path):
    return [prompt.prompt for prompt in load_prompts(str(path))]


def turn(role, content):
    return {"role": role, "content": content}


def test_a_line_ends_at_its_end_alone(tmp_path):
    """JSON allows U+2028 inside a string, and so do people's texts."""
    (tmp_path / "set.jsonl").write_bytes('{"prompt": "How\u2028are you?"}\r\n\r\n{"prompt": "Who?"}'.encode())
    (tmp_path / "set.txt").write_text("How\u2028are you?\n \nWho?\n", encoding="utf-8")
    assert texts(tmp_path / "set.jsonl") == texts(tmp_path / "set.txt") == ["How\u2028are you?", "Who?"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.csv", "prompt,category\nHow?,x\n"),
        ("set.JSONL", '{"prompt": "How?"}\n'),
        ("set.Json", '["How?"]'),
        ("set.TXT", "How?\n"),
    ],
)
def test_excel_s_mark_and_capitals(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert texts(tmp_path / name) == ["How?"]


def test_turns_are_asked_by_the_user_s_last(tmp_path):
    rows = [
        {"prompt": [turn("user", "How?")]},
        {"prompt": [turn("system", "Be kind."), turn("user", "Hi."), turn("assistant", "Hi!"), turn("user", " Who? ")]},
        {"prompt": "Why?"},
        {"prompt": None},
        {"prompt": " "},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "set.jsonl") == texts(tmp_path / "set.json") == ["How?", "Who?", "Why?"]


def test_turns_of_a_dataset(tmp_path, monkeypatch):
    """Rows as `datasets` gives them, which is how sets of the Hub come."""
    Dataset.from_list([{"prompt": [turn("user", "How?")]}]).to_json(tmp_path / "owner" / "set" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [prompt.prompt for prompt in load_prompts("owner/set")] == ["How?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.json", {"prompt": ["q1", "q2"]}, r'expected a list of strings or objects, found {"prompt": \["q1"'),
        ("set.json", "How are you?", 'expected a list of strings or objects, found "How are you'),
        ("set.json", 5, "expected a list"),
        ("set.json", ["q1", ["q2"]], r'row 2: the prompt is \["q2"\]; expected a string, or turns'),
        ("set.json", ["q1", 5], "row 2: the prompt is 5"),
        ("set.json", [{"goal": "q1"}, {"text": "q2", "n": 1}], "row 2 has text, n; expected goal, as in the first row"),
        ("set.json", ["q1", {}], "row 2 has nothing; expected prompt"),
        (
            "set.json",
            ["q1", "the cat \ud83d"],
            r"row 2 has half of a surrogate pair, \\ud83d; expected whole characters",
        ),
        ("set.jsonl", {"prompt": "q1", "category": "\udc00"}, r"row 1 has half of a surrogate pair, \\udc00"),
        ("set.jsonl", {"prompt": {"text": "q1"}}, 'row 1: the prompt is {"text": "q1"}'),
        ("set.jsonl", {"prompt": []}, r"the prompt is \[\]"),
        ("set.jsonl", {"prompt": [turn("assistant", "q1")]}, "turns with text from a user"),
        ("set.jsonl", {"prompt": [turn("user", [{"type": "image"}])]}, r'the prompt is \[{"type": "image"}\]'),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(AsftError, match=message) as error:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.jsonl", '{"ask me": "How?", "prompt": 1}\n{"ask me": "Who?", "prompt": 2}\n'),
        ("set.JSON", '[{"ask me": "How?", "prompt": 1}, {"ask me": "Who?", "prompt": 2}]'),
        ("set.csv", "prompt,Ask me\n1,How?\n2,Who?\n"),
    ],
)
def test_a_column_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert texts(f"{tmp_path / name}?column=ask+me") == ["How?", "Who?"]
    with pytest.raises(AsftError, match=rf"expected one of other; rename one, or give .*{name}\?column=NAME$"):
        texts(f"{tmp_path / name}?column=other")


def test_a_file_may_have_a_question_mark_in_its_name(tmp_path):
    (tmp_path / "set?column=goal.csv").write_text("prompt,goal\nHow?,Who?\n")
    assert texts(tmp_path / "set?column=goal.csv") == ["How?"]
    assert texts(f"{tmp_path / 'set?column=goal.csv'}") == ["How?"]


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("set.csv", "split=test"), ("set.csv", "column=goal&split=test"), ("set.csv", "goal"), ("set.csv", "column="),
        ("set.csv", ""), ("set.txt", "column=prompt"),
    ],
)  # fmt: skip
def test_a_file_takes_a_column_and_nothing_else(tmp_path, name, behind):
    (tmp_path / name).write_text("goal\nHow?\n")
    with pytest.raises(AsftError, match=rf"{name} is named as a file, with \?{behind} after it; expected \?column="):
        texts(f"{tmp_path / name}?{behind}")


def test_messages_are_turns(tmp_path):
    """As axolotl's chat data has them; a spreadsheet's text of turns is no request."""
    rows = [{"messages": [turn("user", "How?"), turn("assistant", "So.")]}, {"messages": [turn("user", "Who?")]}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(tmp_path / "set.jsonl") == texts(f"{tmp_path / 'set.jsonl'}?column=messages") == ["How?", "Who?"]
    (tmp_path / "set.csv").write_text("messages\n\"[{'role': 'user'}]\"\n")
    with pytest.raises(AsftError, match=r"row 1: messages is .*; expected a list of turns"):
        texts(tmp_path / "set.csv")


@pytest.mark.parametrize("name", ["set.txt", "set.jsonl", "set.JSON", "set.csv?column=goal"])
def test_a_file_that_is_not_there_is_no_dataset(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = name.partition("?")[0]
    with pytest.raises(AsftError, match=f"^there is no file p/{file}; check the path$"):
        texts(f"p/{name}")
    (tmp_path / "p" / file).mkdir(parents=True)
    with pytest.raises(AsftError, match=f"^p/{file} is a folder; expected a file of prompts, .jsonl"):
        texts(f"p/{name}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": }', r"cannot be read as JSON \(Expecting value, column 12\)"),
        ("[" * 100_000, r"cannot be read as JSON \(maximum recursion depth exceeded.*\)"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path, line, message):
    (tmp_path / "set.jsonl").write_text(f'{{"prompt": "How?"}}\n\n \n{line}\n{{"prompt": "Who?"}}\n')
    with pytest.raises(AsftError, match=rf"set.jsonl, line 4 {message}; give a file of prompts$"):
        texts(tmp_path / "set.jsonl")


def test_chats_of_a_file(tmp_path):
    """The first turns of each line, with Excel's mark and without; a line ends at its end alone."""
    roles = ("system", "user", "assistant", "user")
    said = ("Be kind.", "How\u2028are you?", "So.", "Who?")
    chat = list(map(turn, roles, said))
    text = f"{json.dumps({'messages': chat}, ensure_ascii=False)}\r\n\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "chats.jsonl").write_bytes(text.encode(encoding))
        assert load_chats(tmp_path / "chats.jsonl") == [("How\u2028are you?", "So.")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'\xef\xbb\xbf\n{"messages": []}', r"chats.jsonl, line 2: expected \{\"messages\": \[user, assistant\]\}$"),
        (
            b"[" * 100_000,
            r"chats.jsonl, line 1 cannot be read as JSON .*; expected \{\"messages\": \[user, assistant\]\}$",
        ),
        (b'{"messages": 5}', r"chats.jsonl, line 1: expected \{\"messages\": \[user, assistant\]\}$"),
        *(
            (
                json.dumps({"messages": [turn("user", said), turn("assistant", "So.")]}).encode(),
                f"{shown}; expected a string$",
            )
            for said, shown in ((None, "the content of a message is null"), ([1], r"a message is \[1\]"))
        ),
        (b"\xef\xbb\xbf\n", "chats.jsonl holds no chats; expected one JSON object per line$"),
        (b"\n\xff", r"chats.jsonl is not UTF-8 \(byte 2\); save it as UTF-8$"),
        (None, "chats.jsonl cannot be read: there is no file of that name; check the path$"),
    ],
)
def test_what_is_no_chats_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "chats.jsonl").write_bytes(content)
    with pytest.raises(AsftError, match=message):
        load_chats(tmp_path / "chats.jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_set_that_is_no_text(tmp_path, suffix):
    (tmp_path / f"set{suffix}").write_bytes("modèle".encode("latin-1"))
    with pytest.raises(AsftError, match=rf"^{tmp_path}/set{suffix} is not UTF-8 \(byte 4\); save it as UTF-8$"):
        texts(tmp_path / f"set{suffix}")


def test_an_error_without_a_text_is_told_by_its_kind(monkeypatch):
    def fail(*args, **options):
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(AsftError, match=r"the dataset org/set cannot be loaded \(TimeoutError\)"):
        texts("org/set")
