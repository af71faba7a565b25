"""The safety benchmark over shares of poison: the methods that were run at several, as a table and as lines."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.safety_names import EARLIER, FIRST_TURNS, ON_GPU, colour_of, shown_name

if TYPE_CHECKING:
    from benchmarks.safety_table import Cell

DASHES = ("--", ":")  # of the default's relatives, which have its colour
LEAST = 3  # shares of poison that a method needs to stand here
MEASURES = {
    "harmful": "harmful prompts not refused, %",
    "refused": "harmless prompts refused, %",
    "right": "task right, %",
}
# Of one task: method -> share of poison -> what was found.
Shares = dict[str, dict[float, "Cell"]]


def over_shares(groups: Mapping[tuple[str, float], Mapping[str, "Cell"]], task: str) -> Shares:
    """The methods of `task` that were run at `LEAST` shares of poison or more, on a CPU."""
    found: Shares = {}
    for (name, poison), cells in groups.items():
        if name == task:
            for method, cell in cells.items():
                if not method.endswith(ON_GPU):
                    found.setdefault(method, {})[poison] = cell
    return {method: cells for method, cells in found.items() if len(cells) >= LEAST}


def shares_section(task: str, methods: Shares) -> str:
    """A row a method, a column a share of poison."""
    shares = sorted({share for cells in methods.values() for share in cells})
    lines = [
        f"### {task}\n",
        "| method | " + " | ".join(f"{share:.0%} poison" for share in shares) + " |",
        "| --- |" + " ---: |" * len(shares),
    ]
    for method, cells in methods.items():
        row = [short(cells[share]) if share in cells else "" for share in shares]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def short(cell: "Cell") -> str:
    """harmful / refused / right, in %, and the number of seeds."""
    shares = " / ".join(f"{100 * share:.0f}" for share in (cell.harmful, cell.refused, cell.right))
    return f"{shares} ({cell.seeds})"


def draw_shares(path: Path, tasks: dict[str, Shares], before: dict[str, "Cell"]) -> None:
    """A row of panels a task, one for each measure; the grey line is the aligned model."""
    from axolotl_asft.picture import picture, plain

    tasks = {
        task: {method: cells for method, cells in methods.items() if EARLIER not in method}
        for task, methods in tasks.items()
    }
    every = dict.fromkeys(method for methods in tasks.values() for method in methods)
    like_it = [method for method in every if colour_of(method) == colour_of(FIRST_TURNS) and method != FIRST_TURNS]
    styles = dict(zip(like_it, itertools.cycle(DASHES), strict=False))
    with picture(path, (13, 4 * len(tasks)), dpi=110, layout="constrained") as figure:
        panels = figure.subplots(len(tasks), len(MEASURES), sharex=True, sharey=True, squeeze=False)
        for row, (task, methods) in zip(panels, tasks.items(), strict=True):
            for axes, (measure, label) in zip(row, MEASURES.items(), strict=True):
                for method, cells in methods.items():
                    line = [(100 * share, 100 * getattr(cell, measure)) for share, cell in sorted(cells.items())]
                    width = 3 if method == FIRST_TURNS else 1.5
                    look = {"color": colour_of(method), "linewidth": width, "zorder": 2 + width / 3, "markersize": 5}
                    look["linestyle"] = styles.get(method, "-")
                    axes.plot(*zip(*line, strict=True), marker="o", label=shown_name(method), **look)
                if task in before and measure != "right":
                    axes.axhline(100 * getattr(before[task], measure), color="#adb5bd", linewidth=1, zorder=1)
                axes.set_title(f"{task}: {label}", loc="left", fontsize=10, weight="bold")
                axes.set(ylim=(-4, 104))
                plain(axes, "both")
        for axes in panels[-1]:
            axes.set_xlabel("poison in the training data, %")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2), frameon=False)
