"""What is left of a constraint when its training has ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_asft.direction import AlignmentDirection
from axolotl_asft.stamp import stamp_adapter, stamp_model_card


@dataclass(frozen=True)
class Trained:
    """A constraint that was trained under; it holds neither trainer nor model.

    Attributes:
        direction: that it was trained under.
        stamp: of the adapter.
        folder: the trainer's output_dir.
        is_main: whether this process writes.
        has_history: whether it has written a history.
    """

    direction: AlignmentDirection
    stamp: dict[str, Any]
    folder: str | None
    is_main: bool
    has_history: bool

    def mark(self, folder: str | Path | None) -> None:
        """Stamp the adapter and the model card in `folder`, on the main process."""
        if folder is not None and self.is_main:
            stamp_adapter(folder, self.stamp)
            stamp_model_card(folder, self.stamp)

    def before_interruption(self) -> None:
        """What is saved now is what was trained."""

    def mark_interrupted(self) -> None:
        """Stamp what was saved."""
        self.mark(self.folder)
