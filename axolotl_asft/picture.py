"""What our pictures have in common: letters, colours, and how one becomes a file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from axolotl_asft.files import atomic_write

INK, GREY, LINE, GRID = "#222b38", "#5c677d", "#c8ced8", "#e8ebf0"
TEAL, RED = "#00798c", "#d1495b"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], letters: int = 10, dpi: int = 150, **how: Any) -> Iterator[Figure]:
    """A white figure to draw on, in inches; written as a PNG when it is done."""
    with matplotlib.rc_context(STYLE | {"font.size": letters}):
        figure = Figure(figsize=size, facecolor="white", **how)
        yield figure
        atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))


def plain(axes: Axes, grid: Any = "y") -> None:
    """Two sides instead of a box, and a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, zorder=0)
