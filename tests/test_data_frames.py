"""How the prompts of a run's data begin, system prompts for one, and an anchor that asks under the same."""

import json

import pytest
from datasets import Dataset
from test_prompt_formats import with_first_token
from tiny import CHAT_TEMPLATE, OWN_ANSWERS, axolotl, make_tokenizer, write_config
from tokenizers import Regex

from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.data_frames import MOST, _shared, frames
from axolotl_asft.prompt_formats import rendered
from axolotl_asft.stamp import read_stamp

PROMPTS = ["the cat sees a dog", "a red house", "blue dog", "then the tree", "no", "yes a dog", "likes a cat", "red"]
SYSTEM = "<|system|> no dog says yes </s> <|user|> {prompt} </s><|assistant|> "


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


def of_tokens(prompts):
    """Rows of prompts' tokens, each with one trained token after it."""
    return Dataset.from_list([{"input_ids": [*ids, 5], "labels": [-100] * len(ids) + [5]} for ids in prompts])


def write_chats(path, system):
    """As axolotl reads them, all under one system prompt."""
    roles = ("system", "user", "assistant")
    chats = [zip(roles, (system, prompt, "yes"), strict=True) for prompt in PROMPTS * 2]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_system_prompt():
    tokenizer = make_tokenizer()
    found = frames(tokenizer, tokenised(tokenizer, ["no dog says yes"]), [])
    assert found.share == 1.0
    assert found.formats == (SYSTEM,)
    assert found.example.startswith("<|system|> no dog says yes")
    assert found.left == 0.0
    assert frames(tokenizer, tokenised(tokenizer, ["no dog says yes"]), found.formats) is None, "now it is asked"


def test_rows_as_tensors():
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"]).with_format("torch")
    assert frames(tokenizer, rows, []).formats == (SYSTEM,)


