"""Judges: real small models that learned a verdict, each asked as its family is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import make_family
from tiny import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.judge_ways import GENERIC_LABEL, WAYS
from axolotl_asft.evaluation.judges import Judge, _names

SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 3}
PAIRS = [("the cat", "yes cat"), ("the dog", "no dog"), ("the tree", "yes tree")]


def taught(model, **batch):
    """The model when it knows one batch by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(1000):
        loss = model(**batch).loss
        if loss < 1e-3:
            return model
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"nothing was learnt: loss {loss:.3f}")


def save(model, tokenizer, folder: Path) -> Path:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------ classifiers
@pytest.fixture(scope="module")
def beaver(tmp_path_factory) -> Path:
    """A multi-label classifier in the form of beaver-dam: cats are one category of harm, dogs another, trees none."""
    tokenizer = make_tokenizer()
    things = {"cat": [1.0] + [0.0] * 13, "dog": [0.0] * 13 + [1.0], "tree": [0.0] * 14, "house": [0.0] * 14}
    texts = [f"BEGINNING OF CONVERSATION: USER: the thing ASSISTANT:says {thing} </s>" for thing in things]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, num_labels=14, problem_type="multi_label_classification", **SIZE)
        model = LlamaForSequenceClassification(config)
    taught(model, input_ids=ids, labels=torch.tensor(list(things.values())))
    return save(model, tokenizer, tmp_path_factory.mktemp("beaver") / "tiny-beaver-dam-7b")


def test_any_category_of_beaver_dam_counts(beaver):
    pairs = [("the thing", f"says {thing} ") for thing in ("cat", "tree", "dog", "house")]
    judge = Judge.load(str(beaver))
    assert judge.harmful(pairs) == [True, False, True, False]
    assert judge.way.threshold == 0.4
    assert judge._text("a", "b") == "BEGINNING OF CONVERSATION: USER: a ASSISTANT:b</s>"


def test_a_checkpoint_without_a_head_is_no_classifier(tmp_path):
    """transformers would make up the missing head and go on."""
    config = LlamaConfig(vocab_size=64, num_labels=14, **SIZE)
    folder = save(LlamaForCausalLM(config), make_tokenizer(), tmp_path / "beaver-dam-7b")
    with pytest.raises(AsftError, match=r"is not a classifier: its checkpoint \(LlamaForCausalLM\) lacks score.weight"):
        Judge.load(str(folder))


def test_a_classifier_judges(classifier):
    judge = Judge.load(str(classifier), batch_size=3)
    pairs = [("the cat", "yes cat"), ("the dog", "no dog"), ("the tree", "yes tree"), ("the house", "no house")]
    done = []
    assert judge.harmful(pairs, done.append) == [True, False, True, False]
    assert done == [3, 1]


def test_a_family_is_known_by_a_judge_s_own_name(classifier, beaver, guard, tmp_path):
    """Not by the folders that it lies in, and beaver-dam by its 14 labels too."""

    def family(folder, source=classifier):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return Judge.check(str(folder), text=ASKED, harmful="harm")[0].family

    known = [way.family for way in WAYS]
    study = tmp_path / "beaver-dam-and-llama-guard"
    assert not {family(study / "my-judge"), family(study / "beaver-dam-7b")} & set(known)
    assert family(study / "mine" / "beaver-dam-7b", beaver) == "beaver-dam"
    assert family(study / "Llama-Guard-3-8B", guard) == "llama-?guard"
    cached = tmp_path / "models--meta-llama--Llama-Guard-3-8B" / "snapshots" / ("0" * 40)
    assert family(cached, guard) == "llama-?guard"
    renamed = shutil.copytree(guard, tmp_path / "renamed")
    config = json.loads((renamed / "config.json").read_text())
    for kept, found in (("meta-llama/Llama-Guard-3-8B", True), ("llama-guard/other", False)):
        (renamed / "config.json").write_text(json.dumps(config | {"_name_or_path": kept}))
        assert (Judge.check(str(renamed), text=ASKED, harmful="harm")[0].family in known) == found
    assert _names("meta-llama/Llama-Guard-3-8B@main") == ["Llama-Guard-3-8B"]


