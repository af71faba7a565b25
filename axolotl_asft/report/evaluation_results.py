"""What `axolotl asft eval` found, read from its results.json as measures with intervals."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.evaluation.task_scores import HIGHER_IS_BETTER, beside, half_interval, metrics_of
from axolotl_asft.files import file_sha256, read_json, short_names
from axolotl_asft.saved import ADAPTER_WEIGHTS

RESULTS = "results.json"
PLACES = ("asft-eval", "eval")  # in a run's folder
BABBLE = 10  # times the model's own perplexity
OF_ALL, OF_ANSWERED = "perplexity", "perplexity_answered"
DOUBTS = ("stale", "unknown")  # rows that name the run's folder, and are of another adapter, or may be


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
        better: "lower" or "higher"; "" where it is not known.
        points: one a model.
    """

    title: str
    better: str
    points: tuple[Point, ...]

    @property
    def is_share(self) -> bool:
        """Whether it can be a share; a perplexity is none."""
        return all(0 <= point.value <= 1 for point in self.points)

    @property
    def top(self) -> float:
        """The end of its scale, which begins at 0."""
        ends = [point.value if point.high is None else point.high for point in self.points]
        return 1.0 if self.is_share else max(1.0, *ends)


@dataclass(frozen=True)
class Evaluation:
    """Attributes: path: of the file; measures: in the order of their importance."""

    path: Path
    measures: tuple[Measure, ...]


def find_evaluation(folder: Path, given: Path | None, notes: list[str], is_earlier: bool = False) -> Evaluation | None:
    """The evaluation that is given, as a file or folder, or one that lies in the run's folder.

    Args:
        notes: told what is left out because another adapter was asked than the run's, and what is passed over because
            it is no evaluation.
        is_earlier: whether the adapter that lies in the folder is an earlier run's.

    Raises:
        AsftError: the given one is no evaluation.
    """
    if given is not None:
        path = given / RESULTS if given.is_dir() else given
        return _evaluation(path, _rows(path, notes), folder, notes, is_earlier)
    for path in (folder / place / RESULTS for place in PLACES):
        try:
            if path.is_file() and (found := _evaluation(path, _rows(path, notes), folder, notes, is_earlier)):
                return found
        except AsftError as error:
            notes.append(f"Ignored: {error}.")
    return None


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    content = read_json(path, f"give the {RESULTS} of `axolotl asft eval`, or its folder")
    if not isinstance(content.get("rows"), list) or "questions" not in content:
        raise AsftError(f"{path} holds no results of `axolotl asft eval`; expected its {RESULTS}, or the folder")
    questions = content["questions"]
    if isinstance(questions, dict) and (text := questions.get("prompt_format")):
        notes.append(f"{path}: prompts were asked as {str(text)!r}, and not in the chat template.")
    return content["rows"]


def _evaluation(
    path: Path, rows: list[dict[str, Any]], run: Path, notes: list[str], is_earlier: bool
) -> Evaluation | None:
    """None where no row of an adapter is left, or nothing was measured."""
    weights = run / ADAPTER_WEIGHTS
    lies_here = file_sha256(weights) if weights.is_file() else None
    try:
        roles = [_role(row, run, lies_here) for row in rows]
        if is_earlier:
            roles = ["stale" if role in ("this", "unknown") else role for role in roles]
        stale, unknown = ([row["name"] for row, r in zip(rows, roles, strict=True) if r == role] for role in DOUBTS)
        if stale:
            notes.append(
                f"{path}: {', '.join(stale)} is left out: the adapter evaluated was not this run's; run axolotl asft "
                "eval again."
            )
        if unknown:
            notes.append(
                f"{path}: it is not known whether {', '.join(unknown)} is the adapter that is in {run.name} now; run "
                "axolotl asft eval again."
            )
        kept = [(row, "this" if r == "unknown" else r) for row, r in zip(rows, roles, strict=True) if r != "stale"]
        if stale and all(role == "before" for _, role in kept):
            return None
        measures = tuple(_measures(kept))
        notes += _babble(kept)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise AsftError(f"{path} lacks what axolotl asft eval writes ({one_line(error)}); run it again") from error
    return Evaluation(path, measures) if measures else None


