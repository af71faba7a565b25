"""A run's folder, read: its history, its stamp and its final update, each where it is there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.files import read_json
from axolotl_asft.history import HISTORY_FILE, History, read_history
from axolotl_asft.report.spectrum import Spectrum, update_spectrum
from axolotl_asft.saved import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SavedAdapter
from axolotl_asft.stamp import STAMP_KEY


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        name: of the run, in the report.
        folder: its output_dir.
        lines: log lines, in the order of their steps.
        history: with the numbers of every layer; None where none was kept.
        stamp: what the adapter says that it was trained under; None of an unconstrained one.
        adapter_config: PEFT's.
        spectra: layer -> singular values of its final update.
        notes: what the report lacks of it, and why.
    """

    name: str
    folder: Path
    lines: list[dict[str, Any]]
    history: History | None
    stamp: dict[str, Any] | None
    adapter_config: dict[str, Any]
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged number."""
        points = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        """The last value that was logged."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)


def read_run(folder: Path, name: str, constrained: bool) -> Run:
    """Read a run's folder.

    Args:
        constrained: refuse a run without the constraint.

    Raises:
        AsftError: no run's folder; a damaged history or adapter config; a run without the constraint.
    """
    if not folder.is_dir():
        raise AsftError(f"{folder} is no folder; give the output_dir of a run")
    config = _json(folder / ADAPTER_CONFIG)
    history = read_history(folder) if (folder / HISTORY_FILE).is_file() else None
    logged = [] if history else _trainer_log(folder)
    if config is None and history is None and not logged:
        raise AsftError(
            f"{folder} is no run's folder: it has neither {HISTORY_FILE} nor {ADAPTER_CONFIG}; give the "
            "output_dir of a run"
        )
    stamp = (config or {}).get(STAMP_KEY)
    if not isinstance(stamp, dict):
        stamp = history.header.get("constraint") if history else None
    if constrained and not isinstance(stamp, dict) and history is None:
        raise AsftError(
            f"{folder} was trained without the constraint (its adapter bears no stamp); give a run with plugins: "
            "[asft], or name this one with --compare"
        )
    run = Run(name, folder, history.lines if history else logged, history, stamp, config or {})
    if history is None and constrained:
        run.notes.append(
            f"No {HISTORY_FILE}: the run was trained by an earlier version, or its file was moved. The curves are the "
            "last checkpoint's, and the heat map is left out."
        )
    return run


def add_spectra(run: Run, direction: AlignmentDirection | None) -> None:
    """Put the singular values of the final update into `run`, from its saved adapter where there is a plain one."""
    if not (run.folder / ADAPTER_WEIGHTS).is_file():
        run.notes.append(f"No {ADAPTER_WEIGHTS} in {run.folder.name}: the singular values of its update are left out.")
        return
    try:
        layers = list(SavedAdapter.read(run.folder).layers())
    except (AsftError, KeyError, TypeError, ValueError) as error:
        run.notes.append(f"The singular values of the update are left out: {one_line(error)}.")
        return
    rank = (run.stamp or {}).get("rank")
    used_rank = rank if isinstance(rank, int) and rank > 0 else None
    for layer in layers:
        module = direction.modules.get(layer.name) if direction is not None else None
        if module is not None and module.U.shape[0] != layer.B.shape[0]:
            module = None
        if not layer.A.isfinite().all() or not layer.B.isfinite().all():
            run.notes.append(f"{layer.name} of the adapter holds numbers that are not finite; it is left out.")
            continue
        # rank 0 leaves no direction free, and the share in all that are stored still says where the update went
        used = module.U[:, module.S > 0][:, :used_rank] if module is not None else None
        run.spectra[layer.name] = update_spectrum(layer.A, layer.B, layer.scaling, used)


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
    return {key: value for key, value in line.items() if isinstance(value, int | float) and value == value}
