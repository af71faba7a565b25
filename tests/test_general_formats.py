"""The forms in which a chat model is asked once it serves: in which an anchor asks by itself, and an evaluation can."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, OWN_ANSWERS, axolotl, make_tokenizer, write_config
from trainers import make_trainer
from transformers import AutoModelForCausalLM

from axolotl_asft import AlignmentDirection, attach
from axolotl_asft.anchor import AnswerAnchor
from axolotl_asft.cli import asft
from axolotl_asft.cost import tokens_asked
from axolotl_asft.dry_run import check_config
from axolotl_asft.errors import AsftError
from axolotl_asft.general_formats import (
    ASKED,
    NOT_GENERAL,
    UNSEEN,
    around,
    general_formats,
    general_to_ask,
    later_turns,
    template_to_ask_in,
)
from axolotl_asft.prompt_formats import asked_ways
from axolotl_asft.resuming import WHAT_HOLDS, refuse_other_constraint
from axolotl_asft.stamp import read_stamp, stamp_adapter

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
FIRST_TURN = "{{ '<|user|> ' + messages[-1]['content'] + ' </s><|assistant|> ' }}"
SPEC = {"own_answers": [list(pair) for pair in OWN_ANSWERS]}


def test_in_the_tokenizer_s_own_template():
    tokenizer = make_tokenizer()
    found = general_formats(tokenizer)
    assert len(found) == len(ASKED)
    assert found[0] == "<|system|> You are a helpful assistant. </s><|user|> {prompt} </s><|assistant|> "
    assert found[1].count("<|user|>") == 2
    assert found[1].endswith("today? </s><|user|> {prompt} </s><|assistant|> ")


def test_a_template_that_refuses_some_turns_or_drops_them():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    assert all("system" not in text for text in general_formats(tokenizer))
    assert len(general_formats(tokenizer)) == sum(turns[0][0] == "user" for turns in ASKED)
    tokenizer.chat_template = FIRST_TURN
    assert general_formats(tokenizer) == []
    tokenizer.chat_template = None
    assert general_formats(tokenizer) == []


def test_what_an_evaluation_asks_in_is_asked_by_no_anchor():
    """Neither its texts nor the answers to them."""
    asked = {text for turns in ASKED for _, text in turns}
    assert not asked & {text for turns in UNSEEN.values() for _, text in turns}
    assert not any(word in text.lower() for text in asked for word in ("harm", "safe", "refuse", "ethic", "legal"))


def test_which_can_be_asked():
    tokenizer = make_tokenizer()
    assert general_to_ask(tokenizer, SPEC, None) == general_to_ask(tokenizer, SPEC, True) != ([], [])
    assert general_to_ask(tokenizer, SPEC, False) == general_to_ask(None, SPEC, None) == ([], [])
    for template in (CHAT_TEMPLATE.replace("|>", "|]"), FIRST_TURN):
        tokenizer.chat_template = template
        assert general_to_ask(tokenizer, SPEC, None) == ([], [NOT_GENERAL])
        with pytest.raises(AsftError, match=r"general_formats is true, but the direction.*set general_formats: false"):
            general_to_ask(tokenizer, SPEC, True)


def test_attach_asks_in_them(pair, rows, anchored_file, tmp_path, caplog):
    """By itself; the stamp says so, and the anchor's texts are those."""
    direction = AlignmentDirection.load(anchored_file)
    texts = []
    for given, is_asked in ((None, True), (False, False)):
        trainer = make_trainer(pair, rows, tmp_path / str(given), max_steps=1)
        trainer.processing_class = make_tokenizer()
        with caplog.at_level(logging.INFO, "axolotl.asft"):
            constraint = attach(trainer, direction, anchor_weight=1.0, general_formats=given)
        assert constraint.general_formats is constraint.settings()["general_formats"] is is_asked
        assert (
            "(asked in the chat template, under general system prompts and in later turns)" in caplog.text
        ) == is_asked
        trainer.train()
        trainer.save_model()
        assert read_stamp(tmp_path / str(given))["general_formats"] is is_asked
        texts.append(constraint._anchor._answers._texts)
        caplog.clear()
    answers = [tuple(pair) for pair in direction.spec["own_answers"]]
    assert texts[0] == AnswerAnchor(make_tokenizer(), answers, [], general_formats(make_tokenizer()))._texts
    assert texts[1] == AnswerAnchor(make_tokenizer(), answers)._texts


