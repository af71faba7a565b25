"""The next item is made in a thread while the last one is used: reading beside decomposing."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()
GRACE = 3.0  # seconds


def read_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The items, in order; one is made ahead in a thread, never more.

    What goes wrong while an item is made is raised where that item would have come. The thread ends with the
    iteration; where that is left early, close it (`contextlib.closing`), which waits a moment for the item under way:
    a process that ends while a thread is inside torch is aborted. A thread that hangs keeps it alive no longer.
    """
    source = iter(items)
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while wanted.get():
            try:
                made.put((next(source, _END), None))
            except BaseException as error:  # it is raised again in the thread that asked
                made.put((_END, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    wanted.put(True)
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            wanted.put(True)
            yield item
            del item  # else two are held while the next one is waited for
    finally:
        wanted.put(False)
        thread.join(timeout=GRACE)
