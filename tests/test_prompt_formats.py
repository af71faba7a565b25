"""Data that ask in a format of their own: what it is, the anchor that asks in it too, and an evaluation in it."""

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from datasets import Dataset
from tiny import CHAT_TEMPLATE, OWN_ANSWERS, axolotl, make_tokenizer, write_config
from tokenizers.processors import TemplateProcessing
from trainers import make_trainer

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.anchor import TEXTS, AnswerAnchor
from axolotl_asft.args import parse_block
from axolotl_asft.cli import asft
from axolotl_asft.cost import tokens_asked
from axolotl_asft.dry_run import check_config
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asked_in import format_to_ask_in
from axolotl_asft.prompt_formats import asked_ways, checked_formats, format_as_template, plain_requests
from axolotl_asft.quiet import without_noise
from axolotl_asft.resuming import WHAT_HOLDS, refuse_other_constraint
from axolotl_asft.run_data import data_formats, formats_of_content, run_formats
from axolotl_asft.stamp import read_stamp, stamp_adapter

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
OWN_TYPE = {"field_instruction": "q", "field_output": "a", "no_input_format": "Q: {instruction} A: ", "format": "-"}
PLAIN = ["the cat sees a dog", "a red house"]


def with_first_token():
    """The small tokenizer, and <s> before every text, as Llama's and Mistral's put it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def config_of(*kinds, **changes):
    datasets = [{"path": f"{place}.jsonl", "type": kind} for place, kind in enumerate(kinds)]
    return DictDefault({"sequence_len": 64, "datasets": datasets, **changes})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("alpaca", ALPACA),
        ("alpaca:chat", "SYSTEM: " + ALPACA.partition("\n")[0] + "\nUSER: {prompt}\nASSISTANT:"),
        ("alpaca_chat.load_no_prompt", "USER: {prompt}\nASSISTANT:"),
        ("summarizetldr", "USER: Summarize the following article as a TL;DR.\n{prompt}\nASSISTANT:"),
        (OWN_TYPE, "Q: {prompt} A: "),
        ({**OWN_TYPE, "system_prompt": "Be kind. "}, "Be kind. Q: {prompt} A: "),
        ({**OWN_TYPE, "system_prompt": "Be kind. ", "system_format": None, "extra": 1}, "Be kind. Q: {prompt} A: "),
        ({"format": "[INST] {instruction} {input} [/INST]"}, None),
        ({"field_instruction": "q"}, None),
        ("alpaca_w_system.load_open_orca", None),
        ("orcamini", None),
        ("context_qa.load_v2", None),
        ("creative_acr.load_critique", None),
        ("jeopardy", None),
        ("explainchoice", None),
        ("reflection", None),
        ("metharme", None),
        ("pygmalion", None),
        ("no_such_type", None),
    ],
)
def test_the_format_of_a_type(kind, text, capfd):
    """None where the rows bring a part of the prompt, such as a system text of their own."""
    (found,) = data_formats(config_of(kind), make_tokenizer())
    assert found.text == text
    assert found.path == "0.jsonl"
    assert "Failed to load" not in capfd.readouterr().out, "it would stand in the JSON of an evaluation"


@pytest.mark.parametrize(
    "kind", ["chat_template", "chat_template.argilla", "input_output", "completion", "my.own", None]
)
def test_data_without_a_format_of_their_own(kind):
    assert data_formats(config_of(kind), make_tokenizer()) == []


def test_preferences_are_not_looked_at():
    assert data_formats(config_of("alpaca", rl="dpo"), make_tokenizer()) == []


@pytest.mark.parametrize("make", [make_tokenizer, with_first_token])
@pytest.mark.parametrize("kind", ["alpaca", "alpaca:chat", "gpteacher", "alpaca_chat.load_qa", OWN_TYPE])
def test_the_anchor_reads_what_axolotl_trains_on(kind, make):
    """The same tokens as a row of the data with the same request and answer, but for the end of the text."""
    tokenizer, cfg = make(), config_of(kind)
    (found,) = data_formats(cfg, tokenizer)
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS[:1], [found.text])
    fields = {"instruction": PLAIN[0], "question": PLAIN[0], "q": PLAIN[0], "input": "", "system_prompt": ""}
    row = fields | dict.fromkeys(("output", "response", "answer", "a"), OWN_ANSWERS[0][1])
    rows = Dataset.from_list([row])
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    wrapped, _ = get_dataset_wrapper(cfg.datasets[0], tokenizer, cfg, base, rows, style or None)
    ids, start = anchor._texts[1]
    assert [*ids, tokenizer.eos_token_id] == wrapped[0]["input_ids"]
    assert [-100] * start + ids[start:] == wrapped[0]["labels"][:-1]


def test_each_pair_is_asked_in_every_kind_of_form():
    """A refusal and the harmless answer after it: in the chat template, in one of the formats, in a general one."""
    ways = list(asked_ways(5, ["a", "b"], ["x", "y", "z"]))
    assert ways[:6] == [(0, None), (1, None), (0, "a"), (1, "a"), (0, "x"), (1, "x")]
    assert ways[6:12] == [(2, None), (3, None), (2, "b"), (3, "b"), (2, "y"), (3, "y")]
    assert ways[12:] == [(4, None), (4, "a"), (4, "z")]
    assert list(asked_ways(3)) == [(0, None), (1, None), (2, None)]
    assert len(list(asked_ways(128, ["a"] * 8, ["x"] * 8))) == 3 * 128, "however many there are"


def test_the_texts_of_an_anchor():
    formats, general = ["Q: {prompt} A:"], ["<|system|> yes </s><|user|> {prompt} </s><|assistant|> "]
    tokenizer = make_tokenizer()
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS, formats, general)
    assert len(anchor._texts) == 3 * len(OWN_ANSWERS)
    plain = AnswerAnchor(tokenizer, OWN_ANSWERS)
    assert [text for i, text in enumerate(anchor._texts) if i % 6 < 2] == plain._texts
    told = [tokenizer.decode(ids[:start]) for ids, start in anchor._texts[:6]]
    asked = [f"Q: {request} A:" for request in PLAIN]
    assert told[2:4] == [tokenizer.decode(tokenizer(text)["input_ids"]) for text in asked]
    assert told[4:] == [f"<|system|> yes </s> <|user|> {request} </s> <|assistant|>" for request in PLAIN]
    assert [tokenizer.decode(ids[start:]) for ids, start in anchor._texts[:6:2]] == [OWN_ANSWERS[0][1]] * 3


def adapted(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def test_the_loss_is_that_of_all_texts_of_the_step(pair):
    """Beside an anchor whose direction kept the answers in both formats."""
    (_, first), (_, second) = kept = OWN_ANSWERS[:2]
    both = [kept[0], ("Q: the cat sees a dog A: ", first), kept[1], ("Q: a red house A: ", second)]
    losses = []
    for answers, formats in ((kept, ["Q: {prompt} A: "]), (both, [])):
        anchor, model = AnswerAnchor(make_tokenizer(), answers, formats), adapted(pair[1])
        anchor.remember(model)
        with without_noise(model):
            losses.append(anchor.loss(model, 0))
        assert len(anchor._texts) == 4 <= TEXTS
    assert losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1])


def test_what_is_recognised_is_asked_in_the_chat_template(pair):
    """Of its own answers the model knows as many, whatever else it is asked in."""
    model = adapted(pair[1])
    known = [AnswerAnchor(make_tokenizer(), OWN_ANSWERS, given).remember(model) for given in ([], ["Q: {prompt} A:"])]
    assert known[0] == pytest.approx(known[1])


def test_the_requests_without_their_template():
    tokenizer, requests = make_tokenizer(), [request for request, _ in OWN_ANSWERS[:2]]
    assert plain_requests(tokenizer, requests) == PLAIN
    tokenizer.chat_template = "today is Monday " + CHAT_TEMPLATE
    assert plain_requests(tokenizer, ["today is Friday " + request for request in requests]) == PLAIN
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<|assistant|> '", "'<|assistant|> <think> </think> '")
    assert plain_requests(tokenizer, [request + "<think> the dog </think> " for request in requests]) == PLAIN


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "no place", CHAT_TEMPLATE.replace("|>", "|]")]
)
def test_requests_of_another_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert plain_requests(tokenizer, [OWN_ANSWERS[0][0]]) is None
    assert plain_requests(None, [OWN_ANSWERS[0][0]]) is None
    with pytest.raises(AsftError, match="not in the tokenizer's chat template"):
        AnswerAnchor(tokenizer, OWN_ANSWERS, ["Q: {prompt}"])


@pytest.mark.parametrize("make", [make_tokenizer, with_first_token])
def test_a_format_as_a_chat_template(make):
    """What an evaluation asks are the anchor's own tokens."""
    tokenizer, text = make(), "it's \\ {{ a }} {% b\n{prompt}\nsays "
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS[:1], [text])
    ids, start = anchor._texts[1]
    tokenizer.chat_template = format_as_template(tokenizer, text)
    turn = [{"role": "user", "content": PLAIN[0]}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert asked.removeprefix("<s>") == text.replace("{prompt}", PLAIN[0])
    assert tokenizer(asked, add_special_tokens=False)["input_ids"] == ids[:start]
    turns = [*turn, {"role": "assistant", "content": "yes"}, *turn]
    assert tokenizer.apply_chat_template(turns, tokenize=False).count("yes</s>") == 1


def with_a_space_before_a_text():
    """As Llama 2's reads it: at the beginning of a text alone, and then <s>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyzQAI:' \n"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_tokenizer_that_puts_a_space_before_a_text():
    """Where a special token stands before it, it puts none: the template has to."""
    tokenizer = with_a_space_before_a_text()
    trained = tokenizer("Q: why\nA:")["input_ids"]
    assert trained != tokenizer("<s>Q: why\nA:", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = format_as_template(tokenizer, "Q: {prompt}\nA:")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False)
    assert tokenizer(asked, add_special_tokens=False)["input_ids"] == trained


def test_a_tokenizer_of_which_no_template_can_ask_so():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<pad>", 3), ("<s>", 1)]
    )
    with pytest.raises(AsftError, match="puts something before a text that no chat template can"):
        format_as_template(tokenizer, "Q: {prompt}")


@pytest.mark.parametrize("bad", ["", "no place", "{prompt} and {prompt}", "x" * 10_000 + "{prompt}", 3])
def test_no_prompt_format(bad):
    with pytest.raises(AsftError, match=r"is no prompt format; expected the text that data put around a request"):
        checked_formats([bad])
    expected = "valid string" if bad == 3 else "is no prompt format"
    with pytest.raises(AsftError, match=rf"asft.prompt_formats.* is .*{expected}"):
        parse_block({"direction": "d", "prompt_formats": [bad]})


@pytest.mark.parametrize("bad", ["Q: {prompt}", None, 3])
def test_no_list_of_formats(bad):
    with pytest.raises(AsftError, match="expected a list of texts"):
        checked_formats(bad)


def test_formats_of_a_block():
    assert parse_block({"direction": "d"}).prompt_formats is None
    assert parse_block({"direction": "d", "prompt_formats": []}).prompt_formats == []
    assert parse_block({"direction": "d", "prompt_formats": ["{prompt}:"] * 2}).prompt_formats == ["{prompt}:"]


def test_which_formats_a_run_asks_in():
    """What is given, else what the data have and the requests can be put in."""
    tokenizer, spec, cfg = make_tokenizer(), {"own_answers": OWN_ANSWERS}, config_of("alpaca", "alpaca", "pygmalion")
    formats = run_formats(cfg, tokenizer, None, spec)
    assert formats.asked == (ALPACA,)
    (line,) = formats.unheld(formats.asked)
    assert "2.jsonl is of type pygmalion, whose prompts are not the chat template's" in line
    assert "give the text around a request, with {prompt} in its place, as asft.prompt_formats" in line
    without = formats.unheld(())
    assert len(without) == 2
    assert "0.jsonl is of type alpaca" in without[0]
    assert "with an anchor_weight" in without[0]
    given = run_formats(cfg, tokenizer, ["{prompt}!"], spec)
    assert given.asked == ("{prompt}!",)
    (line,) = given.unheld(given.asked)
    assert "is of type alpaca" in line, "of the other type the format is not known, and may be this one"
    assert run_formats(cfg, tokenizer, [], spec).asked == ()
    assert run_formats(cfg, None, None, spec).asked == (ALPACA,), "check may have no tokenizer"
    tokenizer.chat_template = None
    other = run_formats(cfg, tokenizer, None, spec)
    assert other.asked == ()
    assert all("train with the chat template of the direction file's requests" in line for line in other.unheld(()))


def test_attach_says_what_it_asks_in(pair, rows, anchored_file, tmp_path, caplog):
    trainer = make_trainer(pair, rows, tmp_path, max_steps=2)
    trainer.processing_class = make_tokenizer()
    direction = AlignmentDirection.load(anchored_file)
    with caplog.at_level(logging.INFO, "axolotl.asft"):
        constraint = attach(trainer, direction, anchor_weight=1.0, prompt_formats=["Q: {prompt} A:"])
    others = "in 1 format of the data and under general system prompts and in later turns"
    assert f"anchor_weight 1 (asked in the chat template, {others})" in caplog.text
    assert constraint.settings()["prompt_formats"] == ["Q: {prompt} A:"]
    trainer.train()
    trainer.save_model()
    assert read_stamp(tmp_path)["prompt_formats"] == ["Q: {prompt} A:"]
    other = make_trainer(pair, rows, tmp_path)
    other.processing_class = make_tokenizer()
    without = attach(other, direction, anchor_weight=0.0, prompt_formats=["Q: {prompt} A:"])
    assert without.settings()["prompt_formats"] == [], "nobody asks in it"
    assert without.settings()["general_formats"] is False


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_run_on_alpaca_s_data(pair, anchored_file, tmp_path, weight):
    """With an anchor it asks in their format, by itself; `check` foresees it, and the adapter and its card say so."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "the cat sees", "input": "", "output": "a dog"}\n' * 16)
    block = {"direction": str(anchored_file), "anchor_weight": weight}
    datasets = [{"path": str(data), "type": "alpaca"}]
    config = write_config(tmp_path, pair[1], data, block, max_steps=1, datasets=datasets)
    check = check_config(config)
    assert not [line for line in check.warnings if "alpaca" in line], "a penalty on the weights knows no prompts"
    said = f"prompt_formats: each answer's request is put as {ALPACA!r} too, as the data put theirs"
    assert (said in check.settings) == bool(weight)
    result = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("(asked in the chat template, in 1 format of the data and " in result.stdout + result.stderr) == bool(
        weight
    )
    assert read_stamp(tmp_path / "out")["prompt_formats"] == ([ALPACA] if weight else [])
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"- asked in the chat template, as `` {json.dumps(ALPACA)} ``, under general" in card) == bool(weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"prompt_formats": []},
            "is of type alpaca, whose prompts are not the chat template's, and under which nothing",
        ),
        ({"anchor_weight": 0.0, "prompt_formats": ["Q: {prompt}"]}, "prompt_formats has no effect without an anchor"),
    ],
)
def test_check_warns(pair, anchored_file, tmp_path, changes, said):
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "the cat sees", "input": "", "output": "a dog"}\n')
    block = {"direction": str(anchored_file), "anchor_weight": 1.0, **changes}
    datasets = [{"path": str(data), "type": "alpaca"}]
    check = check_config(write_config(tmp_path, pair[1], data, block, datasets=datasets))
    assert [line for line in check.warnings if said in line], check.warnings
    assert check.fine


