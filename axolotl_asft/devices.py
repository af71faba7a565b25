"""Which devices the algebra runs on, and work that is spread over them."""

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from axolotl_asft.errors import AsftError

Item = TypeVar("Item")
Result = TypeVar("Result")


def devices_named(text: str) -> list[str]:
    """`cpu`; `cuda`, which is every GPU that torch sees; `cuda:1`; or several of them, with commas. A GPU comes once.

    Raises:
        AsftError: another kind of device, or a GPU that torch does not see.
    """
    devices: list[str] = []
    for name in text.split(","):
        kind, _, index = name.strip().partition(":")
        if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
            raise AsftError(f"device is {text!r}; expected cpu, cuda, or one GPU or more like cuda:0,cuda:1")
        if kind == "cpu":
            devices.append("cpu")
            continue
        seen = torch.cuda.device_count()
        if int(index or 0) >= seen:
            raise AsftError(f"device is {text!r}, but torch sees {seen or 'no'} GPU{'s' * (seen > 1)} here; use cpu")
        gpus = [int(index)] if index else range(seen)
        devices += [gpu for number in gpus if (gpu := f"cuda:{number}") not in devices]
    return devices


def spread(
    items: Iterable[Item], work: Callable[[Item, str], Result], devices: list[str]
) -> Generator[tuple[Item, Result]]:
    """Every item with its work(item, device), in order; each is done on the next device that is free.

    At most two items a device are taken ahead of the one that is yielded. With one device all is done in this thread.
    """
    if len(devices) == 1:
        for item in items:
            yield item, work(item, devices[0])
        return
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def done(item: Item) -> tuple[Item, Result]:
        device = free.get()
        try:
            return item, work(item, device)
        finally:
            free.put(device)

    waiting: deque[Future[tuple[Item, Result]]] = deque()
    pool = ThreadPoolExecutor(len(devices), "decomposing")
    try:
        for item in items:
            waiting.append(pool.submit(done, item))
            if len(waiting) > 2 * len(devices):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
