"""Where the tensors of one launch lie: a table on the device, kept for as long as they stay there.

A table is found by the addresses, sizes and strides of the very tensors of a call, so it can never point to memory
that moved or was freed, and it holds no tensor: a cache that nobody uses any more is freed.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

FIELDS = 6  # numbers an entry: offset, stride of sample, slot and row, rows, words of a row
MAXIMUM_TABLES = 128  # 5 KB each for 96 tensors
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a move moves bits, whatever they mean
WIDEST = 16  # bytes of one access

Key = tuple[tuple[int, int, torch.Size, tuple[int, ...]], ...]


class Entry(NamedTuple):
    """Rows of contiguous bytes: row r of slot s of sample b lies at ``address + b, s, r times their strides``."""

    address: int
    stride_b: int
    stride_s: int
    stride_r: int
    rows: int
    bytes: int

    @property
    def alignment(self) -> int:
        """Largest power of two, at most 16, that divides every address and the length of a row."""
        return math.gcd(self.address, self.stride_b, self.stride_s, self.stride_r, self.bytes, WIDEST)


class AddressTable(NamedTuple):
    """The entries of equal alignment. Their numbers are in words, the offset from the table itself."""

    numbers: torch.Tensor  # (entries, FIELDS) int64
    origin: torch.Tensor  # the same memory as words: the pointer that offsets are added to
    rows: int  # most rows of an entry
    words: int  # most words of a row
    vector: int  # words that can be moved at once


_tables: OrderedDict[Key, list[AddressTable]] = OrderedDict()
_captured: list[list[AddressTable]] = []  # a CUDA graph replays with the table that it was captured with
_lock = threading.Lock()


def address_tables(tensors: Sequence[torch.Tensor]) -> list[AddressTable]:
    """The tables of ``(B, S, ...)`` tensors on one device, one for each alignment that occurs.

    Raises:
        RuntimeError: while a CUDA graph is captured, for tensors that have no table yet.
    """
    key = tuple((x.data_ptr(), x.itemsize, x.shape, x.stride()) for x in tensors)
    device = tensors[0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        tables = _tables.get(key)
        if tables is None:
            if capturing:
                raise RuntimeError("move_slots_ was never called on these tensors: call it once before the capture")
            tables = _tables[key] = _build(tensors)
            while len(_tables) > MAXIMUM_TABLES:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        if capturing:
            _captured.append(tables)
    return tables


def _build(tensors: Sequence[torch.Tensor]) -> list[AddressTable]:
    entries = sorted((entry for tensor in tensors for entry in _entries(tensor)), key=lambda entry: entry.alignment)
    groups = itertools.groupby(entries, key=lambda entry: entry.alignment)
    return [_upload(list(group), alignment, tensors[0].device) for alignment, group in groups]


def _entries(tensor: torch.Tensor) -> Iterator[Entry]:
    """One entry, or several where the trailing axes are more than one axis of rows in memory."""
    if tensor.numel() == 0:
        return
    size = tensor.itemsize
    axes: list[tuple[int, int]] = []  # trailing axes that are one axis in memory, merged: (size, stride in bytes)
    for length, stride in zip(tensor.shape[2:], tensor.stride()[2:]):
        if axes and length > 1 and axes[-1][1] == length * stride * size:
            axes[-1] = (axes[-1][0] * length, stride * size)
        elif length > 1:
            axes.append((length, stride * size))
    row = axes.pop()[0] * size if axes and axes[-1][1] == size else size
    rows, stride_r = axes.pop() if axes else (1, 0)
    # the stride of an axis of size 1 means nothing
    stride_b, stride_s = (x.stride * size if x.size > 1 else 0 for x in map(_Axis, tensor.shape[:2], tensor.stride()))
    for place in itertools.product(*(range(length) for length, _ in axes)):
        offset = sum(i * stride for i, (_, stride) in zip(place, axes))
        yield Entry(tensor.data_ptr() + offset, stride_b, stride_s, stride_r, rows, row)


class _Axis(NamedTuple):
    size: int
    stride: int


def _upload(entries: list[Entry], alignment: int, device: torch.device) -> AddressTable:
    word = min(alignment, max(WORDS))
    numbers = torch.empty((len(entries), FIELDS), dtype=torch.int64, device=device)
    origin = numbers.data_ptr()
    lines = [
        [(entry.address - origin) // word, *(number // word for number in entry[1:4]), entry.rows, entry.bytes // word]
        for entry in entries
    ]
    # from pinned memory the copy does not wait for the device
    numbers.copy_(torch.tensor(lines, pin_memory=device.type == "cuda"), non_blocking=True)
    rows, words = max(entry.rows for entry in entries), max(entry.bytes for entry in entries) // word
    return AddressTable(numbers, numbers.view(WORDS[word]), rows, words, alignment // word)
