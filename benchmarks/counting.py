"""What a piece of torch code does, counted instead of timed: launches, bytes, and waiting for the device."""

import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What reads a number off the device, and so waits for everything before it.
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


@dataclass
class Counter(TorchDispatchMode):
    """Counts inside a `with` block, on any device.

    Attributes:
        launches: operations that compute something; views and empty allocations are none.
        allocated: bytes of new storage, all in all.
        peak: most bytes of it that were alive at one time.
        waits: operations that wait for the device.
    """

    launches: int = 0
    allocated: int = 0
    peak: int = 0
    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._alive = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in WAITING or (name == "aten::_to_copy" and self._changes_device(args, result)):
            self.waits.append(name)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        fresh = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in made}
        new = {key: storage for key, storage in fresh.items() if key not in given and key not in self._seen}
        if (new or func._schema.is_mutable) and not name.startswith("aten::empty"):
            self.launches += 1
        for key, storage in new.items():
            self._born(key, storage)
        return result

    def _born(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen[key] = size
        self.allocated += size
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self._alive -= self._seen.pop(key, 0)

    @staticmethod
    def _changes_device(args, result) -> bool:
        return isinstance(args[0], torch.Tensor) and args[0].device != result.device
