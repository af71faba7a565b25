"""Charts as files and as text: PNGs to send around, SVGs that take the page's colours."""

import io
import re
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from axolotl_asft.picture import GREY, GRID, INK, LINE, STYLE, picture
from axolotl_asft.report.figures import SERIES, Panel, heat_map, spectrum_panels, training_panels
from axolotl_asft.report.findings import headline, heat_title, spectrum_title
from axolotl_asft.report.grid import Grid
from axolotl_asft.report.runs import Run

_VARIABLES = {INK: "--ink", GREY: "--muted", LINE: "--line", GRID: "--grid"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}
_ID = re.compile(r' id="[a-zA-Z0-9_.]+_\d+"')
_FONT = re.compile(r"font: ([0-9.]+px) [^;\"]*")
_FAMILY = re.compile(r" ?font-family: [^;\"]*;?")


def panel_svg(panel: Panel, name: str, size: tuple[float, float]) -> str:
    """The panel without its title, as an <svg> whose colours and font are the page's.

    Args:
        name: of its own in the page, for the ids inside.
        size: in inches at the size of its letters.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0.56 / size[0], 0.28 / size[1], 1 - 0.63 / size[0], 1 - 0.4 / size[1]))
        axes.patch.set_alpha(0)
        panel.draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = _FAMILY.sub("", _FONT.sub(r"font-size: \1", _ID.sub("", text[text.index("<svg") :])))
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)


def training_png(runs: list[Run], path: Path) -> None:
    """Loss, penalty and the update over the steps."""
    _panels_png(training_panels(runs), headline(runs[0]), runs if len(runs) > 1 else [], path)


def spectrum_png(run: Run, path: Path) -> None:
    """The singular values by kind of module."""
    panels = spectrum_panels(run)
    title = (
        f"{spectrum_title(run)}\nteal: singular values of dW; red: their part in the aligned subspace; dotted: chance"
    )
    _panels_png(panels, title, [], path)


def heat_png(run: Run, path: Path) -> None:
    """Relative drift by layer and kind of module: at the end, and at four earlier times."""
    snapshots, grid = run.snapshots, Grid.of(run.layers)
    values = [line["layers"]["relative"] for line in snapshots]
    highest = max((value for line in values for value in line if value is not None), default=1.0)
    height = 0.24 * min(len(grid.kinds), 40)
    earlier = [round(i * (len(snapshots) - 1) / 4) for i in range(4)] if len(snapshots) > 4 else []
    size = 9.5, 2.2 + height * (1.7 if earlier else 1)
    with picture(path, size, layout="constrained") as figure:
        rows = figure.add_gridspec(
            2 if earlier else 1, max(1, len(earlier)), height_ratios=[1.5, 1][: 2 if earlier else 1]
        )
        axes = figure.add_subplot(rows[0, :])
        image = heat_map(axes, grid, values[-1], highest)
        axes.set_title(f"at the end, step {snapshots[-1]['step']}", loc="left", fontsize=10)
        axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, label="1 is what alignment moved")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        for column, i in enumerate(earlier):
            small = figure.add_subplot(rows[1, column])
            heat_map(small, grid, values[i], highest, labels=False)
            small.set_title(f"step {snapshots[i]['step']}", loc="left", fontsize=10)
        figure.suptitle(heat_title(run), x=0.01, ha="left", fontsize=13, weight="bold", parse_math=False)


def _panels_png(panels: list[Panel], title: str, legend: list[Run], path: Path) -> None:
    """The panels in rows under a title; a legend of the runs where there are several."""
    columns = 2 if len(panels) <= 6 else 4
    rows = -(-len(panels) // columns)
    width, height = 4.9 * columns, 3.0 * rows + 0.9
    heading, _, rest = title.partition("\n")
    with picture(path, (width, height), dpi=130) as figure:
        figure.subplots_adjust(0.5 / width, 0.45 / height, 1 - 0.2 / width, 1 - 1.35 / height, 0.18, 0.5)
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, number)
            panel.draw(axes)
            title = textwrap.fill(panel.title, 52)
            axes.set_title(title, loc="left", fontsize=10, weight="bold", pad=18, parse_math=False)
            axes.text(0, 1.03, panel.note, transform=axes.transAxes, color=GREY, fontsize=9, parse_math=False)
        x, y = 0.2 / width, 1 - 0.2 / height
        figure.suptitle(heading, x=x, y=y, va="top", ha="left", fontsize=14, weight="bold", parse_math=False)
        if rest:
            figure.text(0.2 / width, 0.12 / height, rest, fontsize=9, color=GREY, parse_math=False)
        if legend:
            handles = [Line2D([], [], color=SERIES[i % len(SERIES)], linewidth=3) for i in range(len(legend))]
            names = [run.name.replace("$", r"\$") for run in legend]
            place = 0.12 / width, 1 - 0.45 / height
            figure.legend(handles, names, ncols=len(legend), frameon=False, loc="upper left", bbox_to_anchor=place)
