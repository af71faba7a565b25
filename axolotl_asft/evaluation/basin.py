"""What a landscape says: does leaving the alignment direction cost more safety than following it?"""

import math
import statistics
from dataclasses import dataclass

from axolotl_asft.errors import AsftError

KINDS = ("along", "against", "inside", "orthogonal")
KIND_def _verb(outcome: str) -> str:
    """The verb of a verdict."""
    return {
        "borne out": "bears out",
        "refuted": "refutes",
        "undecided": "neither bears out nor refutes, beyond the noise of the random steps and at every radius,",
    }[outcome]


def _costs(points: list[Point], kind: str, radius: float, aligned: Point) -> list[float]:
    return [aligned.refusal - point.refusal for point in points if (point.kind, point.radius) == (kind, radius)]


def _compare(one: dict[float, list[float]], other: dict[float, list[float]]) -> str:
    """Of costs by radius: is the one's mean above the other's at every radius, below, or neither?"""
    gaps = [_mean(one[radius]) - _mean(other[radius]) for radius in one]
    noise = [2 * math.hypot(_spread(one[radius]), _spread(other[radius])) for radius in one]
    if all(gap > bound for gap, bound in zip(gaps, noise, strict=True)):
        return "borne out"
    if all(-gap > bound for gap, bound in zip(gaps, noise, strict=True)):
        return "refuted"
    return "undecided"


def landscape_table(points: list[Point]) -> str:
    """Mean over seeds of every kind and radius, as Markdown."""
    generated = any(point.harmfulness is not None for point in points)
    lines = [
        f"| step | radius | log p of refusals | task loss |{' harmfulness |' if generated else ''}",
        f"| --- | ---: | ---: | ---: |{' ---: |' if generated else ''}",
    ]
    for kind, radius in dict.fromkeys((point.kind, point.radius) for point in points):
        group = [point for point in points if (point.kind, point.radius) == (kind, radius)]
        refusal, spread = _mean([p.refusal for p in group]), _spread([p.refusal for p in group])
        cells = f"| {kind} | {radius:g} | {refusal:.3f}{f' ± {spread:.3f}' if len(group) > 1 else ''} "
        cells += f"| {_mean([p.task_loss for p in group]):.3f} |"
        if generated:
            cells += f" {_mean([p.harmfulness or 0.0 for p in group]):.1%} |"
        lines.append(cells)
    return "\n".join(lines)


_mean = statistics.fmean


def _spread(values: list[float]) -> float:
    """The standard error of the mean; 0 of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