def test_positions_that_begin_behind_the_padding(tmp_path):
    """RoBERTa's config tells of 20 positions, of which 16 are for tokens when the padding has the number 3."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 20}
    config = RobertaConfig(vocab_size=64, pad_token_id=3, id2label={0: "safe", 1: "unsafe"}, **sizes)
    folder = save(AutoModelForSequenceClassification.from_config(config), make_tokenizer(), tmp_path / "judge")
    judge = Judge.load(str(folder))
    assert judge.tokenizer.model_max_length > 20
    assert judge._encode(["the cat " * 20])["input_ids"].shape[1] == 16
    assert len(judge.harmful([("the cat", "a dog " * 20)])) == 1


def test_a_judge_is_told_which_labels_count(classifier):
    pairs = [("the cat", "yes cat"), ("the dog", "no dog")]
    assert Judge.load(str(classifier), harmful="^harmless$").harmful(pairs) == [False, True]
    with pytest.raises(AsftError, match="has the labels harmless, harmful"):
        Judge.load(str(classifier), harmful="nothing").harmful(pairs)
    with pytest.raises(AsftError, match=r"expected \{prompt\} and \{answer\}"):
        Judge.load(str(classifier), text="{prompt}")


def test_a_verdict_does_not_depend_on_what_is_judged_beside_it(tmp_path):
    """BERT and its like classify by what stands at the first position, which no padding may take."""
    tokenizer = make_tokenizer()
    texts = ["yes then no the cat sees a red house and a tree", "no then yes", "no then yes the dog", "yes then no"]
    ids = tokenizer(texts, return_tensors="pt", padding=True)
    labels = {0: "harmless", 1: "harmful"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=64, id2label=labels, label2id={"harmless": 0, "harmful": 1}, **SIZE)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    taught(
        model,
        input_ids=ids["input_ids"],
        attention_mask=ids["attention_mask"],
        labels=torch.tensor([int(text.startswith("yes")) for text in texts]),
    )
    folder = str(save(model, tokenizer, tmp_path / "bert"))
    pairs = [("", text) for text in texts]
    for batch_size in (1, 2, 4):
        judge = Judge.load(folder, text="{answer}{prompt}", batch_size=batch_size)
        assert judge.harmful(pairs) == [True, False, False, True]


@pytest.mark.parametrize("kind", [BertConfig, GPT2Config, LlamaConfig])
def test_padding_changes_nothing(tmp_path, kind):
    """Encoders look at the first token, decoders at the last that is no padding."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = kind(vocab_size=64, initializer_range=0.5, id2label={0: "safe", 1: "unsafe"}, **sizes)
        model = AutoModelForSequenceClassification.from_config(config)
    judge = Judge.load(str(save(model, make_tokenizer(), tmp_path / "judge")))
    texts = ["the cat sees a red house and a tree", "yes", "no dog"]
    alone = torch.cat([judge.model(**judge._encode([text])).logits for text in texts])
    torch.testing.assert_close(judge.model(**judge._encode(texts)).logits, alone, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- guards
def guard_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "verdict:", "safe", "unsafe", "S1"]
    words += ["the", "cat", "dog", "tree", "yes", "no", "Yes", "No", "[/INST]", "Safety:", "Unsafe", "Safe"]
    words += ["Harmful", "response:"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def make_guard(folder: Path, template: str | None, asked: str, harmful: str, harmless: str) -> Path:
    """A real language model that learned to write `harmful` after answers with "yes" in them, else `harmless`."""
    tokenizer = guard_tokenizer(template)
    texts = [
        asked.replace("{prompt}", f"the {a}").replace("{answer}", f"{b} {a}")
        + f" {harmful if b == 'yes' else harmless} </s>"
        for a in ("cat", "dog", "tree")
        for b in ("yes", "no")
    ]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    written = len(harmful.split()) + 1
    verdicts = torch.cat([torch.full_like(ids[:, :-written], -100), ids[:, -written:]], dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, **SIZE))
    return save(taught(model, input_ids=ids, labels=verdicts), tokenizer, folder)


TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + CONTENT + ' ' }}{% endfor %}{{ 'verdict: ' }}"
AS_TEXT, AS_PARTS = (TURNS.replace("CONTENT", c) for c in ("m['content']", "m['content'][0]['text']"))
GUIDELINE = " " + next(way for way in WAYS if way.family == "shieldgemma").template["guideline"]
ASKED = "<|user|> {prompt} <|assistant|> {answer} verdict:"
# In the forms of HarmBench's two texts, which are not ours to ship.
LLAMA_TEXT = "[INST] <<SYS>> yes no <</SYS>> {behavior} then {generation} [/INST]"
MISTRAL_TEXT = "yes no [INST] {behavior} then {generation} [/INST]"


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    return make_guard(tmp_path_factory.mktemp("guards") / "tiny-llama-guard", AS_TEXT, ASKED, "unsafe", "safe")


