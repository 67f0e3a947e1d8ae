"""What a call was given, as a key: two calls of equal keys differ in the addresses of their tensors only."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import torch

ALIGNMENT = 16  # bytes: Triton compiles anew for a pointer that is a multiple of it
PLAIN = frozenset({int, bool, str})  # types whose values are equal only where nothing tells them apart
TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
SEQUENCES = frozenset({list, tuple})
MOST = 256  # keys: of each a few hundred bytes, and of a tape some kilobytes

Key = tuple[Any, ...]


def outline(values: Iterable[Any]) -> Key | None:
    """The key of ``values`` as far as checks of arguments go: no address is asked for."""
    return describe(values, [], None)


def describe(values: Iterable[Any], tensors: list[torch.Tensor], addresses: list[int] | None) -> Key | None:
    """The key of ``values``, whose tensors and their addresses are added to the lists; None where one is unknown.

    Of a tensor it holds what shows without reading memory, the place of its address within 16 bytes included. Numbers
    go by type and value, so that 1, 1.0 and True differ, and so do the two zeros.
    """
    key: list[Any] = []
    for value in values:
        if value is None:
            key.append(None)
            continue
        kind = type(value)
        if kind in TENSORS:
            if addresses is None:
                key += (value.shape, value.stride(), value.dtype, value.get_device(), value.is_cpu)
                continue
            address = value.data_ptr()
            tensors.append(value)
            addresses.append(address)
            key += (value.shape, value.stride(), value.dtype, value.get_device(), address % ALIGNMENT)
        elif kind in PLAIN:
            key += (kind, value)
        elif kind is float:
            key += (kind, value if value and value == value else (str(value), math.copysign(1, value)))
        elif kind in SEQUENCES:
            inner = describe(value, tensors, addresses)
            if inner is None:
                return None
            key += (kind, inner)
        else:
            return None
    return tuple(key)


class Remembered:
    """Values by key: the oldest go where there are more than ``most``. Threads may share it."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.values: dict[Any, Any] = {}
        self.get = self.values.get  # a read of a dict is one step: it needs no lock
        self._lock = threading.Lock()

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self.values.pop(key, None)
            while len(self.values) >= self.most:
                del self.values[next(iter(self.values))]
            self.values[key] = value

    def clear(self) -> None:
        with self._lock:
            self.values.clear()
