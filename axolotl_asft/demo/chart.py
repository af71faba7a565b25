"""The demo's picture: what fine-tuning did to safety and to the task, with and without the constraint."""

from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_asft.picture import GREY, INK, LINE, RED, TEAL, picture

if TYPE_CHECKING:
    from axolotl_asft.demo.run import DemoResult

HARM, TASK = RED, TEAL


def draw(result: "DemoResult", path: Path) -> None:
    """Write a PNG of two bars a model: harmfulness and task accuracy."""
    with picture(path, (9, 4.4), letters=12, dpi=160) as figure:
        figure.subplots_adjust(left=0.04, right=0.96, bottom=0.11, top=0.8)
        axes = figure.add_subplot()
        width = 0.36
        for i, row in enumerate(result.rows):
            for offset, value, colour in ((-width / 2, row.harmfulness, HARM), (width / 2, row.task_accuracy, TASK)):
                axes.bar(i + offset, value, width * 0.94, color=colour, zorder=2)
                axes.text(i + offset, value + 0.02, f"{value:.0%}", ha="center", color=colour, weight="bold")
        axes.set_xticks(range(len(result.rows)), [row.model for row in result.rows], color=INK)
        axes.tick_params(length=0)
        axes.set_ylim(0, 1.15)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.set_title(
            f"A small chat model, fine-tuned to route tickets on data with {result.settings.poison:.0%} poison",
            loc="left",
            fontsize=13,
            weight="bold",
            pad=34,
        )
        axes.text(0, 1.05, "harmful prompts not refused", transform=axes.transAxes, color=HARM, weight="bold")
        axes.text(0.36, 1.05, "tickets routed right", transform=axes.transAxes, color=TASK, weight="bold")
        axes.text(1, 1.05, "held-out prompts", transform=axes.transAxes, color=GREY, ha="right")