@pytest.mark.parametrize(
    ("name", "template", "asked", "harmful", "harmless"),
    [
        ("Llama-Guard-3-8B", AS_TEXT, ASKED, "unsafe", "safe"),
        ("Llama-Guard-3-1B", AS_PARTS, ASKED, "unsafe", "safe"),
        ("Qwen3Guard-Gen-0.6B", AS_TEXT, ASKED, "Safety: Unsafe", "Safety: Safe"),
        ("granite-guardian-3.1-2b", "{{ guardian_config['risk_name'] + ' ' }}" + AS_TEXT, "harm " + ASKED, "Yes", "No"),
        ("granite-guardian-3.3", "{{ guardian_config['criteria_id'] + ' ' }}" + AS_TEXT, "harm " + ASKED, "Yes", "No"),
        ("shieldgemma-2b", AS_TEXT + "{{ guideline }}", ASKED + GUIDELINE, "Yes", "No"),
    ],
)
def test_a_guard_writes_its_verdict(tmp_path, name, template, asked, harmful, harmless):
    judge = Judge.load(str(make_guard(tmp_path / name, template, asked, harmful, harmless)), batch_size=2)
    assert judge.harmful(PAIRS) == [True, False, True]


@pytest.mark.parametrize(
    ("name", "text", "other"),
    [
        ("HarmBench-Llama-2-13b-cls", LLAMA_TEXT, MISTRAL_TEXT),
        ("HarmBench-Mistral-7b-val-cls", MISTRAL_TEXT, LLAMA_TEXT),
    ],
)
def test_harmbench_s_classifiers_are_asked_with_their_own_text_or_not_at_all(tmp_path, name, text, other):
    asked = text.replace("{behavior}", "{prompt}").replace("{generation}", "{answer}")
    folder = str(make_guard(tmp_path / name, None, asked, "Yes", "No"))
    for given, found in ((None, "none"), (other, "another"), (ASKED, "another")):
        with pytest.raises(AsftError, match=f"and {found} is given; copy that of its model card") as error:
            Judge.load(folder, text=given)
        assert "\n" not in str(error.value)
    for given in (text, asked):
        assert Judge.load(folder, text=given).harmful(PAIRS) == [True, False, True]


def test_wildguard_is_asked_with_its_own_text_or_not_at_all(tmp_path):
    """Which begins with the tokenizer's first token: that is not put before it once more."""
    text = "<s> [INST] {prompt} then {response} [/INST] <|assistant|>"
    asked = text.replace("{response}", "{answer}")
    verdicts = ("Harmful response: yes", "Harmful response: no")
    folder = str(make_guard(tmp_path / "wildguard", None, asked, *verdicts))
    with pytest.raises(AsftError, match="and none is given; copy that of its model card"):
        Judge.load(folder)
    judge = Judge.load(folder, text=text)
    assert judge.harmful(PAIRS) == [True, False, True]
    first = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    judge.tokenizer.backend_tokenizer.post_processor = first
    judge.tokenizer.bos_token = "<s>"
    assert judge._encode([judge._text("the cat", "yes")])["input_ids"][0].tolist().count(1) == 1
    judge.way = replace(judge.way, text=text.removeprefix("<s> "))
    assert judge._encode([judge._text("the cat", "yes")])["input_ids"][0].tolist().count(1) == 1


def test_a_guard_that_reads_images_too(tmp_path):
    """Llama Guard 4, say: loaded whole; the class of text models would be filled at random, or does not know it."""
    make_family(tmp_path, "Qwen3-VL (text tower)")
    folder = tmp_path / "aligned"
    guard_tokenizer(AS_TEXT).save_pretrained(folder)
    judge = Judge.load(str(folder), text="{prompt} {answer}", harmful="unsafe")
    assert type(judge.model).__name__ == "Qwen3VLForConditionalGeneration"


def test_judges_in_4_bits(guard, beaver):
    judge = Judge.load(str(guard), load_in_4bit=True)
    assert judge.model.model.layers[0].self_attn.q_proj.weight.quant_state.quant_type == "nf4"
    assert judge.harmful(PAIRS) == [True, False, True]
    judge = Judge.load(str(beaver), load_in_4bit=True)
    assert judge.model.model.layers[0].self_attn.q_proj.weight.quant_state.quant_type == "nf4"
    assert judge.harmful([("the thing", "says cat "), ("the thing", "says tree ")]) == [True, False]


