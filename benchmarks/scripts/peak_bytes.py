"""Counts the bytes that tensors hold; unlike sampling, this gives the same on every machine."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEGABYTE = 1e6


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and count what it has made."""
        known = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _is_tensor(leaf) and self._key(leaf) not in known:
                self._add(leaf.untyped_storage())
        return output

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
