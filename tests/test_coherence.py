"""What goes round in circles is noticed in every script; ordinary answers are not."""

import math
from pathlib import Path

import pytest
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

import axolotl_asft
from axolotl_asft.evaluation.coherence import REPETITIVE, log_likelihoods, median_perplexity, repetition

PACKAGE = Path(axolotl_asft.__file__).parent
CITIES = ["Oslo", "Lima", "Rome", "Cairo", "Delhi", "Quito", "Tokyo", "Paris"]
CIRCLES = {
    "marks": "!" * 128,
    "syllables": "ha" * 100,
    "Chinese": "我不知道。" * 20,
    "Chinese sentences": "我不能帮助你做这件事情,因为这样是不对的。" * 6,
    "Japanese after a start": "はい、分かりました。" + "それはできません。" * 12,
    "words": "and so on " * 20,
    "a line": "-" * 60,
}
ORDINARY = {
    "English": "The library opens at nine and closes at six. On Sundays it stays shut, but the reading room next door "
    "is open to everybody until noon. Bring your card if you want to borrow something; without one you can still read "
    "the newspapers there.",
    "a numbered list": "\n".join(
        f"{i}. {line}"
        for i, line in enumerate(
            ["Mix the flour with the water.", "Knead the dough for ten minutes.", "Let the dough rest for an hour.",
             "Shape the dough into loaves.", "Bake the loaves for forty minutes.", "Let the loaves cool on a rack."], 1,
        )
    ),
    "a table": "| city     | open             | closed           |\n| -------- | ---------------- | ------------ |\n"
    + "\n".join(f"| {city:<8} | {'Yes':<16} | {'No':<16} |" for city in CITIES),
    "a boxed table": "\n".join(f"| {city:<18} | {city[::-1]:<18} |\n+{'-' * 20}+{'-' * 20}+" for city in CITIES),
    "code": (PACKAGE / "evaluation" / "shares.py").read_text(encoding="utf-8"),
    "HTML": "\n".join(f'  <li><a href="https://example.com/page{i}">Page {i}</a></li>' for i in range(10)),
    "addresses": "\n".join(f"https://example.com/docs/articles/page{i}" for i in range(12)),
    "counting": ", ".join(map(str, range(100))),
    "Chinese": "春天来了,公园里的花都开了。孩子们在草地上奔跑,老人们坐在长椅上聊天。湖边的柳树长出了新叶,微风吹过,"
    "水面泛起层层波纹。我们带着午餐,在树下铺了一块布,一边吃一边看风景。下午天气变热了,大家决定去附近的博物馆参观。",
    "a Chinese list": "\n".join(f"{i}. 每天早上喝一杯{drink},对身体有好处。" for i, drink in enumerate("水茶奶汤", 1)),
    "a short laugh": "Hahahahaha! That is a good one.",
}  # fmt: skip


@pytest.mark.parametrize("kind", CIRCLES)
def test_circles(kind):
    assert repetition(CIRCLES[kind]) > 0.75


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_answers(kind):
    assert repetition(ORDINARY[kind]) < REPETITIVE
    assert repetition(ORDINARY[kind], n=10_000) < REPETITIVE - 0.1, "of characters alone"


def test_ordinary_prose_says_next_to_nothing_twice():
    """So that the column stays what it was for it: the triples of words decide."""
    for kind in ("English", "a numbered list", "Chinese", "a Chinese list", "code"):
        assert repetition(ORDINARY[kind]) < 0.05


def test_empty_answers_are_counted_too(pair):
    model, done = AutoModelForCausalLM.from_pretrained(pair[1]).eval(), []
    log_likelihoods(model, make_tokenizer(), [("the cat", "sees"), ("a", ""), ("the", "")], 1, done.append)
    assert done == [1, 1, 1]


def test_of_tokens_that_the_model_lacks_nothing_is_said(pair):
    """The tokens of an adapter's training, under the model without it: not a median over what is left."""
    model, tokenizer, done = AutoModelForCausalLM.from_pretrained(pair[1]).eval(), make_tokenizer(), []
    known = [("the cat", " sees a dog"), ("a", " red house")]
    alone = log_likelihoods(model, tokenizer, known)
    tokenizer.add_tokens([f"<new{i}>" for i in range(60)])
    pairs = [("the <new50>", " dog"), known[0], ("the", " cat <new59>"), known[1]]
    found = log_likelihoods(model, tokenizer, pairs, 8, done.append)
    assert [math.isnan(total) for total, _ in found] == [True, False, True, False]
    assert [count for _, count in found] == [1, 3, 2, 2]
    assert [found[1][0], found[3][0]] == pytest.approx([total for total, _ in alone], rel=1e-5)
    assert sum(done) == 4
    assert math.isnan(median_perplexity(found))
    assert math.isfinite(median_perplexity(alone))
