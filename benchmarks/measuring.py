"""Times taken side by side, and the machine that they were taken on."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def machine(device: str) -> str:
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    return f"{platform.machine()}, {chip}, torch {torch.__version__}"


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """The median seconds of each, one after the other `repeats` times; each call follows one that warms up for it."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            wait(device)
            started = time.perf_counter()
            function()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def wait(device: str) -> None:
    """Until a GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
