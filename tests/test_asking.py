"""Asking: the tokens of the training, thoughts apart from answers, and whatever cannot be asked refused in one line."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import WORDS, make_tokenizer
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from axolotl_asft.errors import AsftError, WorkFailed
from axolotl_asft.evaluation.asking import HARMFUL_TASK, Interviewer, _metrics
from axolotl_asft.evaluation.coherence import log_likelihoods
from axolotl_asft.evaluation.generating import end_tokens, positions
from axolotl_asft.evaluation.lm_tasks import check_tasks, task_state
from axolotl_asft.evaluation.models import Subject, adapted, load_model, load_tokenizer, loading
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.evaluation.safety_metrics import safety_metrics
from axolotl_asft.tokens import first_words

# What follows on what, in a model that looks at the last token alone. A request's last word decides.
FOLLOWS = {
    "cat": "<think>", "<think>": "the", "the": "</think>", "</think>": "i", "i": "cannot", "cannot": "help",
    "help": "</s>", "dog": "yes", "yes": "</s>", "tree": "<think>forever", "<think>forever": "red", "red": "red",
}  # fmt: skip
PREAMBLE = [f"word{i}" for i in range(20)]  # of a model that says what it is before it refuses
FOLLOWS |= {"house": "no", "no": "<|end|>", "<|end|>": "then", "then": "</s>"}  # it knows two ends
FOLLOWS |= dict(zip(["blue", *PREAMBLE], [*PREAMBLE, "i"], strict=True))
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
ENDED = "{% for m in messages %}{{ m['content'] + (' <|end|>\n' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
SWITCHED = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think> </think> ' }}{% endif %}"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """Folder of a real Llama that does what FOLLOWS says, thoughts included."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", *dict.fromkeys([*FOLLOWS, *WORDS])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        for word, after in FOLLOWS.items():
            model.lm_head.weight[words.index(after), words.index(word)] = 1
    folder = tmp_path_factory.mktemp("thinker")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def interviewer(thinker):
    """Of the thinker, with another chat template and whatever else is given."""

    def make(template=TEMPLATE, **options):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(thinker)
        tokenizer.chat_template = template
        return Interviewer(AutoModelForCausalLM.from_pretrained(thinker).eval(), tokenizer, **options)

    return make


def asked_of(interviewer, prompts, folder):
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    return interviewer.answers(HARMFUL_TASK, {"prompts": str(path)})


def many(last, count):
    return [f"{first} {second} {last}" for first in WORDS for second in WORDS][:count]


def task_file(folder, name="colours", **changes):
    (folder / "data.json").write_text(json.dumps([{"q": "the cat", "a": 0}, {"q": "a red dog", "a": 1}]))
    content = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "doc_to_choice": ["yes", "no"], "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return str(path)


# ----------------------------------------------------------------------------------------------- the training's tokens
def test_the_model_reads_the_tokens_that_it_was_trained_on(pair, tmp_path):
    """A tokenizer that puts <s> first, under a template without one: no path through lm-eval adds it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.encode("the cat")[0] == 1
    model, read = AutoModelForCausalLM.from_pretrained(pair[1]).eval(), []

    def listen(module, args):
        read.extend(row[row != 3].tolist() for row in args[0])

    model.get_input_embeddings().register_forward_pre_hook(listen)
    interviewer = Interviewer(model, tokenizer, max_new_tokens=1)
    (answer,) = asked_of(interviewer, ["the red cat"], tmp_path)
    turn = [{"role": "user", "content": "the red cat"}]
    trained = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert read[0] == trained == tokenizer.encode(answer.asked, add_special_tokens=False)
    read.clear()
    interviewer.scores([task_file(tmp_path, "tokens")], None, None)
    assert read
    assert not [row for row in read if 1 in row]


# ---------------------------------------------------------------------------------------------------------------- ends
def with_an_end(tokenizer, how):
    """A tokenizer to which <|end|>, an end that the model's config does not know, is the end of a text or of a turn."""
    if how == "the tokenizer's":
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    else:
        tokenizer.chat_template = ENDED
        tokenizer.add_tokens([AddedToken("<|end|>", special=how == "the template's, special")])
    return tokenizer


