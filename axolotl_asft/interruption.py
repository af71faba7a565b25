"""Ctrl-C under axolotl: its handler saves the adapter as it is and ends, past everything that the trainer does."""

import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StampOnInterrupt(TrainerCallback):
    """Whatever handles Ctrl-C when training begins does so, and `mark` says on what it saved how it came to be.

    Python's own handler, which saves nothing, is left alone; so are threads other than the main one, which get none.
    """

    def __init__(self, mark: Callable[[], None]):
        self._mark = mark

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        previous = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread()
        if not ours or not callable(previous) or previous is signal.default_int_handler:
            return

        def handle(number: int, frame: Any) -> None:
            try:
                previous(number, frame)
            finally:
                self._mark()

        signal.signal(signal.SIGINT, handle)
