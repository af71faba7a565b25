"""The history of a run, `asft_history.jsonl` beside its adapter: a JSON line a log line, written and read."""

import datetime
import importlib.metadata
import json
import logging
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.diagnostics import DriftReport
from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text
from axolotl_asft.redaction import redacted
from axolotl_asft.stamp import PAGE, PICTURE

LOG = logging.getLogger("axolotl.asft")

HISTORY_FILE = "asft_history.jsonl"
REPORT = (PAGE, PICTURE, "asft_report_layers.png", "asft_report_spectrum.png")  # all that is drawn of a run
FORMAT, FORMAT_VERSION = "asft-history", 1
SNAPSHOTS = 200  # at most about so many log lines hold the numbers of every layer
PER_LAYER = ("relative", "drift", "norm")
FROM_THE_LOG = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "train_runtime")
PACKAGES = ("axolotl-asft", "axolotl", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class History:
    """A run's history, read.

    Attributes:
        header: where and how it was trained: started, versions, device, settings, config, layers.
        lines: in the order of their steps; numbers by the names of the log, and under "layers" those of each layer.
    """

    header: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def layers(self) -> list[str]:
        """The constrained layers by full name, in the order of the numbers."""
        return self.header["layers"]

    def snapshots(self) -> list[dict[str, Any]]:
        """The lines that hold the numbers of every layer, the last one of each step."""
        return list({line["step"]: line for line in self.lines if "layers" in line}.values())


class HistoryWriter:
    """Keeps a run's history while it trains. What cannot be written costs a warning, never the run.

    Attributes:
        header: what the first line says; the caller adds to it before training begins.
    """

    def __init__(self, layers: list[str]):
        self.header: dict[str, Any] = {"layers": layers}
        self._path: Path | None = None
        self._stride = 1
        self._next_snapshot = 0

    @property
    def is_kept(self) -> bool:
        """Whether this process writes one: the main process does, unless its disk refused."""
        return self._path is not None

    def begin(self, folder: str | Path, step: int, max_steps: int, logged: list[dict[str, Any]]) -> None:
        """Training starts at `step`: go on with the lines up to there; from step 0, begin anew.

        Then the report of an earlier run is removed, with its pictures: the model card would show one.

        Args:
            logged: the trainer's own log of the earlier steps, for a run that is resumed in another folder.
        """
        self._path = Path(folder) / HISTORY_FILE
        self._stride = max(1, math.ceil(max_steps / SNAPSHOTS))
        self._next_snapshot = 0
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        start = {"format": FORMAT, "format_version": FORMAT_VERSION, "started": now}
        start |= {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": installed_versions(),
        }
        # YAML knows .inf and .nan, and JSON does not: there they are words
        header = json.loads(json.dumps(redacted(start | self.header), default=str), parse_constant=str)
        lines = []
        if step:
            header["resumed_at_steps"] = [step]
            lines = self._go_on(header, step) or _from_log(logged)
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in [header, *lines])

        def start_file(path: Path) -> None:
            if not step:
                for old in [path.with_name(name) for name in REPORT]:
                    if old.is_file():
                        old.unlink()
            atomic_write_text(path, text)

        self._write(start_file)

    def add(self, step: int, epoch: float | None, logs: dict[str, Any], report: DriftReport | None, last: bool) -> None:
        """One line of the log.

        Args:
            logs: the trainer's numbers, ours among them.
            report: the drift of every layer, where it was measured.
            last: whether the training ends with it.
        """
        line: dict[str, Any] = {key: _rounded(value) for key, value in logs.items() if _is_kept(key)}
        line |= {"step": step, "epoch": _rounded(epoch)}
        if report is not None and (last or step >= self._next_snapshot):
            self._next_snapshot = step + self._stride
            line["layers"] = {
                "relative": [_rounded(layer.relative, 4) for layer in report.layers],
                "drift": [_rounded(layer.drift, 4) for layer in report.layers],
                "norm": [_rounded(math.sqrt(max(layer.total, 0.0)), 4) for layer in report.layers],
            }
        text = json.dumps(line, allow_nan=False) + "\n"

        def append(path: Path) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

        self._write(append)

    def _go_on(self, header: dict[str, Any], step: int) -> list[dict[str, Any]]:
        """The lines up to `step` of the history that lies there; none where it is no history of this run."""
        assert self._path is not None
        if not self._path.is_file():
            return []
        try:
            earlier = read_history(self._path.parent)
        except AsftError as error:
            LOG.warning("%s; it is replaced", error)
            return []
        if earlier.layers != self.header["layers"]:
            LOG.warning("%s belongs to a run over other layers; it is replaced", self._path)
            return []
        before = earlier.header.get("resumed_at_steps", [])
        header["started"] = earlier.header.get("started")
        header["resumed_at_steps"] = [*(at for at in before if at < step), step]
        return [line for line in earlier.lines if line["step"] <= step and "train_loss" not in line]

    def _write(self, how: Any) -> None:
        if self._path is None:
            return
        try:
            how(self._path)
        except OSError as error:
            LOG.warning("the history of the run is not saved: %s cannot be written (%s)", self._path, error.strerror)
            self._path = None