def test_attach_where_they_cannot_be_asked(pair, rows, anchored_file, tmp_path, caplog):
    trainer = make_trainer(pair, rows, tmp_path)
    trainer.processing_class = make_tokenizer()
    trainer.processing_class.chat_template = FIRST_TURN
    direction = AlignmentDirection.load(anchored_file)
    with pytest.raises(AsftError, match="general_formats is true, but"):
        attach(trainer, direction, anchor_weight=1.0, general_formats=True)
    assert attach(trainer, direction, anchor_weight=1.0).general_formats is False
    assert NOT_GENERAL in caplog.text


def test_a_run_and_its_check(pair, dataset, anchored_file, tmp_path):
    block = {"direction": str(anchored_file), "anchor_weight": 1.0}
    config = write_config(tmp_path, pair[1], dataset, block, max_steps=1)
    check = check_config(config)
    (line,) = [line for line in check.settings if line.startswith("general_formats true: under general system prompts")]
    assert f"({len(ASKED)} forms" in line
    result = axolotl("train", str(config), "--launcher", "python", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_stamp(tmp_path / "out")["general_formats"] is True
    assert "under general system prompts and in later turns" in (tmp_path / "out" / "README.md").read_text()
    content = config.read_text().replace("anchor_weight: 1.0", "anchor_weight: 1.0\n  general_formats: false")
    config.write_text(content)
    check = check_config(config)
    assert check.fine
    assert not [line for line in check.settings if "general" in line]


def test_check_says_what_has_no_effect_and_what_cannot_be_had(pair, dataset, anchored_file, tmp_path):
    block = {"direction": str(anchored_file), "anchor_weight": 0.0, "general_formats": True}
    check = check_config(write_config(tmp_path, pair[1], dataset, block))
    assert "general_formats has no effect without an anchor_weight" in check.warnings
    block["anchor_weight"] = 1.0
    other = {"chat_template": "jinja", "chat_template_jinja": FIRST_TURN}
    check = check_config(write_config(tmp_path, pair[1], dataset, block, **other))
    assert [line for line in check.errors if line.startswith("general_formats is true, but")], check.errors


def test_a_checkpoint_from_before_there_were_general_formats(tmp_path):
    settings = dict.fromkeys(WHAT_HOLDS, 1) | {"general_formats": False}
    (tmp_path / "adapter_config.json").write_text("{}")
    stamp_adapter(tmp_path, {key: value for key, value in settings.items() if key != "general_formats"})
    refuse_other_constraint(tmp_path, settings)
    with pytest.raises(AsftError, match=r"was trained under general_formats False, and this run asks for True"):
        refuse_other_constraint(tmp_path, settings | {"general_formats": True})


def test_more_tokens_are_asked_for():
    plain, general = tokens_asked(OWN_ANSWERS), general_formats(make_tokenizer())
    assert plain < tokens_asked(OWN_ANSWERS, [], general) < plain + 8 * max(map(len, general)) // 4


@pytest.mark.parametrize("name", UNSEEN)
def test_a_template_after_other_turns(name):
    tokenizer = make_tokenizer()
    template = template_to_ask_in(tokenizer, name)
    turn = [{"role": "user", "content": "{prompt}"}]
    asked = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert asked == around(tokenizer, UNSEEN[name])
    tokenizer.chat_template = FIRST_TURN
    with pytest.raises(AsftError, match=f"chat template takes no {name.replace('_', ' ')}"):
        template_to_ask_in(tokenizer, name)


def test_an_evaluation_in_a_later_turn(pair, tmp_path):
    """Of the model alone: its prompts come after the turn before, and the results say so."""
    few = ["--limit", "2", "--max-new-tokens", "4", "--device", "cpu", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(asft, ["eval", "--model", str(pair[1]), "--prompt-format", "second_turn", *few])
    assert result.exit_code == 0, result.output
    (first, _) = [
        one["asked"]
        for one in json.loads((tmp_path / "out" / "model.json").read_text())["harmful"]["harmful"]["answers"]
    ]
    assert first.count("<|user|>") == 2
    assert "Asked as 'second_turn'." in (tmp_path / "out" / "results.md").read_text()


def test_before_the_first_step_nothing_has_moved(pair):
    """The gauge says so, in the log and at the end: without the later turns, whose loss does not begin at zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), LoraConfig(r=4, target_modules="all-linear"))
    anchor = AnswerAnchor(make_tokenizer(), OWN_ANSWERS, [], general_formats(make_tokenizer()))
    anchor.remember(model)
    assert float(anchor.measure(model)) == pytest.approx(0.0, abs=1e-6)
    losses = []
    for step in range(3):
        losses.append(float(anchor.loss(model, step)))
        assert float(anchor.kl) == pytest.approx(0.0, abs=1e-6)
    assert max(losses) > 1e-4


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM])
def test_whose_answer_is_wanted(template):
    """A later turn's is the first turn's; under a system prompt, and in the data's formats, it is the text's own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    general = general_formats(tokenizer)
    data = [general[0], "Q: {prompt} A:"]  # the first is one that the data have too: it is theirs
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS, data, general)
    ways = list(asked_ways(len(OWN_ANSWERS), data, general[1:]))
    first = {place: number for number, (place, way) in enumerate(ways) if way is None}
    assert len(ways) == len(anchor._texts) == 3 * len(OWN_ANSWERS)
    assert {way for _, way in ways} == {None, *data, *general[1:]} - set(general[1 + len(OWN_ANSWERS) // 2 :])
    for number, (place, way) in enumerate(ways):
        as_first = way in general[1:] and "<|system|>" not in way
        assert anchor._expected[number] == (first[place] if as_first else number)


@pytest.mark.parametrize("world", [2, 3])
def test_the_gauge_of_several_processes(pair, world):
    """The mean over the processes is that of one."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), lora).eval()
    anchor = AnswerAnchor(make_tokenizer(), OWN_ANSWERS, [], general_formats(make_tokenizer()))
    anchor.remember(model)
    anchor.loss(model, 1)
    alone, parts = float(anchor.kl), []
    for rank in range(world):
        anchor.loss(model, 1, rank, world)
        parts.append(float(anchor.kl))
    assert sum(parts) / world == pytest.approx(alone, rel=1e-4)
    assert alone > 1e-4


def test_which_are_later_turns_alone():
    tokenizer = make_tokenizer()
    later = later_turns(tokenizer)
    assert later < set(general_formats(tokenizer))
    assert all("<|system|>" not in text for text in later)
    assert len(later) == sum(turns[0][0] == "user" for turns in ASKED) == 3
    tokenizer.chat_template = FIRST_TURN
    assert later_turns(tokenizer) == set()


def test_a_later_turn_is_answered_as_the_first(pair):
    """Against the divergence over all words in float64, of value and gradient."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), lora).eval()
    tokenizer = make_tokenizer()
    general = sorted(later_turns(tokenizer))
    anchor = AnswerAnchor(tokenizer, OWN_ANSWERS, [], general)
    anchor.remember(model)
    loss = anchor.loss(model, 0)  # eight texts: two pairs in the first turn, and each in a later one
    parts = []
    for pair_of_answers, text in zip((OWN_ANSWERS[:2], OWN_ANSWERS[2:4]), general, strict=False):
        for request, answer in pair_of_answers:
            words = request.removeprefix("<|user|> ").removesuffix(" </s><|assistant|> ")
            with model.disable_adapter(), torch.no_grad():
                wanted = said(model, tokenizer, request, answer)
            for asked in (request, text.replace("{prompt}", words)):
                now = said(model, tokenizer, asked, answer)
                parts.append((wanted.exp() * (wanted - now)).sum(dim=-1))
    expected = torch.cat(parts).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for found, true in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(found, true.float(), rtol=1e-3, atol=1e-6)


def said(model, tokenizer, request, answer):
    """Log-probabilities (n, vocabulary) in float64 at the answer's tokens."""
    start = len(tokenizer(request)["input_ids"])
    ids = tokenizer(request + answer, return_tensors="pt")["input_ids"]
    return model(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
