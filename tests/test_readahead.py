"""One item ahead, errors in their place, and nothing that holds the process."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
from tiny import interruptible

from axolotl_asft.readahead import read_ahead


def test_order_and_end():
    assert list(read_ahead(range(100))) == list(range(100))
    assert list(read_ahead([])) == []


def test_one_ahead_and_never_more():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i

    for used in read_ahead(items()):
        time.sleep(0.02)
        assert made == list(range(min(6, used + 2)))


def test_it_works_while_the_last_one_is_used():
    together = threading.Barrier(2, timeout=10)  # passed when an item is made and another used at the same time

    def items():
        yield 0
        for i in range(1, 6):
            together.wait()
            yield i

    for i in read_ahead(items()):
        if i < 5:
            together.wait()


def test_an_error_comes_where_the_item_would():
    def items():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(read_ahead(items()))
    assert seen == [1, 2]


def test_the_thread_ends_when_it_is_left_early():
    for _ in read_ahead(iter(range(10))):
        break
    gc.collect()
    deadline = time.monotonic() + 5
    while any(thread.name == "read-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_used_items_are_let_go():
    class Item:
        pass

    alive: list[weakref.ref] = []

    def items():
        for _ in range(8):
            item = Item()
            alive.append(weakref.ref(item))
            yield item
            del item

    for item in read_ahead(items()):
        time.sleep(0.02)
        assert sum(reference() is not None for reference in alive) <= 2
        del item


def test_ctrl_c_while_reading():
    """The reader may hang, on a network say; Ctrl-C ends the process all the same."""
    script = (
        "import time\nfrom axolotl_asft.readahead import read_ahead\n"
        "def items():\n    yield 1\n    print('reading', flush=True)\n    time.sleep(60)\n    yield 2\n"
        "for item in read_ahead(items()): pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible
    )
    assert process.stdout.readline() == b"reading\n"
    time.sleep(0.1)
    process.send_signal(2)
    _, errors = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in errors