ENDS = ["the tokenizer's", "the template's, special", "the template's, plain"]


@pytest.mark.parametrize("how", ENDS)
def test_an_answer_ends_where_its_tokenizer_says(interviewer, tmp_path, how):
    """Also where others of its batch go on; and a row's tokenizer says nothing of the next row's."""
    asked = interviewer()
    plain = PreTrainedTokenizerFast.from_pretrained(asked.tokenizer.name_or_path)
    plain.chat_template = TEMPLATE
    with_an_end(asked.tokenizer, how)
    asked = Interviewer(asked.model, asked.tokenizer)
    prompts = ["a house", "a blue"]
    assert [answer.answer.split()[-1] for answer in asked_of(asked, prompts, tmp_path)] == ["no", "help"]
    first = asked_of(Interviewer(asked.model, plain), prompts, tmp_path)[0]
    assert first.answer == "no <|end|> then"


def test_no_words_after_the_end_are_kept_to_be_held(thinker, tmp_path):
    """`extract --metric` asks in the same way."""
    folder = shutil.copytree(thinker, tmp_path / "model")
    with_an_end(PreTrainedTokenizerFast.from_pretrained(folder), "the tokenizer's").save_pretrained(folder)
    (tmp_path / "harm.json").write_text(json.dumps(many("cat", 4)))
    (tmp_path / "harmless.json").write_text(json.dumps(["a house", "a dog"]))
    found = safety_metrics(str(folder), (), str(tmp_path / "harm.json"), str(tmp_path / "harmless.json"))
    assert {answer for _, answer in found.own_answers} == {"i cannot help", "no", "yes"}


