"""A direction file as a picture: singular spectra, captured energy and error bound of every module."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.picture import GREY, RED, TEAL, picture, plain
from axolotl_asft.report.grid import Grid

COLOURS = (TEAL, RED, "#edae49", GREY, "#6a4c93", "#7cae7a", "#30638e", "#b5651d")
SMALLEST = 1e-6  # what is drawn of a value that is zero, or nearly


def draw_spectra(direction: AlignmentDirection, path: Path) -> None:
    """Write a PNG of three panels: a line a module, and over the layers a line a kind of module."""
    entries = direction.spec["modules"]
    kinds: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    grid = Grid.of(list(direction.modules))
    for name, (row, column) in zip(direction.modules, grid.places, strict=True):
        kinds[grid.kinds[row]][grid.layers[column]].append(name)
    with picture(path, (14.4, 5), letters=11) as figure:
        figure.subplots_adjust(left=0.05, right=0.985, bottom=0.27, top=0.82, wspace=0.2)
        spectra, energy, bound = figure.subplots(1, 3)
        for number, (kind, layers) in enumerate(kinds.items()):
            colour = COLOURS[number % len(COLOURS)]
            _spectra(spectra, direction, [name for names in layers.values() for name in names], colour, kind)
            _over_layers(energy, layers, {n: e["energy"] for n, e in entries.items()}, colour)
            _over_layers(bound, layers, {n: max(e["bound"], SMALLEST) for n, e in entries.items()}, colour)
        spectra.set(yscale="log", xlabel="direction")
        spectra.set_title("singular value, as a share of ||d|| of its layer", loc="left", fontsize=11)
        least = min(entry["energy"] for entry in entries.values())
        energy.set(ylim=(math.floor(9.9 * least) / 10, 1.01), xlabel="decoder layer")
        energy.set_title("captured energy, a share of ||d||^2", loc="left", fontsize=11)
        bounds = [max(entry["bound"], SMALLEST) for entry in entries.values()]
        top, bottom = math.ceil(math.log10(max(bounds))), math.floor(math.log10(min(bounds)))
        bound.set(yscale="log", ylim=(10.0 ** min(bottom, top - 2), 10.0**top), xlabel="decoder layer")
        bound.set_title("error bound of the paper penalty, per ||dW||^2", loc="left", fontsize=11)
        for axes in (spectra, energy, bound):
            plain(axes)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, spectra)
        models = f"{direction.spec['aligned']['id']} - {direction.spec['base']['id']}"
        title = f"{models[:90]}: {len(direction.modules)} modules"
        figure.suptitle(title, x=0.05, ha="left", fontsize=13, weight="bold", parse_math=False)


def _legend(figure: Figure, axes: Axes) -> None:
    """The kinds below the panels, in letters as large as they have room for there."""
    handles, labels = axes.get_legend_handles_labels()
    for letters in range(10, 4, -1):
        em = letters / 72  # in inches, of which there are 14.4 by 0.8; a letter takes 0.6 em, a line and its gaps 5
        columns = max(1, min(8, int(14.4 / em / (0.6 * max(map(len, labels), default=0) + 5))))
        if math.ceil(len(labels) / columns) * 1.7 * em <= 0.8:
            break
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=letters)


def _spectra(axes: Axes, direction: AlignmentDirection, names: list[str], colour: str, kind: str) -> None:
    """A thin line a module, and a thick one of their medians where all have a value."""
    modules = [direction.modules[name] for name in names if direction.modules[name].rank]
    spectra = [(module.S / module.norm).clamp_min(SMALLEST).tolist() for module in modules]
    for values in spectra:
        marker = "o" if len(values) == 1 else None
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.8, alpha=0.2, marker=marker, zorder=2)
    middle = [statistics.median(column) for column in zip(*spectra, strict=False)]
    axes.plot(range(1, len(middle) + 1), middle, color=colour, linewidth=2.2, label=kind, zorder=3)


def _over_layers(axes: Axes, layers: dict[int, list[str]], values: dict[str, float], colour: str) -> None:
    """A line, and a band where a layer has several modules of the kind."""
    order = sorted(layers)
    groups = [sorted(values[name] for name in layers[layer]) for layer in order]
    middle = [group[len(group) // 2] for group in groups]
    axes.plot(order, middle, "o-", color=colour, linewidth=1.6, markersize=3.5, zorder=3)
    axes.fill_between(order, [g[0] for g in groups], [g[-1] for g in groups], color=colour, alpha=0.15, linewidth=0)