def read_history(folder: str | Path) -> History:
    """The history in a run's folder.

    A last line that was cut, as by the end of a process, is left out.

    Raises:
        AsftError: there is none, or it is damaged or of another version.
    """
    path = Path(folder) / HISTORY_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise AsftError(f"no {HISTORY_FILE} in {folder}; give the output_dir of a run under the constraint") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AsftError(f"{path} cannot be read ({error.__class__.__name__}); expected JSON lines in UTF-8") from error
    entries = [_entry(path, number, line) for number, line in enumerate(text.split("\n")[:-1], 1)]
    if not entries or entries[0].get("format") != FORMAT:
        raise AsftError(
            f"{path} is not a run history: its first line does not say {FORMAT!r}; delete it, or train again"
        )
    header = entries[0]
    if header.get("format_version") != FORMAT_VERSION:
        found = str(header.get("format_version"))[:20]
        raise AsftError(f"{path} has format version {found}; expected {FORMAT_VERSION}; upgrade axolotl-asft")
    layers = header.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise AsftError(f"{path}: its first line names no layers; delete it, or train again")
    steps = header.get("resumed_at_steps", [])
    blocks = [header.get(key) or {} for key in ("constraint", "config", "versions")]
    if not all(isinstance(block, dict) for block in blocks) or not (
        isinstance(steps, list) and all(map(_is_step, steps))
    ):
        raise AsftError(f"{path}: its first line is not in the expected form; delete the file, or train again")
    for number, line in enumerate(entries[1:], 2):
        _check_line(path, number, line, len(layers))
    return History(header, sorted(entries[1:], key=lambda line: line["step"]))


def _entry(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AsftError(f"{path}: line {number} is not valid JSON; the file is damaged; remove the line") from error
    if not isinstance(entry, dict):
        raise AsftError(f"{path}: line {number} is not a JSON object; the file is damaged; remove the line")
    return entry


def _check_line(path: Path, number: int, line: dict[str, Any], count: int) -> None:
    step, layers = line.get("step"), line.get("layers", {})
    numbers = all(_is_number(value) for key, value in line.items() if key not in ("step", "layers"))
    whole = isinstance(layers, dict) and set(layers) in ({*PER_LAYER}, set())
    whole = whole and all(
        isinstance(values, list) and len(values) == count and all(_is_number(v) and (v or 0) >= 0 for v in values)
        for values in layers.values()
    )
    if not _is_step(step) or not numbers or not whole:
        raise AsftError(f"{path}: line {number} is not in the expected form; the file is damaged; remove the line")


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def _rounded(value: Any, digits: int = 6) -> float | int | None:
    """A number in so many significant digits; null of what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _from_log(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our lines from the trainer's own log, without the numbers of each layer."""
    return [
        {key: _rounded(value) for key, value in line.items() if _is_kept(key)}
        for line in logged
        if "loss" in line or "eval_loss" in line
    ]


def _is_kept(key: str) -> bool:
    return key in ("step", "epoch", *FROM_THE_LOG) or key.startswith("asft/")


def installed_versions() -> dict[str, str]:
    """Package -> version, of those that a training depends on and that are here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