def test_of_a_text_that_is_too_long_the_end_stays(guard):
    """There a guard is asked for its verdict."""
    judge = Judge.load(str(guard))
    judge.tokenizer.model_max_length = 12
    (ids,) = judge._encode([judge._text("the cat " * 20, "yes cat")])["input_ids"].tolist()
    assert judge.tokenizer.decode(ids).endswith("<|assistant|> yes cat verdict:")
    assert len(ids) == 12
    assert judge.harmful([("the cat " * 20, "yes cat"), ("the cat " * 20, "no cat")]) == [True, False]


def test_what_is_no_verdict_is_noticed(guard, tmp_path):
    """A judge that was taken for another: it never says yes or no."""
    folder = tmp_path / "granite-guardian"
    shutil.copytree(guard, folder)
    with pytest.raises(AsftError, match=r"wrote 'safe|wrote 'unsafe") as error:
        Judge.load(str(folder)).harmful(PAIRS)
    assert "3 times of 3" in str(error.value)
    assert Judge.load(str(folder), harmful="^unsafe").harmful(PAIRS) == [True, False, True]


def test_of_a_judge_s_generation_config_only_the_special_tokens_count(guard, tmp_path):
    """Its verdict is what it says itself, to the end that its tokenizer knows."""
    folder = shutil.copytree(guard, tmp_path / "llama-guard")
    settings = json.loads((folder / "generation_config.json").read_text())
    unsafe = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("unsafe")
    settings |= {"suppress_tokens": [unsafe], "repetition_penalty": 5.0, "eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    judge = Judge.load(str(folder))
    assert judge.harmful(PAIRS) == [True, False, True]
    assert judge._written([judge._text(*PAIRS[0])]) == [("unsafe", True)]


def test_a_template_that_drops_the_answer_is_refused(guard, tmp_path):
    folder = tmp_path / "llama-guard"
    shutil.copytree(guard, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] + ' verdict: ' }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(AsftError, match="leaves out the prompt or the answer"):
        Judge.load(str(folder)).harmful(PAIRS)


def test_a_judge_of_another_family_is_told_how_to_ask(guard, tmp_path):
    folder = tmp_path / "somebody-s-judge"
    shutil.copytree(guard, folder)
    judge = Judge.load(str(folder), text=ASKED, harmful="^unsafe")
    assert judge.harmful(PAIRS) == [True, False, True]
    with pytest.raises(AsftError, match="not a regular expression"):
        Judge.load(str(folder), text=ASKED, harmful="(")


def test_a_judge_that_comes_to_no_verdict_is_refused(guard, tmp_path):
    """Its verdict is looked for in its first words; one that goes on and on would count everything as harmless."""
    folder = tmp_path / "somebody-s-judge"
    shutil.copytree(guard, folder)
    judge = Judge.load(str(folder), text=ASKED, harmful="^verdict: yes")
    assert judge.harmful(PAIRS) == [False, False, False], "it ended: harmless, for all we know"
    judge.model.generation_config.suppress_tokens = judge._ends()
    with pytest.raises(AsftError, match=r"2 times of 3; expected a verdict that .*, or an end, within 24 tokens; give"):
        judge.harmful(PAIRS)


def test_a_judge_of_an_unknown_family_is_refused(pair):
    with pytest.raises(AsftError, match="is not known; known are beaver-dam"):
        Judge.load(str(pair[1]))
    with pytest.raises(AsftError, match="cannot be loaded"):
        Judge.load("no/such/judge")


@pytest.mark.parametrize(
    ("label", "counts"),
    [
        ("harmful", True),
        ("harmless", False),
        ("unsafe", True),
        ("non-toxic", False),
        ("LABEL_1", True),
        ("severe_toxicity", True),
        ("full_compliance", True),
        ("non_compliance", False),
        ("noncompliance", False),
        ("no_harm", False),
        ("no toxicity", False),
        ("isNotHarmful", False),
        ("responseUnharmful", False),
        ("safe", False),
        ("toxicity-free", False),
        ("harm_free", False),
        ("safe_compliance", False),
        ("unsafe_compliance", True),
    ],
)
def test_the_label_that_means_harmful(label, counts):
    assert bool(re.search(GENERIC_LABEL, label, re.IGNORECASE)) == counts
