"""One safetensors file, on disk or on the Hub: names and shapes at once, tensors one at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.hub import HubFile, fetch_range

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100 * 1024 * 1024  # the safetensors format's own limit


def torch_dtype(place: object, name: str, dtype: str) -> torch.dtype:
    """The torch dtype of a tensor, by safetensors' name of it.

    Raises:
        AsftError: none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise AsftError(
            f"{place}: {name} is {dtype}; expected one of {', '.join(sorted(DTYPES))}; give a full-precision checkpoint"
        )
    return DTYPES[dtype]


class TensorFile(Protocol):
    """What a checkpoint needs of a file."""

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Tensor name -> its shape, and safetensors' name of its dtype."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1 of a matrix, without reading the rest."""


@dataclass(frozen=True)
class LocalFile:
    """A safetensors file on disk."""

    path: Path

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        with self._opened() as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not iterable itself
            return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}

    def tensor(self, name: str) -> Tensor:
        with self._opened() as file:
            return file.get_tensor(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        with self._opened() as file:
            return file.get_slice(name)[first:last]

    @contextmanager
    def _opened(self) -> Iterator[safe_open]:
        try:
            with safe_open(str(self.path), framework="pt", device="cpu") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise AsftError(
                f"{self.path} is not a readable safetensors file ({one_line(error)}); download it again"
            ) from error


@dataclass
class RemoteFile:
    """A safetensors file on the Hub, read by byte ranges: nothing is kept on disk.

    Attributes:
        file: with its revision as a commit, so that all parts belong together.
    """

    file: HubFile
    _header: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _start: int = field(default=0, init=False, repr=False)

    def entries(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in self._entries().items()}

    def tensor(self, name: str) -> Tensor:
        shape = self._entries()[name]["shape"]
        return self._read(name, 0, math.prod(shape)).reshape(shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        _, columns = self._entries()[name]["shape"]
        return self._read(name, first * columns, last * columns).reshape(-1, columns)

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Values first to last - 1 of the flattened tensor."""
        entry = self._entries()[name]
        dtype = torch_dtype(self.file, name, entry["dtype"])
        start = self._start + entry["data_offsets"][0]
        data = fetch_range(self.file, start + first * dtype.itemsize, start + last * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype)

    def _entries(self) -> dict[str, Any]:
        if not self._header:
            size = int.from_bytes(fetch_range(self.file, 0, 8), "little")
            if not 2 <= size <= MAX_HEADER:
                raise AsftError(f"{self.file} is not a safetensors file: its header would be of {size} bytes")
            self._start = 8 + size
            self._header = _checked_header(self.file, fetch_range(self.file, 8, 8 + size))
        return self._header


def _checked_header(file: HubFile, text: bytes) -> dict[str, Any]:
    """The header's tensors; every one with a shape and the bytes that it takes."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for entry in header.values():
            first, last = entry["data_offsets"]
            fits = (
                entry["dtype"] not in DTYPES
                or last - first == math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            )
            if not fits or first < 0 or min(entry["shape"], default=1) < 0:
                raise ValueError("offsets that do not fit their shape")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AsftError(f"{file} is not a safetensors file ({one_line(error)}); give another revision") from error
    return header