def test_check_refuses_what_cannot_be_asked(pair, dataset, anchored_file, tmp_path):
    """The run's template is another: the requests cannot be taken out of theirs."""
    block = {"direction": str(anchored_file), "anchor_weight": 1.0, "prompt_formats": ["Q: {prompt}"]}
    other = {"chat_template": "jinja", "chat_template_jinja": CHAT_TEMPLATE.replace("|>", "|]")}
    check = check_config(write_config(tmp_path, pair[1], dataset, block, **other))
    assert [line for line in check.errors if "are not in the tokenizer's chat template" in line], check.errors


def test_check_without_a_tokenizer_takes_the_template_for_the_run_s(pair, anchored_file, tmp_path):
    """The run has one: no warning, and no other settings than the run's."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "the cat sees", "input": "", "output": "a dog"}\n')
    datasets = [{"path": str(data), "type": "alpaca"}]
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    changes = {"datasets": datasets, "added_tokens_overrides": {5: "<|extra|>"}}
    check = check_config(write_config(tmp_path, pair[1], data, block, **changes))
    assert not [line for line in check.warnings if "alpaca" in line], check.warnings
    assert [line for line in check.settings if "prompt_formats" in line]


def test_a_checkpoint_from_before_there_were_formats(tmp_path):
    """Nothing was asked in them: no run that asks in one goes on from it."""
    settings = dict.fromkeys(WHAT_HOLDS, 1) | {"prompt_formats": []}
    (tmp_path / "adapter_config.json").write_text("{}")
    stamp_adapter(tmp_path, {key: value for key, value in settings.items() if key != "prompt_formats"})
    refuse_other_constraint(tmp_path, settings)
    with pytest.raises(AsftError, match=r"was trained under prompt_formats \[\], and this run asks for"):
        refuse_other_constraint(tmp_path, settings | {"prompt_formats": ["Q: {prompt}"]})


def test_more_tokens_are_asked_for():
    assert tokens_asked(OWN_ANSWERS, ["x" * 400]) > tokens_asked(OWN_ANSWERS) + TEXTS * 400 // 4 // 2 - TEXTS


@pytest.mark.parametrize(
    ("kinds", "given", "text", "said"),
    [
        (["alpaca"], None, ALPACA, "prompts are asked in it: --prompt-format chat_template"),
        (["alpaca", "alpaca"], None, ALPACA, "prompts are asked in it"),
        (["alpaca"], "chat_template", None, None),
        (["alpaca"], "Q: {prompt}", "Q: {prompt}", None),
        (["alpaca", "chat_template"], None, None, "prompts are asked in the chat template"),
        (["alpaca", "alpaca:chat"], None, None, "prompts are asked in the chat template"),
        (["pygmalion"], None, None, "prompts are asked in the chat template"),
        (["chat_template"], None, None, None),
        (["completion"], None, None, None),
        ([], None, None, None),
    ],
)
def test_what_an_evaluation_asks_in(kinds, given, text, said):
    found, line = format_to_ask_in(given, {"datasets": [{"path": "a", "type": kind} for kind in kinds]})
    assert found == text
    assert (line is None) == (said is None)
    assert said is None or said in line


def test_an_evaluation_goes_by_the_block_where_the_data_do_not_tell():
    datasets = [{"path": "a", "type": "pygmalion"}]
    block = {"direction": "d", "prompt_formats": ["Q: {prompt}"]}
    assert format_to_ask_in(None, {"datasets": datasets, "asft": block})[0] == "Q: {prompt}"
    block["prompt_formats"].append("A: {prompt}")
    assert format_to_ask_in(None, {"datasets": datasets, "asft": block})[0] is None
    assert format_to_ask_in(None, {"datasets": 5}) == (None, None)
    assert formats_of_content({"datasets": 5}) == []


def test_an_evaluation_tells_of_an_adapter_s_stamp(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    stamp_adapter(tmp_path, {"prompt_formats": [ALPACA]})
    text, line = format_to_ask_in(None, {}, [f"mine={tmp_path}"])
    assert text is None
    assert line.startswith(f"{tmp_path} was trained on data that ask as {ALPACA!r}")
    assert format_to_ask_in("chat_template", {}, [str(tmp_path)]) == (None, None)


def test_an_evaluation_in_the_format_of_the_data(pair, tmp_path):
    """By itself, where a config's data have one; a file gives another."""
    config = tmp_path / "config.yml"
    content = {"base_model": str(pair[1]), "datasets": [{"path": "a.jsonl", "type": "alpaca"}]}
    config.write_text(yaml.safe_dump(content))
    few = ["--limit", "2", "--max-new-tokens", "4", "--device", "cpu"]

    def asked(*options) -> tuple[list[str], Path]:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        result = CliRunner().invoke(asft, ["eval", str(config), *few, "-o", str(output), *options])
        assert result.exit_code == 0, result.output
        kept = json.loads((output / "model.json").read_text())
        return [answer["asked"] for answer in kept["harmful"]["harmful"]["answers"]], output

    (first, _), output = asked()
    assert first.startswith("Below is an instruction")
    assert first.endswith("### Response:\n")
    assert json.loads((output / "results.json").read_text())["questions"]["prompt_format"] == ALPACA
    assert f"Asked as {ALPACA!r}." in (output / "results.md").read_text()
    (first, _), output = asked("--prompt-format", "chat_template")
    assert first.startswith("<|user|> ")
    assert "Asked as" not in (output / "results.md").read_text()
    (tmp_path / "format.txt").write_text("Q: {prompt}\nA:\n")
    (first, _), _ = asked("--prompt-format", f"@{tmp_path / 'format.txt'}")
    assert first.startswith("Q: ")
    assert first.endswith("\nA:")
    content["datasets"][0]["type"] = "pygmalion"
    config.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(asft, ["eval", str(config), *few, "-o", str(tmp_path / "json"), "--json"])
    assert json.loads(result.stdout)["questions"]["prompt_format"] is None
    assert "prompts are asked in the chat template" in result.stderr
    result = CliRunner().invoke(asft, ["eval", str(config), "--prompt-format", "no place", "-o", str(tmp_path / "no")])
    assert result.exit_code == 2
    assert "'no place' is no prompt format" in result.output
