"""Prompts in, what holds a run out: the aligned model is asked for harm, its layers are watched, its answers kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from axolotl_asft.checkpoint import DECODER_LAYER
from axolotl_asft.console import Stage, quieten_libraries, silent
from axolotl_asft.errors import AsftError
from axolotl_asft.evaluation.asking import BORDERLINE_TASK, HARMFUL_TASK, Answer, Interviewer
from axolotl_asft.evaluation.models import load_model, load_tokenizer, within_memory
from axolotl_asft.evaluation.refusals import is_refusal
from axolotl_asft.metrics import (
    DEFAULT_METRIC_ENERGY,
    DEFAULT_METRIC_RANK,
    JUDGED_WORDS,
    OWN_WORDS,
    ModelMetric,
    activation_metric,
    fisher_metric,
)
from axolotl_asft.packing import never_packed
from axolotl_asft.spec import METRICS, MOST_TEXT
from axolotl_asft.tokens import first_words

LOG = logging.getLogger("axolotl.asft")

FEW_REFUSALS = 8
OVER_REFUSING = 0.25  # above this share of harmless prompts that are declined, an anchor holds what nobody wants
KEPT = 128  # answers of either kind at most, to be asked for during training; few of them stand badly for the others


@dataclass(frozen=True)
class AskedModel:
    """What was learnt from the aligned model's own answers.

    Attributes:
        metrics: of every linear layer, for the penalty.
        own_answers: (request as the model reads it, first words of its answer), refusals and harmless ones in turns.
    """

    metrics: list[ModelMetric]
    own_answers: list[tuple[str, str]]


def safety_metrics(
    model: str,
    names: Sequence[str] = METRICS,
    prompts: str | Sequence[str] = "harmful",
    harmless: str | None = "borderline",
    rank: int = DEFAULT_METRIC_RANK,
    energy: float = DEFAULT_METRIC_ENERGY,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    device: str | None = None,
    batch_size: int = 8,
    stage: Stage = silent,
) -> AskedModel:
    """The metrics of every linear layer over prompts that ask for harm and the first words of the model's own answers.

    Of the shipped prompts the `train` split is used: the held-out ones stay fit for evaluation. The Fisher metric looks
    at the answers that are refusals alone: they are what is to be kept. Some of them are kept as they are too, and as
    many answers to harmless prompts: an anchor on refusals alone would make the model refuse what it should not. A
    warning tells of a model that declines many of these.

    Args:
        model: folder or Hub id of the aligned chat model.
        names: "activations", "fisher" or both.
        prompts: a set as `load_prompts` knows them, or several; what they ask for is to be refused.
        harmless: another set, which is to be answered; None: none.
        rank, energy: directions kept a layer and side: the fewest with this share of the trace, at most so many.
        dtype, load_in_4bit, device, batch_size: how the model is loaded and asked.

    Raises:
        AsftError: no such metric, model or prompts; a model that refuses next to nothing.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise AsftError(f"metric is {unknown[0]!r}; expected one of {', '.join(METRICS)}")
    quieten_libraries()
    loaded, tokenizer = load_model(model, dtype, load_in_4bit, device), load_tokenizer(model)
    never_packed(loaded)  # the Fisher metric wants gradients after the answers
    interviewer = Interviewer(loaded, tokenizer, batch_size, JUDGED_WORDS, name="the aligned model", stage=stage)

    def answers_to(task: str, word: str, source: str) -> list[Answer]:
        interviewer.stage = lambda title, total: stage(f"{title} {Path(source).name}", total)
        return interviewer.answers(task, {word: source, "split": "train"})

    answers = [answer for each in sets_of(prompts) for answer in answers_to(HARMFUL_TASK, "prompts", each)]
    turns = [(answer.asked, first_words(tokenizer, answer.answer, OWN_WORDS)) for answer in answers]
    layers, found = linear_layers(loaded), []
    if "activations" in names:
        advance = stage("read its layers' inputs", len(turns))
        with within_memory(batch_size):
            found.append(activation_metric(loaded, tokenizer, turns, layers, rank, energy, batch_size, advance))
    refused = [turn for turn, answer in zip(turns, answers, strict=True) if is_refusal(answer.answer)]
    if "fisher" in names:
        _check_refusals(model, refused, answers)
        advance = stage("weigh what its refusals depend on", len(refused))
        with within_memory(batch_size):
            found.append(fisher_metric(loaded, tokenizer, refused, layers, rank, energy, batch_size, advance=advance))
    if harmless is None:
        return AskedModel(found, _evenly(refused))
    answers = answers_to(BORDERLINE_TASK, "borderline", harmless)
    _tell_over_refusal(model, answers)
    answered = [(answer.asked, first_words(tokenizer, answer.answer, OWN_WORDS)) for answer in answers]
    return AskedModel(found, in_turns(_evenly(refused), _evenly(answered)))


def sets_of(prompts: str | Sequence[str]) -> list[str]:
    """One set, or several, as a list."""
    return [prompts] if isinstance(prompts, str) else list(prompts)


def in_turns(refused: Sequence[tuple[str, str]], answered: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One of either kind after the other; where there are fewer of one, they come again. None without refusals."""
    if not refused or not answered:
        return list(refused)
    pairs = max(len(refused), len(answered))
    return [turn for i in range(pairs) for turn in (refused[i % len(refused)], answered[i % len(answered)])]


def _evenly(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """At most KEPT of them with a text that a file takes, from all over."""
    turns = [turn for turn in turns if turn[1].strip() and max(map(len, turn)) <= MOST_TEXT]
    count = min(KEPT, len(turns))
    return [turns[i * len(turns) // count] for i in range(count)]


def _check_refusals(model: str, refused: Sequence[tuple[str, str]], answers: Sequence[Answer]) -> None:
    if len(refused) < min(FEW_REFUSALS, len(answers)):
        raise AsftError(
            f"{model} refuses {len(refused)} of {len(answers)} prompts that ask for harm, so there are no refusals to "
            "keep; give the aligned chat model, and --prompts that it refuses"
        )


def _tell_over_refusal(model: str, answers: Sequence[Answer]) -> None:
    declined = sum(is_refusal(answer.answer) for answer in answers)
    if declined > OVER_REFUSING * len(answers):
        LOG.warning(
            "%s declines %d of %d harmless prompts (%.0f %%), and anchor_weight would preserve this over-refusal too; "
            "give a model that answers them, or train with anchor_weight: 0",
            model,
            declined,
            len(answers),
            100 * declined / len(answers),
        )


def linear_layers(model: Any) -> list[str]:
    """The linear layers inside numbered decoder layers, as in a direction file, GPT-2's included."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and DECODER_LAYER.search(name)
    ]
