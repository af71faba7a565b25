"""How lm-eval's scores of a task lie: metric -> value, with what is said of a metric under a name beside it."""

from collections.abc import Iterable
from typing import Any

from axolotl_asft.evaluation.shares import Z_95

STDERR, HIGHER_IS_BETTER = "stderr", "higher_is_better"


def beside(metric: str, what: str) -> str:
    """The name under which `STDERR` or `HIGHER_IS_BETTER` of a metric stands.

    `exact_match (strict)` -> `exact_match_stderr (strict)`.
    """
    name, space, filtered = metric.partition(" ")
    return f"{name}_{what}{space}{filtered}"


def metrics_of(names: Iterable[str]) -> list[str]:
    """The metrics themselves, without what stands beside them."""
    return [name for name in names if f"_{STDERR}" not in name and f"_{HIGHER_IS_BETTER}" not in name]


def half_interval(scores: dict[str, Any], metric: str) -> float | None:
    """1.96 standard errors: half of the 95 % interval; None where lm-eval gave no error."""
    error = scores.get(beside(metric, STDERR))
    return Z_95 * error if error else None