@pytest.mark.parametrize("column", ["prompt_ids", "prompt_input_ids"])
def test_preference_data(column):
    """As TRL tokenises them: the prompts in a column of their own."""
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"])
    prompts = [
        [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in rows
    ]
    kept = Dataset.from_dict(
        {column: prompts, "chosen_ids": [[5]] * len(prompts), "rejected_ids": [[6]] * len(prompts)}
    )
    assert frames(tokenizer, kept, []).formats == (SYSTEM,)


def test_prompts_that_a_model_is_to_answer():
    """GRPO's, as turns or as texts, which TRL tokenises at each step."""
    tokenizer = make_tokenizer()
    system = {"role": "system", "content": "no dog says yes"}
    turns = [[system, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in turns]
    for prompts in (turns, texts):
        assert frames(tokenizer, Dataset.from_dict({"prompt": prompts}), []).formats == (SYSTEM,)
    for others in ([1, 2], [["red", "dog"]] * 3, [turns, turns], [None, None]):
        assert frames(tokenizer, Dataset.from_dict({"prompt": others}), []).untold == 1.0


def test_the_anchor_asks_under_it():
    """The tokens of a row with the same request and answer."""
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"], answer=OWN_ANSWERS[0][1])
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS[:1], frames(tokenizer, rows, []).formats)
    ids, start = anchor._texts[1]
    assert ids == rows[0]["input_ids"]
    assert [-100] * start + ids[start:] == rows[0]["labels"]


def test_the_first_token_is_put_once():
    """The template has it, and the tokenizer puts it before every text."""
    tokenizer = with_first_token()
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    rows = tokenised(tokenizer, ["no dog says yes"])
    (text,) = frames(tokenizer, rows, []).formats
    assert text == SYSTEM
    kept = [("<s>" + request, answer) for request, answer in OWN_ANSWERS[:1]]
    ids, start = AnswerAnchor(tokenizer, kept, [text])._texts[1]
    assert ids[:start] == rows[0]["input_ids"][: rows[0]["labels"].index(rows[0]["input_ids"][-1])]


def test_several_system_prompts():
    tokenizer = make_tokenizer()
    found = frames(tokenizer, tokenised(tokenizer, ["no dog", "yes", "no dog", None]), [])
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
    found = frames(tokenizer, rows, [])
    (text,) = found.formats
    assert text == f"<|user|> {long} {{prompt}} </s><|assistant|> "
    assert frames(tokenizer, rows, found.formats) is None
    assert frames(tokenizer, tokenised(tokenizer, [None]), []) is None
    halves = frames(tokenizer, tokenised(tokenizer, [long, f"red {long}"]), []).formats
    assert len(frames(tokenizer, tokenised(tokenizer, [long, None, None]), []).formats) == 1
    assert frames(tokenizer, tokenised(tokenizer, [long, *[None] * 39]), []) is None, "too few"
    assert [text.partition(" {")[0] for text in halves] == [f"<|user|> {long}", f"<|user|> red {long}"]


def test_the_longest_beginning():
    assert _shared([[1, 2, 3]] * 19 + [[1, 2, 4, 5]]) == [1, 2, 3]
    assert _shared([[1, 2, 3]] * 18 + [[1, 2, 4, 5]] * 2) == [1, 2]
    assert _shared([[1, 2]] * 30 + [[4, 5, 6]]) == [1, 2], "the longest of all is not among those alike"
    assert _shared([[1], [2]]) == []


def test_an_instruction_that_all_requests_have():
    """Inside a format that is asked: before and after what differs."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '<|user|> ' + messages[-1]['content'] + ' </s><|assistant|> ' }}"
    texts = [f"red blue no dog says yes then no cat likes the {prompt} tree then" for prompt in PROMPTS]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = of_tokens(ids)
    found = frames(tokenizer, rows, ["red blue {prompt} then"])
    assert found.formats == ("red blue no dog says yes then no cat likes the {prompt} tree then",)
    assert (found.share, found.left) == (0.0, 0.0)
    assert frames(tokenizer, rows, found.formats) is None


def test_requests_that_are_all_the_same_have_no_instruction():
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, [None])
    same = Dataset.from_list([row for row in rows if row["input_ids"] == rows[0]["input_ids"]] * 20)
    assert len(same) >= 20
    assert frames(tokenizer, same, []) is None


def test_one_of_its_own_for_every_row():
    """Some from all over are asked in, and hold the others; where none is, there is a line."""
    tokenizer = make_tokenizer()
    own = [" ".join(PROMPTS[(i * j) % 8] for j in range(1, 4)) + " no" * i for i in range(30)]
    rows = tokenised(tokenizer, own, count=30)
    found = frames(tokenizer, rows, [])
    assert len(found.formats) == len(set(found.formats)) == MOST
    assert all(any(text.startswith(f"<|system|> {system} </s>") for system in own) for text in found.formats)
    assert (found.share, found.left) == (1.0, 0.0)
    assert found.unheld(True) == []
    (line,) = found.unheld(False)
    assert "100% of the data's prompts begin as none in which the anchor asks" in line
    assert "give that as asft.prompt_formats" in line


def test_some_of_its_own_beside_a_common_one():
    tokenizer = make_tokenizer()
    own = ["no dog says yes" if i % 2 else " ".join(["red"] * i + ["cat"]) for i in range(1, 41)]
    formats = frames(tokenizer, tokenised(tokenizer, own), []).formats
    assert formats[0] == SYSTEM
    assert len(formats) == MOST


def test_system_prompts_that_are_too_long_to_be_asked_in():
    tokenizer = make_tokenizer()
    own = ["no " * 600 + "red " * i for i in range(30)]
    found = frames(tokenizer, tokenised(tokenizer, own, count=30), [])
    assert (found.formats, found.left) == ((), 1.0)
    assert found.unheld(True) == found.unheld(False) != []
    half = frames(tokenizer, tokenised(tokenizer, [*own[:15], *["red " * i for i in range(1, 16)]], count=30), [])
    assert (len(half.formats), half.left) == (MOST, 0.5)


def test_the_same_instruction_under_system_prompts():
    """Each with its own: what stands in all of the user's turns is part of the format."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    rows = []
    for i in range(40):
        system = ["no dog", "yes"][i % 2]
        text = (
            f"<|system|> {system} </s> <|user|> then a cat likes the red house and {PROMPTS[i % 8]} </s> <|assistant|>"
        )
        rows.append(tokenizer(text)["input_ids"])
    found = frames(tokenizer, of_tokens(rows), []).formats
    assert sorted(text.partition(" {")[0] for text in found) == [
        f"<|system|> {system} </s> <|user|> then a cat likes the red house and" for system in ("no dog", "yes")
    ]


@pytest.mark.parametrize("systems", [[None], [None] * 39 + ["no dog"]])
def test_as_what_is_asked(systems):
    """None, or too few of others to tell."""
    tokenizer = make_tokenizer()
    assert frames(tokenizer, tokenised(tokenizer, systems), []) is None


def real_tokenizer():
    """Bytes in GPT-2's way, merged as in ". " and breaks: what stands around a request may be of one token with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\s\w]+[\r\n]*|\s*[\r\n]+|\s?\w+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["It is late.\n\nSentiment:", "Classify the text.\n\nText: no!\n\nSentiment:"] * 50
    special = ["<|im_start|>", "<|im_end|>"]
    training = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, training)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert len(fast(".\n\n")["input_ids"]) == 1
    return fast


def chats(tokenizer, requests, system):
    rows = []
    for request in requests:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": request})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return of_tokens(rows)


@pytest.mark.parametrize("system", [None, "Be short."])
@pytest.mark.parametrize("ends", [".", "!", ".!?x"])
def test_an_instruction_around_requests_that_end_in_marks(system, ends):
    """The request's last mark and the break after it are one token."""
    tokenizer = real_tokenizer()
    texts = [
        f"It was the {word} one of {i}{ends[i % len(ends)]}"
        for i, word in enumerate(["red", "blue", "old", "new"] * 10)
    ]
    requests = [f"Classify the sentiment of this.\n\nText: {text}\n\nSentiment:" for text in texts]
    found = frames(tokenizer, chats(tokenizer, requests, system), [])
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    (text,) = found.formats
    head, tail = text.split("{prompt}")
    assert head.startswith(f"{before}<|im_start|>user\nClassify the sentiment of this.\n\nText:")
    assert tail.lstrip(".!").endswith("\n\nSentiment:<|im_end|>\n<|im_start|>assistant\n")
    assert found.left == 0.0


@pytest.mark.parametrize("end", ["", "\n", "  "])
def test_requests_that_end_in_blanks(end):
    """Some of them, or all: the system prompt is found."""
    tokenizer = real_tokenizer()
    requests = [f"{word} {i}{end if i % 2 else ''}" for i, word in enumerate(["red", "blue", "old", "new"] * 10)]
    for some in (requests, requests[1::2]):
        (text,) = frames(tokenizer, chats(tokenizer, some, "Be short."), []).formats
        assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{prompt}")


def test_a_format_that_begins_with_the_request_hides_no_system_prompts():
    tokenizer = make_tokenizer()
    found = frames(tokenizer, tokenised(tokenizer, ["no dog", "yes"]), ["{prompt} then"])
    assert len(found.formats) == 2
    assert found.share == 1.0


def test_instructions_with_an_input():
    """Of another beginning than those without, and no chat: their own beginning and end are told."""
    tokenizer = make_tokenizer()
    texts = [
        f"red blue the cat and the dog sees then {prompt} yes {PROMPTS[i - 3]} then" for i, prompt in enumerate(PROMPTS)
    ]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = of_tokens(ids)
    found = frames(tokenizer, rows, ["the blue {prompt} then"])
    assert found.formats == ("red blue the cat and the dog sees then {prompt} then",)
    assert (found.share, found.left) == (1.0, 0.0)
    assert frames(tokenizer, rows, found.formats) is None


def test_data_that_begin_as_nothing_that_is_asked():
    """No chats, and too little in common: a line."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(f"red blue the {prompt} then")["input_ids"] for prompt in PROMPTS]
    rows = of_tokens(ids)
    found = frames(tokenizer, rows, ["the blue {prompt} then"])
    assert (found.formats, found.share, found.left) == ((), 1.0, 1.0)
    assert len(found.unheld(True)) == 1
    assert frames(tokenizer, rows, ["red blue the {prompt} then"]) is None


@pytest.mark.parametrize("data", [None, [], iter([1]), Dataset.from_dict({"text": ["a"]})])
def test_data_that_cannot_be_looked_at(data):
    found = frames(make_tokenizer(), data, [])
    assert (found.formats, found.share, found.untold) == ((), 0.0, 1.0)
    (line,) = found.unheld(True)
    assert "of 100% of the data nothing tells the prompts" in line
    assert found.unheld(True, others=True) == []


def test_raw_texts_beside_chats():
    tokenizer = make_tokenizer()
    chats = tokenised(tokenizer, [None], count=30).to_list()
    texts = [{"input_ids": [8, 9, 10], "labels": [8, 9, 10]}]
    found = frames(tokenizer, Dataset.from_list(chats + texts * 10), [])
    assert (found.formats, found.untold) == ((), 0.25)
    assert len(found.unheld(True)) == 1
    assert frames(tokenizer, Dataset.from_list(chats + texts), []) is None, "too few"


THINKING = CHAT_TEMPLATE.replace(
    "<|assistant|> ' }}",
    "<|assistant|> ' }}{% if enable_thinking is defined and not enable_thinking %}says no {% endif %}",
)


@pytest.mark.parametrize("column", ["prompt_ids", "prompt", "input_ids"])
def test_a_template_that_thinks(column):
    """TRL renders it so that a thought may come; the anchor asks, as everywhere, with the empty one."""
    tokenizer = make_tokenizer()
    plain = tokenised(tokenizer, ["no dog says yes"])
    tokenizer.chat_template = THINKING
    assert rendered(tokenizer)[1] != rendered(tokenizer, thinks=True)[1]
    system = {"role": "system", "content": "no dog says yes"}
    if column == "input_ids":  # answers with thoughts in them
        rows = plain
    elif column == "prompt":
        rows = Dataset.from_dict({"prompt": [[system, {"role": "user", "content": prompt}] for prompt in PROMPTS]})
    else:
        rows = Dataset.from_dict({"prompt_ids": [row["input_ids"][: row["labels"].count(-100)] for row in plain]})
    found = frames(tokenizer, rows, [])
    assert found.formats == (f"{SYSTEM}says no ",)
    assert (found.left, found.untold) == (0.0, 0.0)


def test_rows_that_are_trained_whole():
    """The turn's end tells the prompt, where there is one."""
    tokenizer = make_tokenizer()
    rows = tokenised(tokenizer, ["no dog says yes"])
    whole = rows.map(lambda row: {"labels": row["input_ids"]})
    assert frames(tokenizer, whole, []).formats == (SYSTEM,)
    texts = Dataset.from_list([{"input_ids": [8, 9, 10], "labels": [8, 9, 10]}] * 8)
    assert frames(tokenizer, texts, []).untold == 1.0
    tokenizer.chat_template = None
    assert frames(tokenizer, rows, []) is None


def test_a_run_that_trains_on_its_prompts(forked_train, pair, anchored_file, tmp_path):
    """axolotl leaves out the headers alone then: the turn's end tells the prompt from the answer."""
    data = write_chats(tmp_path / "data.jsonl", "no dog says yes")
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    status, output = forked_train(write_config(tmp_path, pair[1], data, block, max_steps=1, train_on_inputs=True))
    assert status == 0, output[-5000:]
    assert read_stamp(tmp_path / "out")["prompt_formats"] == [SYSTEM]
    assert "nothing tells the prompts" not in output


def test_a_run_on_texts_without_turns(forked_train, pair, anchored_file, tmp_path):
    """Nothing tells what a prompt is: a line."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS * 2))
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    sets = [{"path": str(data), "ds_type": "json", "type": "completion"}]
    status, output = forked_train(write_config(tmp_path, pair[1], data, block, max_steps=1, datasets=sets))
    assert status == 0, output[-5000:]
    assert read_stamp(tmp_path / "out")["prompt_formats"] == []
    assert "of 100% of the data nothing tells the prompts" in output


def test_a_run_with_a_system_prompt(pair, anchored_file, tmp_path):
    """axolotl's own tokens of chats; the stamp says under what was asked."""
    data = write_chats(tmp_path / "data.jsonl", "no dog says yes")
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    config = write_config(tmp_path, pair[1], data, block, max_steps=1)
    result = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "(asked in the chat template, in 1 format of the data and " in result.stdout + result.stderr
    assert "begin as none in which the anchor asks" not in result.stdout + result.stderr
    assert read_stamp(tmp_path / "out")["prompt_formats"] == [SYSTEM]


def test_a_run_that_goes_on_asks_in_what_it_asked_in(pair, anchored_file, tmp_path):
    """Though its data begin otherwise now, as under a template with the date in it."""

    def run(system, **changes):
        data = write_chats(tmp_path / f"{system[:2]}.jsonl", system)
        block = {"direction": str(anchored_file), "anchor_weight": 1.0}
        config = write_config(tmp_path, pair[1], data, block, save_strategy="steps", save_steps=1, **changes)
        return axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)

    result = run("no dog says yes", max_steps=1)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run("red", max_steps=2, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_stamp(tmp_path / "out")["prompt_formats"] == [SYSTEM]
    assert "begin as none in which the anchor asks" in result.stdout + result.stderr
