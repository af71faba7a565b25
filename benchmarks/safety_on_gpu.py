"""The safety benchmark's runs in QLoRA on a GPU, beside the same in LoRA on rounded weights where there are such."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmarks.safety_names import ON_GPU
from benchmarks.safety_shares import short

if TYPE_CHECKING:
    from benchmarks.safety_table import Cell

SECTION = """## In QLoRA on a GPU

Runs of the same aligned model, trained as QLoRA is on a GPU: on 4-bit weights, in bf16. Metric and own answers
were taken anew there. harmful / refused / right, in % (seeds).
"""
COLUMNS = ("task", "poison", "method", "LoRA on NF4-rounded weights, in fp32", "QLoRA, in bf16 on a GPU")


def on_gpu_section(groups: Mapping[tuple[str, float], Mapping[str, "Cell"]]) -> str:
    """A row for each method of a task and a share of poison that was run there."""
    rows = [
        (task, f"{poison:.0%}", on_a_cpu, short(cells[on_a_cpu]) if on_a_cpu in cells else "", short(found))
        for (task, poison), cells in groups.items()
        for name, found in cells.items()
        if name.endswith(ON_GPU) and (on_a_cpu := name.removesuffix(ON_GPU))
    ]
    lines = [SECTION, f"| {' | '.join(COLUMNS)} |", "| --- | ---: | --- | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
