"""Ctrl-C under axolotl: its handler saves the adapter as it is and ends, past everything that the trainer does."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from axolotl_asft.constraint import Constraint
from axolotl_asft.trained import Trained


class StampOnInterrupt(TrainerCallback):
    """Whatever handles Ctrl-C when training begins does so; then what it saved is stamped, if it ends the process.

    Python's own handler, which saves nothing, is left alone. So are threads other than the main one, which get none,
    and forked workers of the data loader.
    """

    def __init__(self, constraint: Callable[[], Constraint | Trained | None]):
        """`constraint` gives the one that is trained under, or None; a handler stays, and should not keep it alive."""
        self._constraint = constraint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        previous, process = signal.getsignal(signal.SIGINT), os.getpid()
        ours = threading.current_thread() is threading.main_thread()
        if not ours or not callable(previous) or previous is signal.default_int_handler:
            return

        def handle(number: int, frame: Any) -> None:
            constraint = self._constraint() if os.getpid() == process else None
            if constraint is not None:
                constraint.before_interruption()
            try:
                previous(number, frame)
            except SystemExit:
                if constraint is not None:
                    constraint.mark_interrupted()
                raise

        signal.signal(signal.SIGINT, handle)
