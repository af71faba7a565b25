"""An extraction that may be interrupted: every finished layer is a file of its own, beside the output."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection, ModuleDirection
from axolotl_asft.errors import AsftError
from axolotl_asft.files import atomic_write_text, writable_folder

LOG = logging.getLogger("axolotl.asft")

SETTINGS = "extraction.json"


class Parts(Mapping[str, ModuleDirection]):
    """The finished layers of one extraction, each a direction file in `OUTPUT.partial/`.

    They are written whole or not at all, so that a process may die at any moment. As a mapping it reads a layer from
    its file each time it is asked for: memory holds the ones in use.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self._paths = {name: folder / f"{number:05d}.safetensors" for number, name in enumerate(names)}

    @classmethod
    def open(cls, output: Path, names: list[str], settings: dict[str, Any]) -> "Parts":
        """The work folder of an output: what is in it, if it is of the same settings, else empty.

        Args:
            settings: JSON of all that the result depends on, but for the weights themselves.
        """
        parts = cls(output.with_name(output.name + ".partial"), names)
        previous = parts._previous()
        if previous is not None and previous != settings:
            other = ", ".join(sorted(key for key in previous | settings if previous.get(key) != settings.get(key)))
            LOG.warning("%s is of an extraction with another %s; starting afresh", parts.folder, other)
        if previous != settings:
            parts.remove()
            writable_folder(parts.folder)
            atomic_write_text(parts.folder / SETTINGS, json.dumps(settings, indent=1, sort_keys=True) + "\n")
        elif done := sum(path.exists() for path in parts._paths.values()):
            LOG.warning("going on in %s: %d of %d layers are done", parts.folder, done, len(names))
        return parts

    def finished(self, name: str, spec: Mapping[str, Any]) -> AlignmentDirection | None:
        """The layer as it was written, if it was made from the same weights: what `spec` says of the models."""
        try:
            part = AlignmentDirection.load(self._paths[name])
        except AsftError:
            return None
        if any(part.spec.get(key) != spec.get(key) for key in ("base", "aligned", "adapter")):
            LOG.warning("%s: the weights are not those of %s; making it again", name, self._paths[name])
            return None
        return part

    def keep(self, name: str, part: AlignmentDirection) -> None:
        """Write a finished layer."""
        part.save(self._paths[name])

    def remove(self) -> None:
        """All of it, once the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _previous(self) -> dict[str, Any] | None:
        """The settings of what is in the folder; None where it holds nothing of ours."""
        try:
            found = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if self.folder.exists() and any(self.folder.iterdir()):
                raise AsftError(
                    f"{self.folder} holds no interrupted extraction; it is needed for this one: move it away, or give "
                    "another --output"
                ) from None
            return None
        return found if isinstance(found, dict) else {}

    def __getitem__(self, name: str) -> ModuleDirection:
        return AlignmentDirection.load(self._paths[name]).modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
