"""Everything that a report shows, gathered from a run's folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.report.evaluation_results import Evaluation, find_evaluation
from axolotl_asft.report.findings import furthest_layer, headline, total_share
from axolotl_asft.report.runs import Run, add_spectra, read_run


@dataclass
class Report:
    """What is known of a run and of those that it is compared with.

    Attributes:
        run: the report's.
        others: unconstrained runs and the like.
        direction: of the run; None where it is not at hand.
        evaluation: None where there is none.
        notes: what is left out, and why.
    """

    run: Run
    others: list[Run] = field(default_factory=list)
    direction: AlignmentDirection | None = None
    evaluation: Evaluation | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The key numbers, as `axolotl asft report --json` prints them."""
        share, chance = total_share(self.run)
        worst = furthest_layer(self.run)
        return {
            "run": str(self.run.folder),
            "finding": headline(self.run).replace("\u00a0", " "),
            "constraint": self.run.stamp,
            "numbers": key_numbers(self.run),
            "furthest_layer": None if worst is None else {"name": worst[0], "relative": worst[1]},
            "aligned_share": share,
            "aligned_share_by_chance": chance if share is not None else None,
            "compared": {other.name: key_numbers(other) for other in self.others},
            "evaluation": None if self.evaluation is None else str(self.evaluation.path),
            "left_out": self.notes,
        }


def key_numbers(run: Run) -> dict[str, float | int | None]:
    """Steps, loss, penalty, size and direction of the update."""
    _, losses = run.curve("loss")
    _, penalties = run.curve("asft/penalty")
    return {
        "steps": max((line["step"] for line in run.lines), default=None),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "penalty_peak": run.last("asft/penalty_peak") or max(penalties, default=None),
        "penalty_last": penalties[-1] if penalties else None,
        "update_norm": run.last("asft/update_norm"),
        "drift": run.last("asft/drift"),
        "max_drift": run.last("asft/max_drift"),
    }


def gather(
    folder: Path,
    compare: dict[str, Path] | None = None,
    evaluation: Path | None = None,
    direction: AlignmentDirection | str | Path | None = None,
) -> Report:
    """Read everything there is of a run.

    Args:
        folder: the output_dir of a run under the constraint.
        compare: name -> output_dir of other runs, constrained or not.
        evaluation: results.json of `axolotl asft eval`, or its folder; default: one in the run's folder.
        direction: the run's; default: the one that its config names, if it is at hand.

    Raises:
        AsftError: no such run; a damaged file; a direction that is given and is not the run's.
    """
    run = read_run(folder, "this run", constrained=True)
    report = Report(run)
    report.direction = _direction(run, direction, report.notes)
    others = [read_run(path, name, constrained=False) for name, path in (compare or {}).items()]
    report.others = others
    report.evaluation = find_evaluation(folder, evaluation)
    add_spectra(run, report.direction)
    report.notes += run.notes
    if run.history is not None and not run.history.snapshots():
        report.notes.append("The history holds no numbers of single layers yet, so the heat map is left out.")
    return report


def _direction(run: Run, given: AlignmentDirection | str | Path | None, notes: list[str]) -> AlignmentDirection | None:
    wanted = (run.stamp or {}).get("direction_sha256")
    if isinstance(given, AlignmentDirection):
        return given
    location = given if given is not None else _named_direction(run)
    if not location:
        notes.append(
            "The run does not say where its direction is; --direction FILE adds the share inside the subspace."
        )
        return None
    try:
        return AlignmentDirection.load(location, wanted if isinstance(wanted, str) else None)
    except AsftError as error:
        if given is not None:
            raise
        notes.append(
            f"The direction is not at hand ({one_line(error)}), so the share of the update inside the aligned subspace "
            "is left out; --direction FILE adds it."
        )
        return None


def _named_direction(run: Run) -> str | None:
    header = run.history.header if run.history else {}
    block = (header.get("config") or {}).get("asft")
    for place in (header.get("direction_file"), block.get("direction") if isinstance(block, dict) else None):
        if isinstance(place, str):
            return place
    return None
