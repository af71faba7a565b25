"""A run's folder, read: its history, its stamp and its final update, each where it is there."""

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.adapter_folder import PROJECTION_KEY
from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import read_json, without_nan
from axolotl_asft.history import HISTORY_FILE, read_history
from axolotl_asft.report.spectrum import Spectrum, update_spectrum
from axolotl_asft.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SavedAdapter
from axolotl_asft.stamp import STAMP_KEY

NORM = "asft/update_norm"


@dataclass
class Run:
    """What is known of a run; empty where nothing is.

    Attributes:
        name: of the run, in the report.
        folder: its output_dir.
        lines: log lines, in the order of their steps; null is a number that is not finite, or not known.
        header: of its history: where and how it was trained.
        layers: the constrained ones, in the order of a snapshot's numbers.
        snapshots: lines that hold the numbers of every layer, from when the update was finite.
        constraint: what it is trained under, as its history says; without one, the adapter's stamp with its numbers.
        adapter_config: PEFT's.
        diverged_at: the step from which on the update was not finite any more; None: it is.
        spectra: layer -> singular values of its final update.
        notes: what the report lacks of it, and why.
    """

    name: str
    folder: Path
    lines: list[dict[str, Any]]
    header: dict[str, Any]
    layers: list[str]
    snapshots: list[dict[str, Any]]
    constraint: dict[str, Any]
    adapter_config: dict[str, Any]
    diverged_at: int | None = None
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The YAML that was trained from, without secrets."""
        return self.header.get("config") or {}

    @property
    def adapter_is_earlier(self) -> bool:
        """Whether the weights in the folder were there before this run began, which has saved none of its own yet."""
        weights, started = self.folder / ADAPTER_WEIGHTS, self.header.get("started")
        if not isinstance(started, str) or any("train_loss" in line for line in self.lines) or not weights.is_file():
            return False
        try:
            began = datetime.datetime.fromisoformat(started).timestamp()
        except (ValueError, OverflowError, OSError):  # of a stranger's history
            return False
        return weights.stat().st_mtime < began

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged number, as long as the update was finite."""
        points = [
            (line["step"], line[key])
            for line in self.lines
            if line.get(key) is not None and (self.diverged_at is None or line["step"] < self.diverged_at)
        ]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        """What was logged last; None where that is not finite or not known, and of a run that diverged."""
        if self.diverged_at is not None:
            return None
        return next((line[key] for line in reversed(self.lines) if key in line), None)


def read_run(folder: Path, name: str, constrained: bool) -> Run:
    """Read a run's folder.

    Args:
        constrained: refuse a run without the constraint.

    Raises:
        AsftError: no run's folder, a checkpoint in one, or a projected adapter's; a damaged history or adapter config;
            a run without the constraint.
    """
    if not folder.is_dir():
        raise AsftError(f"{folder} is not a folder; give the output_dir of a run")
    place = folder.resolve()
    has_history = (folder / HISTORY_FILE).is_file()
    if not has_history and place.name.startswith("checkpoint-") and (place.parent / HISTORY_FILE).is_file():
        raise AsftError(f"{folder} is a checkpoint, which has no history; give the run's folder, {place.parent}")
    config = _json(folder / ADAPTER_CONFIG)
    history = read_history(folder) if has_history else None
    lines = history.lines if history else _trainer_log(folder)
    if config is None and history is None and not lines:
        raise AsftError(
            f"{folder} is not a run's folder: it has neither {HISTORY_FILE} nor {ADAPTER_CONFIG}; give the "
            "output_dir of a run"
        )
    config, header = config or {}, history.header if history else {}
    if PROJECTION_KEY in config:
        raise AsftError(
            f"{folder} holds an adapter that was projected after its training, whose numbers are not its own; give the "
            "output_dir of the training"
        )
    # beside a history the stamp may be an earlier run's: it stays there until the new adapter is saved
    stamp = config.get(STAMP_KEY) if history is None else header.get("constraint")
    constraint = without_nan(stamp) if isinstance(stamp, dict) else {}
    if constrained and not constraint and history is None:
        raise AsftError(
            f"{folder} was trained without the constraint (its adapter bears no stamp); give a run with plugins: "
            "[asft], or name this one with --compare"
        )
    diverged_at = _diverged_at(lines, constraint)
    snapshots = history.snapshots() if history else []
    snapshots = [line for line in snapshots if diverged_at is None or line["step"] < diverged_at]
    layers = history.layers if history else []
    run = Run(name, folder, lines, header, layers, snapshots, constraint, config, diverged_at)
    if constrained and history is None:
        run.notes.append(
            f"No {HISTORY_FILE}: the run was trained by an earlier version, or its file was moved. The curves are the "
            "last checkpoint's; the heat map is left out."
        )
    elif constrained and not snapshots:
        what = "numbers of single layers yet" if diverged_at is None else "finite numbers of single layers"
        run.notes.append(f"The history holds no {what}, so the heat map is left out.")
    return run


def add_spectra(run: Run, direction: AlignmentDirection | None) -> None:
    """Put the singular values of the final update into `run`, from its saved adapter where there is a plain one."""
    if not (run.folder / ADAPTER_WEIGHTS).is_file():
        run.notes.append(f"No {ADAPTER_WEIGHTS} in {run.folder.name}: the singular values of its update are left out.")
        return
    if run.adapter_is_earlier:
        run.notes.append(
            f"{ADAPTER_WEIGHTS} in {run.folder.name} is older than this run, which has saved none yet: the singular "
            "values of its update are left out."
        )
        return
    try:
        layers = list(SavedAdapter.read(run.folder).layers())
    except (AsftError, KeyError, TypeError, ValueError) as error:
        run.notes.append(f"The singular values of the update are left out: {one_line(error)}.")
        return
    rank = run.constraint.get("rank")
    used_rank = rank if isinstance(rank, int) and rank > 0 else None
    broken = []
    for layer in layers:
        module = direction.modules.get(layer.name) if direction is not None else None
        if module is not None and module.U.shape[0] != layer.B.shape[0]:
            module = None
        if not layer.A.isfinite().all() or not layer.B.isfinite().all():
            broken.append(layer.name)
            continue
        # rank 0 leaves no direction free, and the share in all that are stored still says where the update went
        used = module.U[:, module.S > 0][:, :used_rank] if module is not None else None
        run.spectra[layer.name] = update_spectrum(layer.A, layer.B, layer.scaling, used)
    if broken:
        run.notes.append(
            f"{len(broken)} of the adapter's {len(layers)} layers hold numbers that are not finite (first "
            f"{broken[0]}); they are left out."
        )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_json(path, "the file is damaged")


def _trainer_log(folder: Path) -> list[dict[str, Any]]:
    """The log that transformers keeps with its checkpoints: of a run without a history of ours."""
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    for path in sorted((path for path in states if path.is_file()), key=_checkpoint_step, reverse=True):
        lines = (_json(path) or {}).get("log_history")
        if isinstance(lines, list):
            return [_numbers(line) for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    return []


def _checkpoint_step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() else 1 << 60


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return without_nan({key: value for key, value in line.items() if isinstance(value, int | float)})


def _diverged_at(lines: list[dict[str, Any]], constraint: dict[str, Any]) -> int | None:
    """The first of the steps from which on, to the end, the update's norm is no finite number."""
    measured = [line for line in lines if NORM in line]
    if not measured and "update_norm" in constraint and constraint["update_norm"] is None:
        return lines[-1]["step"] if lines else 0
    step = None
    for line in reversed(measured):
        if line[NORM] is not None:
            break
        step = line["step"]
    return step
