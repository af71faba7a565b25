"""Everything that a report shows, gathered from a run's folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.history import HISTORY_FILE
from axolotl_asft.report.evaluation_results import Evaluation, find_evaluation
from axolotl_asft.report.findings import furthest_layer, headline, measured_otherwise, total_share, without_yardstick
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
            "constraint": self.run.constraint or None,
            "diverged_at_step": self.run.diverged_at,
            "numbers": key_numbers(self.run),
            "furthest_layer": None if worst is None else {"name": worst[0], "relative": worst[1]},
            "aligned_share": share,
            "aligned_share_by_chance": chance if share is not None else None,
            "layers_without_yardstick": without_yardstick(self.run),
            "compared": {other.name: compared_numbers(self.run, other) for other in self.others},
            "evaluation": None if self.evaluation is None else str(self.evaluation.path),
            "left_out": self.notes,
        }


def key_numbers(run: Run) -> dict[str, float | int | None]:
    """Steps, loss, penalty, size and direction of the update; None of what is not known, or not finite any more."""
    _, losses = run.curve("loss")
    _, penalties = run.curve("asft/penalty")
    # the last line's peak may be of a resumed part alone; a stamp's counts where there is no history
    peaks = [run.constraint.get("penalty_peak"), run.last("asft/penalty_peak"), *penalties]
    known = [peak for peak in peaks if isinstance(peak, int | float)] if run.diverged_at is None else []
    return {
        "steps": max((line["step"] for line in run.lines), default=None),
        "loss_first": losses[0] if losses else None,
        "loss_last": run.last("loss"),
        "penalty_peak": max(known, default=None),
        "penalty_last": run.last("asft/penalty"),
        "update_norm": run.last("asft/update_norm"),
        "drift": run.last("asft/drift"),
        "max_drift": run.last("asft/max_drift"),
    }


def compared_numbers(run: Run, other: Run) -> dict[str, float | int | None]:
    """The key numbers of a run beside this one, without a drift that was measured otherwise."""
    return key_numbers(other) | ({"drift": None, "max_drift": None} if measured_otherwise(run, other) else {})


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
    for name, path in (compare or {}).items():
        if path.resolve() == folder.resolve():
            raise AsftError(f"--compare {name}={path} is the run itself; give another run's folder")
    run = read_run(folder, "this run", constrained=True)
    report = Report(run)
    report.direction = _direction(run, direction, report.notes)
    report.others = [read_run(path, name, constrained=False) for name, path in (compare or {}).items()]
    for other in report.others:
        if not other.lines:
            report.notes.append(
                f"{other.name} has no curves: its folder holds neither {HISTORY_FILE} nor a checkpoint's "
                "trainer_state.json."
            )
        if how := measured_otherwise(run, other):
            report.notes.append(f"The drift of {other.name} is left out: it was measured differently ({how}).")
    report.evaluation = find_evaluation(folder, evaluation, report.notes, run.adapter_is_earlier)
    add_spectra(run, report.direction)
    report.notes += run.notes
    return report


def _direction(run: Run, given: AlignmentDirection | str | Path | None, notes: list[str]) -> AlignmentDirection | None:
    wanted = run.constraint.get("direction_sha256")
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
            f"The direction is not available ({one_line(error)}), so the share of the update inside the aligned "
            "subspace is left out; --direction FILE adds it."
        )
        return None


def _named_direction(run: Run) -> str | Path | None:
    block, place = run.config.get("asft"), run.header.get("direction_file")
    if isinstance(place, str):
        return run.folder / place if place.startswith(".") else place
    place = block.get("direction") if isinstance(block, dict) else None
    return place if isinstance(place, str) else None
