"""What was measured of a model, and the table of it."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axolotl_asft import __version__
from axolotl_asft.evaluation.shares import Share
from axolotl_asft.evaluation.task_scores import half_interval, metrics_of
from axolotl_asft.files import atomic_write_text, short_names, without_nan


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        name: of the row.
        adapter: its folder; None for the model itself.
        adapter_sha256: of the weights that lay there when it was asked.
        harmfulness: set of harmful prompts -> share not refused (the attack success rate).
        over_refusal: set of harmless prompts -> share refused.
        judged: judge -> share of answers to harmful prompts, over all sets, that it calls harmful.
        perplexity: median over answers, under the model without any adapter. NaN of empty ones, and of tokens that the
            model does not have.
        perplexity_answered: the same over those that are no refusals. Babble stands out in it, also where most answers
            are a stock refusal; NaN where all are refusals.
        repetitive: share of answers that go round in circles (`REPETITIVE`).
        empty: share of empty answers.
        tasks: task of lm-eval -> metric -> value, with `metric_stderr` and `metric_higher_is_better` beside it; NaN of
            what was no finite number.
        seconds: of asking, in this call; 0 where all was known.
    """

    name: str
    adapter: str | None
    adapter_sha256: str | None
    harmfulness: dict[str, Share]
    over_refusal: dict[str, Share]
    judged: dict[str, Share]
    perplexity: float
    perplexity_answered: float
    repetitive: Share
    empty: Share
    tasks: dict[str, dict[str, float]]
    seconds: float


def write_results(output: Path, model: str, questions: dict[str, Any], rows: list[Row]) -> None:
    """results.json and results.md in the folder `output`."""
    content = {"model": model, "questions": questions, "rows": [asdict(row) for row in rows], "version": __version__}
    atomic_write_text(output / "results.json", json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")
    asked = f"\nAsked as {questions['prompt_format']!r}.\n" if questions.get("prompt_format") else ""
    atomic_write_text(output / "results.md", table(rows) + "\n" + asked)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, every share and score with its 95 % interval."""
    cells = [_cells(row) for row in rows]
    # not every row need have every score: what an earlier version kept, a task that scored only some
    titles = list(dict.fromkeys(title for line in cells for title in line))
    cells = [{title: line.get(title, "none") for title in titles} for line in cells]
    widths = [max(len(title), *(len(line[title]) for line in cells)) for title in titles]
    lines = [titles, ["-" * width for width in widths], *([line[title] for title in titles] for line in cells)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cells(row: Row) -> dict[str, str]:
    """Column title -> what stands in it."""
    cells = {"model": row.name}
    cells |= {f"not refused: {source}": str(share) for source, share in row.harmfulness.items()}
    short = short_names(row.judged)
    cells |= {f"harmful: {short[judge]}": str(share) for judge, share in row.judged.items()}
    cells |= {f"refused: {source}": str(share) for source, share in row.over_refusal.items()}
    for title, perplexity in (("perplexity", row.perplexity), ("perplexity: not refused", row.perplexity_answered)):
        cells[title] = "none" if math.isnan(perplexity) else f"{perplexity:.1f}"
    cells |= {"repetitive": str(row.repetitive), "empty": str(row.empty)}
    for task, metrics in row.tasks.items():
        for metric in metrics_of(metrics):
            cells[f"{task} {metric}"] = _with_error(metrics, metric)
    return cells


def _with_error(metrics: dict[str, float], metric: str) -> str:
    if math.isnan(metrics[metric]):
        return "none"
    half = half_interval(metrics, metric)
    return f"{metrics[metric]:.3f}" + (f" (± {half:.3f})" if half else "")