def test_several_sets_are_asked_together(thinker, tmp_path):
    for name, start in (("one", 0), ("two", 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(many("cat", 8)[start : start + 4]))
    sets = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    held = [safety_metrics(str(thinker), (), prompts, None).own_answers for prompts in (sets[0], sets[1], sets)]
    assert len(held[0]) > 0 < len(held[1])
    assert held[2] == held[0] + held[1]


def asked_for_metrics(thinker, folder, harmless):
    """The model's answers to prompts that ask for harm and to these, with a stage for each."""
    (folder / "harm.json").write_text(json.dumps(many("cat", 4)))
    (folder / "harmless.json").write_text(json.dumps(harmless))
    titles = []

    def stage(title, total):
        titles.append(title)
        return lambda done=1: None

    safety_metrics(str(thinker), (), str(folder / "harm.json"), str(folder / "harmless.json"), stage=stage)
    return titles


def test_each_set_has_a_stage_of_its_own(thinker, tmp_path):
    titles = asked_for_metrics(thinker, tmp_path, ["a dog"])
    assert titles == ["the aligned model answers harm.json", "the aligned model answers harmless.json"]


@pytest.mark.parametrize(("declining", "told"), [(1, False), (2, True)])
def test_over_refusal_that_an_anchor_would_hold_is_told(thinker, tmp_path, caplog, declining, told):
    with caplog.at_level("WARNING", logger="axolotl.asft"):
        asked_for_metrics(thinker, tmp_path, [*many("cat", declining), *many("dog", 4 - declining)])
    said = [record.getMessage() for record in caplog.records if "declines" in record.getMessage()]
    assert len(said) == told
    assert all("declines 2 of 4 harmless prompts (50 %), and anchor_weight would preserve" in line for line in said)


def test_without_a_chat_template_the_advice_holds_for_every_command(thinker, tmp_path):
    folder = shutil.copytree(thinker, tmp_path / "bare")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(AsftError, match="save one with the tokenizer; eval, and no other command, can take one"):
        load_tokenizer(str(folder))


def test_what_ends_a_turn(thinker):
    """An added token alone: words, the next turn's too, may stand in an answer."""
    model, tokenizer = load_model(str(thinker)), load_tokenizer(str(thinker))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    with_an_end(tokenizer, "the template's, special")
    assert end_tokens(model, tokenizer) == [2, end]
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    for template in (TEMPLATE, TEMPLATE + "then", refusing + ENDED, None):
        tokenizer.chat_template = template
        assert end_tokens(model, tokenizer) == [2]
    model.generation_config.eos_token_id = [2, 9]
    assert end_tokens(model, tokenizer) == [2, 9]
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert end_tokens(model, tokenizer) == []


# ------------------------------------------------------------------------------------------------------------ thoughts
def test_a_thought_is_no_part_of_the_answer(interviewer, tmp_path):
    first, second = asked_of(interviewer(), ["a red cat", "a red dog"], tmp_path)
    assert (first.asked, first.answer) == ("a red cat <think> the </think> ", "i cannot help")
    assert is_refusal(first.answer)
    assert (second.asked, second.answer) == ("a red dog ", "yes")


def test_thinking_is_off_where_the_template_knows_how(interviewer, tmp_path):
    (answer,) = asked_of(interviewer(SWITCHED), ["a red tree"], tmp_path)
    assert (answer.asked, answer.answer) == ("a red tree <think> </think> ", "i cannot help")


def test_a_thought_that_the_template_opens_ends_in_the_answer(interviewer, tmp_path):
    (answer,) = asked_of(interviewer(TEMPLATE + "{{ '<think>\n' }}"), ["a red dog"], tmp_path)
    assert (answer.asked, answer.answer) == ("a red dog <think>\nthe </think> ", "i cannot help")


@pytest.mark.parametrize(
    ("template", "last", "new"),
    [(TEMPLATE, "tree", 12), (TEMPLATE, "cat", 2), (TEMPLATE + "{{ '<think>\n' }}", "dog", 1)],
    ids=["endless", "cut off", "opened by the template"],
)
def test_thoughts_without_an_end_are_no_answers(interviewer, tmp_path, template, last, new):
    asked = interviewer(template, max_new_tokens=new, name="the chat model")
    message = rf"the chat model was still thinking after {new} tokens in 2 of 2 answers.*more tokens .--max-new-tokens"
    with pytest.raises(AsftError, match=message) as error:
        asked_of(asked, [f"a {last}", f"blue {last}"], tmp_path)
    assert "\n" not in str(error.value)


def test_a_few_thoughts_without_an_end_count_as_empty(interviewer, tmp_path):
    found = asked_of(interviewer(max_new_tokens=12), [*many("cat", 20), "a tree"], tmp_path)
    assert {answer.answer for answer in found[:20]} == {"i cannot help"}
    assert found[20].answer == ""
    assert found[20].asked.startswith("a tree <think>forever red red")
    assert not is_refusal(found[20].answer)


def test_no_unfinished_thought_is_kept_to_be_held(thinker, tmp_path):
    """`extract --metric` keeps answers with the thoughts before them, and nothing of those that have no end."""
    (tmp_path / "harm.json").write_text(json.dumps(many("cat", 20)))
    (tmp_path / "harmless.json").write_text(json.dumps([*many("dog", 20), "a tree"]))
    found = safety_metrics(str(thinker), (), str(tmp_path / "harm.json"), str(tmp_path / "harmless.json"))
    assert {answer for _, answer in found.own_answers} == {"i cannot help", "yes"}
    assert all(asked.endswith("cat <think> the </think> ") for asked, _ in found.own_answers[::2])


def test_a_refusal_that_comes_late_is_one_and_its_first_words_are_kept(thinker, tmp_path):
    (tmp_path / "harm.json").write_text(json.dumps(many("blue", 20)))
    found = safety_metrics(str(thinker), ["fisher"], str(tmp_path / "harm.json"), None)
    assert found.metrics[0].answers == 20
    assert {answer for _, answer in found.own_answers} == {" ".join(PREAMBLE[:16])}


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_first_words_of_an_answer(thinker, is_fast):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(thinker)
    if not is_fast:
        tokenizer = type("Slow", (), {"is_fast": False, "__call__": tokenizer.__call__, "decode": tokenizer.decode})()
    assert first_words(tokenizer, "the cat  and the dog", 3).split() == ["the", "cat", "and"]
    assert first_words(tokenizer, "the cat", 3) == "the cat"
    assert first_words(tokenizer, "", 3) == ""


# --------------------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("where", ["data", "included", "folder", "data_dir"])
def test_a_task_changes_with_what_it_is_made_of(tmp_path, where):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "base.yaml").write_text("test_split: test")
    for folder in ("rows", "more"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "test.jsonl").write_text("{}")
    changes = {
        "data": {},
        "included": {"include": "common/base.yaml"},
        "folder": {"dataset_path": str(tmp_path / "rows")},
        "data_dir": {"dataset_kwargs": {"data_dir": str(tmp_path / "more")}},
    }
    path = task_file(tmp_path, **changes[where])
    before = task_state(path)
    assert task_state(path) == before
    file = {
        "data": "data.json", "included": "common/base.yaml", "folder": "rows/deep/test.jsonl",
        "data_dir": "more/deep/test.jsonl",
    }[where]  # fmt: skip
    (tmp_path / file).write_text((tmp_path / file).read_text().replace("test", "train") + "\n")
    assert task_state(path) != before


