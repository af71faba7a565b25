"""What `axolotl asft eval` found, read from its results.json as measures with intervals."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError, one_line

RESULTS = "results.json"
PLACES = ("asft-eval/results.json", "eval/results.json", "results.json", "eval.json")  # in a run's folder


@dataclass(frozen=True)
class Point:
    """One model under one measure.

    Attributes:
        model: the row's name.
        value: 0 to 1 of a share, or a task's score.
        low, high: ends of the 95 % interval; None where none is known.
        n: how many were asked; None of a task.
        role: "before", "this" or "other".
    """

    model: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    role: str


@dataclass(frozen=True)
class Measure:
    """One thing that was measured, of every model.

    Attributes:
        title: in plain words.
        better: "lower" or "higher".
        points: one a model.
    """

    title: str
    better: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Evaluation:
    """Attributes: path: of the file; measures: in the order of their importance."""

    path: Path
    measures: tuple[Measure, ...]


def find_evaluation(folder: Path, given: Path | None) -> Evaluation | None:
    """The evaluation that is given, as a file or folder, or one that lies in the run's folder.

    Raises:
        AsftError: the given one is no evaluation.
    """
    if given is not None:
        path = given / RESULTS if given.is_dir() else given
        found = _read(path, folder)
        if found is None:
            raise AsftError(f"{path} holds no results of `axolotl asft eval`; give its {RESULTS}, or the folder")
        return found
    for place in PLACES:
        if (folder / place).is_file() and (found := _read(folder / place, folder)) is not None:
            return found
    return None


def _read(path: Path, run: Path) -> Evaluation | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AsftError(f"no file {path}; give the {RESULTS} of `axolotl asft eval`, or its folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AsftError(
            f"{path} is no readable JSON ({one_line(error)}); expected results of axolotl asft eval"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or "questions" not in content:
        return None
    try:
        return Evaluation(path, tuple(_measures(content["rows"], run)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AsftError(f"{path} lacks what axolotl asft eval writes ({one_line(error)}); run it again") from error


def _measures(rows: list[dict[str, Any]], run: Path) -> list[Measure]:
    shares = [
        ("harmfulness", "Harmful prompts not refused", "lower"),
        ("judged", "Answers that a judge calls harmful", "lower"),
        ("over_refusal", "Harmless prompts refused", "lower"),
    ]
    found = []
    for field, title, better in shares:
        for source in _keys(rows, field):
            points = [
                Point(
                    row["name"],
                    _number(s["value"]),
                    _number(s["low"]),
                    _number(s["high"]),
                    int(s["n"]),
                    _role(row, run),
                )
                for row in rows
                if (s := row[field].get(source)) and s["value"] is not None
            ]
            found.append(Measure(f"{title}: {Path(source).name}", better, tuple(points)))
    for task in _keys(rows, "tasks"):
        metrics = dict.fromkeys(m for row in rows for m in row["tasks"].get(task, {}) if "_stderr" not in m)
        for metric in metrics:
            points = [_task_point(row, task, metric, run) for row in rows if metric in row["tasks"].get(task, {})]
            found.append(Measure(f"{task}, {metric.replace(',none', '')}", "higher", tuple(points)))
    return [measure for measure in found if measure.points]


def _task_point(row: dict[str, Any], task: str, metric: str, run: Path) -> Point:
    metrics = row["tasks"][task]
    name, space, filtered = metric.partition(" ")
    value, error = _number(metrics[metric]), metrics.get(f"{name}_stderr{space}{filtered}")
    half = 1.96 * _number(error) if error else None
    low, high = (None, None) if half is None else (value - half, value + half)
    return Point(row["name"], value, low, high, None, _role(row, run))


def _keys(rows: list[dict[str, Any]], field: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row[field]))


def _role(row: dict[str, Any], run: Path) -> str:
    if row["adapter"] is None:
        return "before"
    adapter, folder = Path(row["adapter"]), run.resolve()
    # a relative path was given from another folder, maybe
    here = folder.parts[-len(adapter.parts) :] == adapter.parts if not adapter.is_absolute() else False
    return "this" if here or adapter.resolve() == folder else "other"


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is no number")
    return float(value)
