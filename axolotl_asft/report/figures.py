"""The report's charts, each drawn on matplotlib axes: small panels that stand alone in the page or side by side."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.ticker import MaxNLocator

from axolotl_asft.picture import GREY, INK, LINE, RED, TEAL, plain
from axolotl_asft.report.findings import curve_title, has_free_directions, measured_otherwise
from axolotl_asft.report.grid import Grid
from axolotl_asft.report.runs import Run
from axolotl_asft.report.spectrum import Spectrum

SERIES = (TEAL, RED, "#b7791f", "#6b5b95", "#4b7f52")  # this run, and those it is compared with
HEAT = LinearSegmentedColormap.from_list("asft", ["#f1efe8", "#eda14f", "#8c1d40"]).with_extremes(bad="#ffffff")
SPREAD = 0.5  # colours follow the square root: most layers move far less than the furthest
SMOOTHED_FROM = 60  # points; fewer are drawn as they are


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: its finding.
        note: what the axes say.
        draw: draws it.
    """

    title: str
    note: str
    draw: Callable[[Axes], None]


def training_panels(runs: Sequence[Run]) -> list[Panel]:
    """Loss, penalty, distance, direction and size of the update over the steps; the first run is the report's."""
    run = runs[0]
    wanted = [
        ("loss", "loss of the task, by step"),
        ("asft/penalty", "lambda_reg P, by step"),
        ("asft/anchor_kl", "from the aligned model's own answers, nats per token, by step"),
        ("asft/max_drift", "in units of what alignment moved it, by step"),
        ("asft/update_norm", "‖dW‖ over all layers, by step"),
        ("asft/drift", "‖(I - C) dW‖ / ‖dW‖ over all layers, by step"),
        ("learning_rate", "by step"),
    ]
    coloured = list(zip(runs, SERIES * len(runs), strict=False))
    alike = [(other, colour) for other, colour in coloured if not measured_otherwise(run, other)]
    panels = {}
    for key, note in wanted:
        if key == "asft/drift" and not has_free_directions(run):
            continue
        shown = alike if key in ("asft/drift", "asft/max_drift") else coloured
        if any(any(other.curve(key)[1]) for other, _ in shown):
            limit = run.constraint.get("max_drift") if key == "asft/max_drift" else None
            panels[key] = Panel(curve_title(run, key), note, partial(_curves, runs=shown, key=key, limit=limit))
    if len(panels) % 2:
        panels.pop("learning_rate", None)
    return list(panels.values())


def spectrum_panels(run: Run) -> list[Panel]:
    """A panel for each kind of module: the singular values of its updates, and their part in the aligned subspace."""
    names = in_order(run)
    grid = Grid.of(names)
    groups: dict[int, list[Spectrum]] = {}
    for name, (row, _) in zip(names, grid.places, strict=True):
        if any(run.spectra[name].values):
            groups.setdefault(row, []).append(run.spectra[name])
    if not groups:
        return []
    top = max(max(s.values) for group in groups.values() for s in group)
    smallest = [value for group in groups.values() for s in group for value in _aligned(s) if value > 0]
    bottom = max(min(smallest, default=top / 1e3), top / 1e5)
    limits = bottom / 1.6, top * 1.6
    return [
        Panel(grid.kinds[row], f"{len(group)} layers", partial(_spectra, group=group, limits=limits))
        for row, group in sorted(groups.items())
    ]


def in_order(run: Run) -> list[str]:
    """The layers that have a spectrum, in the order of the model."""
    order = {name: i for i, name in enumerate(run.layers)}
    return sorted(run.spectra, key=lambda name: order.get(name, len(order)))


def heat_map(axes: Axes, grid: Grid, values: Sequence[float | None], highest: float, labels: bool = True):
    """Kinds of module against layers, coloured from 0 to `highest`; returns what a colour bar needs."""
    image = axes.imshow(grid.fill(values), aspect="auto", cmap=HEAT, norm=PowerNorm(SPREAD, 0, highest or 1.0))
    axes.set_yticks(range(len(grid.kinds)), grid.kinds if labels else [""] * len(grid.kinds), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(min(10 if labels else 5, len(grid.layers)), integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: str(grid.layers[int(x)]) if 0 <= int(x) < len(grid.layers) else "")
    axes.set_xlim(-0.5, len(grid.layers) - 0.5)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return image


def _curves(axes: Axes, runs: list[tuple[Run, str]], key: str, limit: float | None) -> None:
    for run, colour in reversed(runs):
        steps, values = run.curve(key)
        if not values:
            continue
        if len(values) >= SMOOTHED_FROM and key == "loss":
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35, zorder=2)
            values = _smoothed(values)
        few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(values) < 15 else {}
        axes.plot(steps, values, color=colour, linewidth=1.8, zorder=3, label=run.name, **few)
        if key == "loss":
            evaluated = run.curve("eval_loss")
            axes.plot(*evaluated, "D", color=colour, markersize=4, markerfacecolor="none", zorder=4)
    if isinstance(limit, int | float):
        axes.axhline(limit, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate("budget", (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    if key != "loss":
        axes.set_ylim(bottom=0)
    if key == "asft/drift":
        axes.set_ylim(0, 1.05)
    _plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _spectra(axes: Axes, group: list[Spectrum], limits: tuple[float, float]) -> None:
    _band(axes, [s.values for s in group], SERIES[0])
    if all(s.inside for s in group):
        _band(axes, [_aligned(s) for s in group], SERIES[1])
        by_chance = [[value * math.sqrt(s.chance) for value in s.values] for s in group]
        ranks, middle, _, _ = _over_layers(by_chance)
        axes.plot(ranks, middle, color=GREY, linewidth=1.1, linestyle=(0, (1, 2)), zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    _plain(axes)
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _aligned(spectrum: Spectrum) -> list[float]:
    """s_i ||U^T u_i||: the part of each singular value inside the aligned subspace."""
    if not spectrum.inside:
        return spectrum.values
    return [value * math.sqrt(part) for value, part in zip(spectrum.values, spectrum.inside, strict=True)]


def _band(axes: Axes, curves: list[list[float]], colour: str) -> None:
    ranks, middle, low, high = _over_layers(curves)
    axes.fill_between(ranks, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    axes.plot(ranks, middle, color=colour, linewidth=1.8, zorder=3)


def _over_layers(curves: list[list[float]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Index, median, least and greatest of the layers' i-th values, where there are any above 0."""
    ranks, middle, low, high = [], [], [], []
    for i in range(max(map(len, curves))):
        values = [curve[i] for curve in curves if i < len(curve) and curve[i] > 0]
        if values:
            ranks.append(i + 1)
            middle.append(statistics.median(values))
            low.append(min(values))
            high.append(max(values))
    return ranks, middle, low, high


def _smoothed(values: list[float]) -> list[float]:
    """An exponential moving average over about a thirtieth of the run, without its start-up bias."""
    keep = 1 - 1 / max(2.0, len(values) / 30)
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _plain(axes: Axes) -> None:
    plain(axes)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(length=0, colors=GREY)
    axes.margins(x=0.02)
