"""An extraction that may be interrupted: every finished layer is a file of its own, beside the output."""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from axolotl_asft.direction import AlignmentDirection, ModuleDirection, refuse_to_replace_weights
from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text, locked, read_json, refuse_to_replace_file, writable_folder

LOG = logging.getLogger("axolotl.asft")

SETTINGS, LOCK = "extraction.json", "lock"
ASKED = "asked.safetensors"  # what the aligned model answered, which is not ours to read
OURS = re.compile(rf"{SETTINGS}|{LOCK}|{ASKED}|\d+\.safetensors|\..*\.tmp")  # the last: what a kill left of a file


def partial_folder(output: Path) -> Path:
    """Where an extraction to `output` keeps what is finished, until all is."""
    return output.with_name(output.name + ".partial")


class Parts(Mapping[str, ModuleDirection]):
    """The finished layers of one extraction, each a direction file in `OUTPUT.partial/`.

    They are written whole or not at all, so that a process may die at any moment. As a mapping it reads a layer from
    its file each time it is asked for: memory holds the ones in use.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        """Take the folder for this process, until the `with` block or the process ends.

        Raises:
            AsftError: nothing can be written there, something else is in it, or another process works there.
        """
        self.folder = folder
        self._paths = {name: folder / f"{number:05d}.safetensors" for number, name in enumerate(names)}
        self._lock = _taken(folder)

    @classmethod
    def open(cls, output: Path, names: list[str]) -> "Parts":
        """The work folder of an output, whatever is in it: `resume` looks.

        Raises:
            AsftError: see `Parts`; the output is a folder, or a model's weights.
        """
        refuse_to_replace_file(output, force=True)
        refuse_to_replace_weights(output)
        return cls(partial_folder(output), names)

    def resume(self, settings: dict[str, Any]) -> None:
        """Go on with the layers in the folder, if they are of the same settings; else they are deleted.

        Args:
            settings: JSON of all that the result depends on, but for the weights themselves.
        """
        previous, found = self._settings(), list(self.folder.glob("[0-9]*.safetensors"))
        if previous == settings:
            if found:
                LOG.warning("resuming in %s: %d of %d layers are done", self.folder, len(found), len(self))
            return
        if found:
            other = ", ".join(sorted(key for key in previous | settings if previous.get(key) != settings.get(key)))
            LOG.warning("%s is from an extraction that differs in %s; starting afresh", self.folder, other)
        for path in found:
            path.unlink()
        atomic_write_text(self.folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")

    def finished(self, name: str, models: Mapping[str, Any]) -> AlignmentDirection | None:
        """The layer as it was written, if it was made from the same weights: what the spec says of the models."""
        if not self._paths[name].exists():
            return None
        try:
            part = AlignmentDirection.load(self._paths[name])
        except AsftError:
            return None
        if any(part.spec.get(key) != entry for key, entry in models.items()):
            LOG.warning("%s: the weights are not those of %s; making it again", name, self._paths[name])
            return None
        return part

    def keep(self, name: str, part: AlignmentDirection) -> None:
        """Write a finished layer."""
        part.save(self._paths[name])

    def remove(self) -> None:
        """All of it, once the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None and not any(self.folder.glob("*.safetensors")):
            self.remove()  # nothing is finished
        self._lock.close()

    def _settings(self) -> dict[str, Any]:
        """Of what is in the folder; empty where that is not known."""
        try:
            return read_json(self.folder / SETTINGS, "start afresh")
        except AsftError:
            return {}

    def __getitem__(self, name: str) -> ModuleDirection:
        return AlignmentDirection.load(self._paths[name]).modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _taken(folder: Path) -> TextIO:
    """The folder for this process, until the file is closed."""
    strange = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)] if folder.is_dir() else []
    if strange:
        raise AsftError(
            f"{folder} is needed for what is finished, and holds {strange[0]}; move it away, or give another --output"
        )
    writable_folder(folder)
    return locked(folder / LOCK, f"another extraction is running in {folder}; wait for it, or give another --output")
