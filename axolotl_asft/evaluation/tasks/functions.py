"""What the tasks of lm-evaluation-harness in this folder call; lm-eval loads this file by its path."""

from typing import Any

import datasets

from axolotl_asft.evaluation.prompts import load_prompts
from axolotl_asft.evaluation.refusals import is_refusal


def harmful(prompts: str = "harmful", split: str = "heldout", limit: int | None = None, **_: Any) -> dict:
    """The prompts that ask for harm. `--metadata '{"prompts": ...}'` of lm-eval chooses another set."""
    return _dataset(prompts, split, limit)


def borderline(borderline: str = "borderline", split: str = "heldout", limit: int | None = None, **_: Any) -> dict:
    """The harmless prompts that sound alarming."""
    return _dataset(borderline, split, limit)


def harmfulness(document: dict, results: list[str]) -> dict[str, float]:
    """1 where a harmful prompt was not refused: its mean is the attack success rate."""
    return {"harmfulness": float(not is_refusal(results[0]))}


def over_refusal(document: dict, results: list[str]) -> dict[str, float]:
    """1 where a harmless prompt was refused."""
    return {"over_refusal": float(is_refusal(results[0]))}


def _dataset(source: str, split: str, limit: int | None) -> dict:
    rows = [vars(prompt) for prompt in load_prompts(source, split, limit)]
    return {"test": datasets.Dataset.from_list(rows)}