def test_a_task_from_a_file(interviewer, tmp_path):
    """Asked as often as there are rows, by the task's own name."""
    path, asked = task_file(tmp_path), interviewer()
    check_tasks([path])
    first, second = (asked.scores([path], None, None) for _ in range(2))
    assert first == second
    assert 0 <= first["colours"]["acc"] <= 1
    assert first["colours"]["acc_higher_is_better"] is True


def test_which_way_is_better_stands_beside_a_score(interviewer, tmp_path):
    """As lm-eval's task says. A score that is no number is one all the same, an error that is none is nothing."""
    metrics = [{"metric": "acc", "higher_is_better": False, "aggregation": "mean"}]
    scores = interviewer().scores([task_file(tmp_path, "turned", metric_list=metrics)], None, None)
    assert scores["turned"]["acc_higher_is_better"] is False
    found = {"alias": "a", "ppl,none": float("inf"), "ppl_stderr,none": float("nan"), "em,strict": 0.5}
    found |= {"em_stderr,strict": "N/A", "f1,none": 0.25}
    assert _metrics(found, {"em": True, "ppl": False, "f1": None}) == {
        "ppl": math.nan, "ppl_higher_is_better": False, "em (strict)": 0.5, "em_higher_is_better (strict)": True,
        "f1": 0.25,
    }  # fmt: skip