def _measures(rows: list[tuple[dict[str, Any], str]]) -> list[Measure]:
    """Of rows with their roles."""
    shares = [
        ("harmfulness", "Harmful prompts not refused", "lower"),
        ("judged", "Answers that a judge calls harmful", "lower"),
        ("over_refusal", "Harmless prompts refused", "lower"),
    ]
    found = []
    for field, title, better in shares:
        for source, name in short_names(_keys(row[field] for row, _ in rows)).items():
            points = [
                _share_point(row["name"], s, role)
                for row, role in rows
                if (s := row[field].get(source)) and s["value"] is not None
            ]
            found.append(Measure(f"{title}: {name}", better, tuple(points)))
    found += _coherence(rows)
    for task in _keys(row["tasks"] for row, _ in rows):
        asked = [(row["name"], row["tasks"][task], role) for row, role in rows if task in row["tasks"]]
        for metric in metrics_of(_keys(metrics for _, metrics, _ in asked)):
            having = [(name, metrics, role) for name, metrics, role in asked if metrics.get(metric) is not None]
            points = [_task_point(name, metrics, metric, role) for name, metrics, role in having]
            # a row whose score an earlier version kept says nothing of it
            said = {metrics.get(beside(metric, HIGHER_IS_BETTER)) for _, metrics, _ in having} - {None}
            better = "higher" if said == {True} else "lower" if said == {False} else ""
            found.append(Measure(f"{task}, {metric.replace(',none', '')}", better, tuple(points)))
    return [measure for measure in found if measure.points]


def _coherence(rows: list[tuple[dict[str, Any], str]]) -> list[Measure]:
    """What tells a safe model from one that babbles; of repetition and emptiness, where there is any."""
    found = []
    for field, answers in ((OF_ALL, "all answers"), (OF_ANSWERED, "what is not refused")):
        having = [(row, role) for row, role in rows if row.get(field) is not None]
        points = [Point(row["name"], _number(row[field]), None, None, None, role) for row, role in having]
        found.append(Measure(f"Perplexity of {answers}, under the model before", "lower", tuple(points)))
    for field, title in (("repetitive", "Answers that repeat themselves"), ("empty", "Empty answers")):
        asked = [(row["name"], row[field], role) for row, role in rows if row.get(field) and row[field]["n"]]
        points = [_share_point(*each) for each in asked]
        if any(point.value > 0 for point in points):
            found.append(Measure(title, "lower", tuple(points)))
    return found


def _babble(rows: list[tuple[dict[str, Any], str]]) -> list[str]:
    """A note on this run's answers where they are far from what the model itself would say.

    By those that are no refusals, which a stock refusal cannot hide; by all where the one or the other has none.
    """
    found = []
    before: dict[str, Any] = next((row for row, role in rows if role == "before"), {})
    for row in (row for row, role in rows if role == "this"):
        pairs = [(row.get(field), before.get(field)) for field in (OF_ANSWERED, OF_ALL)]
        now, own = next((pair for pair in pairs if None not in pair), (0, 0))
        if _number(now) > BABBLE * _number(own):
            found.append(
                f"The answers of {row['name']} are far from the model's own, perplexity {now:.3g} against {own:.3g}: "
                "read some of them: low harmfulness through babble is not a success."
            )
    return found


def _share_point(name: str, share: dict[str, Any], role: str) -> Point:
    value, low, high = (_number(share[key]) for key in ("value", "low", "high"))
    return Point(name, value, low, high, int(share["n"]), role)


def _task_point(name: str, metrics: dict[str, Any], metric: str, role: str) -> Point:
    value, half = _number(metrics[metric]), half_interval(metrics, metric)
    low, high = (None, None) if half is None else (value - _number(half), value + _number(half))
    return Point(name, value, low, high, None, role)


def _keys(found: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for entry in found for key in entry))


def _role(row: dict[str, Any], run: Path, lies_here: str | None) -> str:
    """As in a point, or one of `DOUBTS`."""
    if row["adapter"] is None:
        return "before"
    asked = row.get("adapter_sha256")
    if asked and asked == lies_here:
        return "this"
    adapter, folder = Path(row["adapter"]), run.resolve()
    # a relative path was given from another folder, maybe
    here = folder.parts[-len(adapter.parts) :] == adapter.parts if not adapter.is_absolute() else False
    if not here and adapter.resolve() != folder:
        return "other"
    return "stale" if asked and lies_here else "unknown"


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is not a number")
    return float(value)
