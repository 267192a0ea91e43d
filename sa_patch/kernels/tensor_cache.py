"""Tensors remembered between calls, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import torch
from torch import Tensor


class TensorCache:
    """Tuples of tensors by key; the least recently used are dropped beyond `limit` bytes.

    A tuple larger than the limit is handed out and not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def get(self, key: Hashable, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tuple of `key`, built where it is not held."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        # Tensors made under inference mode could not be used in training later.
        with torch.inference_mode(False):
            built = build()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = built
                self.bytes += _size(built)
            while self.bytes > self.limit:
                self.bytes -= _size(self._entries.popitem(last=False)[1])
        return built


def _size(tensors: tuple[Tensor, ...]) -> int:
    # Some share their memory.
    storages = {x.data_ptr(): x for x in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
