"""The basin as a picture: refusals and task loss over the radius, a line for each kind of step."""

import statistics
from pathlib import Path

from axolotl_asft.evaluation.basin import FAITHFUL, KIND_WORDS, KINDS, Point, bent_radii
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.picture import GREY, RED, TEAL, picture, plain

COLOURS = {"along": TEAL, "against": GREY, "inside": "#edae49", "orthogonal": RED}


def draw_landscape(points: list[Point], path: Path, title: str) -> None:
    """Write a PNG: log-probability of refusals (and harmfulness, where it was measured) and task loss.

    Bands are the 95 % interval of a share, and the range over seeds of the rest. Radii that are left out of the verdict
    are hollow.
    """
    panels = [("log p of refusals, nats a token", "refusal"), ("task loss, nats a token", "task_loss")]
    if any(point.harmfulness is not None for point in points):
        panels.insert(1, ("harmful prompts not refused", "harmfulness"))
    with picture(path, (4.6 * len(panels), 4.8), letters=11) as figure:
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.26, top=0.84, wspace=0.26)
        for number, (label, field) in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), number)
            for kind in KINDS:
                _line(axes, points, kind, field)
            axes.set_title(label, loc="left", fontsize=11)
            axes.set_xlabel("radius, in units of ||d|| of each layer")
            plain(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=10)
        if bent_radii(points):
            figure.text(0.98, 0.94, f"hollow: bent by rounding, cosine under {FAITHFUL:g}", ha="right", fontsize=9)
        figure.suptitle(title, x=0.07, ha="left", fontsize=13, weight="bold")


def _line(axes, points: list[Point], kind: str, field: str) -> None:
    found: dict[float, tuple[float, float, float]] = {}
    for radius in sorted({point.radius for point in points if point.kind in (kind, "aligned")}):
        group = [point for point in points if point.radius == radius and point.kind in (kind, "aligned")]
        values = [value for point in group if point.finite and (value := getattr(point, field)) is not None]
        if values:
            found[radius] = _middle_and_band(values)
    radii, middle = list(found), [value for value, _, _ in found.values()]
    axes.plot(radii, middle, "o-", color=COLOURS[kind], label=KIND_WORDS[kind], linewidth=2, markersize=4, zorder=3)
    bent = bent_radii(points)
    hollow = [(radius, value) for radius, value in zip(radii, middle, strict=True) if radius in bent]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), "o", color=COLOURS[kind], markerfacecolor="white", markersize=4, zorder=4)
    low, high = [value for _, value, _ in found.values()], [value for _, _, value in found.values()]
    axes.fill_between(radii, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)


def _middle_and_band(values: list[float] | list[Share]) -> tuple[float, float, float]:
    shares = [value for value in values if isinstance(value, Share)]
    if shares:
        share = Share.over_repeats(shares)
        return share.value, share.low, share.high
    numbers = [value for value in values if not isinstance(value, Share)]
    return statistics.fmean(numbers), min(numbers), max(numbers)