def test_tasks_that_cannot_be_asked_are_refused_at_once(tmp_path):
    (tmp_path / "list.yaml").write_text("[1]\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "nothing.yaml").write_text("{}\n")
    for tasks, message in [
        (["gsm8k"], "cannot set up gsm8k .*openai/gsm8k.* data can be downloaded"),
        ([str(tmp_path / "list.yaml")], "cannot set up .*list.yaml"),
        ([str(tmp_path / "broken.yaml")], "cannot set up .*broken.yaml"),
        ([str(tmp_path / "nothing.yaml")], "cannot set up .*nothing.yaml"),
        ([task_file(tmp_path, "code", unsafe_code=True)], "the task code runs code that the model writes"),
        ([task_file(tmp_path, "picture", doc_to_image="q")], "the task picture uses images or audio"),
        (["no_such_task"], "no task 'no_such_task'"),
    ]:
        with pytest.raises(AsftError, match=message) as error:
            check_tasks(tasks)
        assert "\n" not in str(error.value)


def test_a_task_that_fails_is_one_line(interviewer, tmp_path):
    """It wants more tokens than the model has positions."""
    path = task_file(
        tmp_path, "long", output_type="generate_until", generation_kwargs={"max_gen_toks": 300, "until": []},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    check_tasks([path])
    with pytest.raises(AsftError, match=r"lm-eval failed at .*long.yaml \(AssertionError: .*300") as error:
        interviewer().scores([path], None, None)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- what does not fit or is torn
def test_the_positions_are_those_of_the_text_model(interviewer, tmp_path):
    """lm-eval looks at a wrapper's own config, which has none, and then takes 2048."""
    wrapper = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert not hasattr(wrapper, "max_position_embeddings")
    assert positions(SimpleNamespace(config=wrapper, named_modules=list)) == 77
    assert interviewer()._lm.max_length == 256


def test_only_the_special_tokens_of_a_generation_config_count(thinker, tmp_path):
    """Greedily, and as long as one says: whatever the model's authors put there for their demos."""
    plain = asked_of(Interviewer(load_model(str(thinker)), load_tokenizer(str(thinker))), ["a dog", "a blue"], tmp_path)
    folder = shutil.copytree(thinker, tmp_path / "demo")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"max_new_tokens": 2, "repetition_penalty": 5.0, "suppress_tokens": [9], "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    asked = Interviewer(load_model(str(folder)), load_tokenizer(str(folder)))
    assert asked_of(asked, ["a dog", "a blue"], tmp_path) == plain
    assert plain[1].answer.endswith("word19 i cannot help")


@pytest.mark.parametrize(("prompt", "new"), [("a red dog", 300), ("a red dog " * 20, 200)])
def test_more_tokens_than_positions_are_refused_before_asking(interviewer, tmp_path, prompt, new):
    stages = []
    asked = interviewer(max_new_tokens=new, stage=lambda *stage: stages.append(stage))
    with pytest.raises(AsftError, match=rf"with {new} new ones exceed the model's 256 positions"):
        asked_of(asked, [prompt], tmp_path)
    assert not stages


def test_tokens_that_the_model_lacks_are_refused_before_asking(interviewer, tmp_path):
    """A tokenizer of another model, or of a training that added tokens and did not save their embeddings."""
    stages = []
    asked = interviewer(stage=lambda *stage: stages.append(stage))
    asked.tokenizer.add_tokens([f"<new{i}>" for i in range(40)])
    highest = asked.tokenizer.convert_tokens_to_ids("<new39>")
    message = rf"gives token {highest} for a prompt, but the model has 64 embeddings; give the tokenizer that the model"
    with pytest.raises(AsftError, match=message) as error:
        asked_of(asked, ["a dog", "a <new39> dog"], tmp_path)
    assert "\n" not in str(error.value)
    assert not stages


def test_a_lack_of_memory_is_one_line(interviewer, tmp_path):
    def fail(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    asked = interviewer(batch_size=4)
    asked.model.lm_head.register_forward_pre_hook(fail)
    for ask in (
        lambda: asked_of(asked, ["a dog"], tmp_path),
        lambda: log_likelihoods(asked.model, asked.tokenizer, [("a", "dog")], batch_size=4),
    ):
        with pytest.raises(AsftError, match=r"too little memory for --batch-size 4 \(CUDA out of memory") as error:
            ask()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), WorkFailed),
        (MemoryError(), WorkFailed),
        (OSError("no file model.safetensors"), AsftError),
        (RuntimeError("size mismatch"), AsftError),
    ],
)
def test_what_cannot_be_loaded_for_want_of_room_is_no_mistake(error, kind):
    with pytest.raises(AsftError) as raised, loading("the model m cannot be loaded"):
        raise error
    assert type(raised.value) is kind
    assert str(raised.value).startswith("the model m cannot be loaded (")
    assert "\n" not in str(raised.value)


def test_without_the_hub_nothing_can_be_loaded():
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(WorkFailed, match="org/nothing"):
        load_model("org/nothing")


def test_a_torn_file_is_one_line(thinker, tmp_path):
    from peft import LoraConfig, get_peft_model

    def tear(path):
        path.write_bytes(path.read_bytes()[:-50])

    shutil.copytree(thinker, tmp_path / "model")
    tear(tmp_path / "model" / "model.safetensors")
    with pytest.raises(AsftError, match=r"model cannot be loaded \(.*check that its files are complete"):
        load_model(str(tmp_path / "model"))
    model = load_model(str(thinker))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "tuned")
    tear(tmp_path / "tuned" / "adapter_model.safetensors")
    with (
        pytest.raises(AsftError, match="does not fit this model"),
        adapted(load_model(str(thinker)), Subject("tuned", tmp_path / "tuned")),
    ):
        pass


@pytest.mark.parametrize(("mark", "warned"), [("[THINK]", True), ("<think>", False)])
def test_thoughts_in_other_marks_are_warned_of(pair, caplog, mark, warned):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{# " + mark + " #}"
    with caplog.at_level("WARNING", "axolotl.asft"):
        Interviewer(AutoModelForCausalLM.from_pretrained(pair[1]), tokenizer)
    assert ("look at the answers" in caplog.text) == warned
