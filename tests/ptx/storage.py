"""Memory of the emulated GPU: the tensors of this process, and the shared memory of a block with its races.

Values move as arrays of one word a thread, of 1, 2, 4, 8 or 16 bytes.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from formats import WARP, WORDS, Array, Fault
from program import Instruction

SEVERAL = 255  # in place of a warp that reads: more than one did
POISON = 0xFF  # shared memory that was never written


class Buffer:
    """The bytes of one tensor's storage."""

    def __init__(self, address: int, size: int, name: str) -> None:
        self.start, self.end, self.name = address, address + size, name
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self.bytes_read = 0
        self._words = {word: self.bytes[: size - size % word].view(WORDS[word]) for word in WORDS}

    def words(self, size: int) -> Array:
        return self._words[size]


class Tensors:
    """Global memory. An access outside all tensors is a fault, as is one that is not aligned."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []

    def add(self, address: int, size: int, name: str = "") -> None:
        if size == 0 or any(buffer.start <= address and address + size <= buffer.end for buffer in self.buffers):
            return
        if address % 16:
            raise Fault(f"{name}: a tensor at {address:#x}, which is no multiple of 16")
        self.buffers.append(Buffer(address, size, name))
        self.buffers.sort(key=lambda buffer: buffer.start)
        self._starts = [buffer.start for buffer in self.buffers]

    def find(self, address: int, size: int, why: object) -> Buffer:
        number = bisect.bisect_right(self._starts, address) - 1
        if number >= 0 and address + size <= self.buffers[number].end:
            return self.buffers[number]
        near = [f"{buffer.name} {buffer.start:#x}..{buffer.end:#x}" for buffer in self.buffers[max(number, 0) :][:2]]
        raise Fault(f"{why}: {size} bytes at {address:#x}, outside every tensor; near {', '.join(near) or 'none'}")

    def place(self, addresses: Array, size: int, why: object) -> Iterator[tuple[slice | Array, Buffer, Array]]:
        """Which of the accesses go to which buffer, and to which words of it."""
        low, high = int(addresses.min()), int(addresses.max())
        first = self.find(low, size, why)
        if high + size <= first.end:
            groups: list[tuple[slice | Array, Buffer]] = [(slice(None), first)]
        else:
            numbers = np.searchsorted(np.array(self._starts, np.uint64), addresses, "right") - 1
            groups = [(np.flatnonzero(numbers == number), self.buffers[number]) for number in np.unique(numbers)]
        for chosen, buffer in groups:
            offsets = (addresses[chosen] - np.uint64(buffer.start)).astype(np.int64)
            self.find(buffer.start + int(offsets.max()), size, why)
            if np.any(offsets % size):
                raise Fault(f"{why}: an access of {size} bytes that is not aligned")
            yield chosen, buffer, offsets // size


class GlobalView(Protocol):
    """How the threads of one block see global memory."""

    tensors: Tensors

    def load(self, addresses: Array, size: int, why: object, cached: bool = False) -> Array: ...
    def store(self, addresses: Array, words: Array, threads: Array, why: object) -> None: ...
    def settle(self, addresses: Array, size: int, why: object) -> None:
        """Before an atomic operation: the block's own plain stores to these addresses come first."""

    def release(self, threads: Array) -> None: ...
    def acquire(self) -> None: ...
    def pass_barrier(self) -> None: ...
    def drain(self, share: float = 1.0) -> None:
        """Stores that linger reach the other blocks: a share of them, or all."""


class StrongView:
    """Every store is seen by all at once."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def load(self, addresses: Array, size: int, why: object, cached: bool = False) -> Array:
        words = np.empty(len(addresses), WORDS[size])
        for chosen, buffer, at in self.tensors.place(addresses, size, why):
            words[chosen] = buffer.words(size)[at]
            buffer.bytes_read += len(at) * size
        return words

    def store(self, addresses: Array, words: Array, threads: Array, why: object) -> None:
        for chosen, buffer, at in self.tensors.place(addresses, words.itemsize, why):
            buffer.words(words.itemsize)[at] = words[chosen]

    def settle(self, addresses: Array, size: int, why: object) -> None: ...
    def release(self, threads: Array) -> None: ...
    def acquire(self) -> None: ...
    def pass_barrier(self) -> None: ...
    def drain(self, share: float = 1.0) -> None: ...


class Shared:
    """Shared memory of a block. Two warps that touch a byte between two barriers, one of them writing, are a race."""

    def __init__(self, size: int, races: set[str]) -> None:
        self.size, self.races = size, races
        rounded = -(-size // 16) * 16 + 16
        self.bytes = np.full(rounded, POISON, np.uint8)
        self._writers, self._readers = np.zeros(rounded, np.uint8), np.zeros(rounded, np.uint8)  # warp + 1
        arrays = self.bytes, self._writers, self._readers
        self._words = {word: tuple(array.view(dtype) for array in arrays) for word, dtype in WORDS.items()}

    def load(self, addresses: Array, size: int, threads: Array, why: Instruction) -> Array:
        at = self._place(addresses, size, why)
        words, writers, readers = self._words[size]
        warps = self._warps(threads, size)
        if _foreign(writers[at], warps).any():
            self.complain("read of what another warp wrote", why)
        before = readers[at].view(np.uint8)
        readers[at] = np.where((before == 0) | (before == warps), warps, SEVERAL).astype(np.uint8).view(WORDS[size])
        return words[at]

    def store(self, addresses: Array, words: Array, threads: Array, why: Instruction) -> None:
        at = self._place(addresses, words.itemsize, why)
        self._claim(at, words.itemsize, threads, why)
        self._words[words.itemsize][0][at] = words

    def claim(self, addresses: Array, size: int, threads: Array, why: Instruction) -> None:
        """A store that has begun and will come later."""
        self._claim(self._place(addresses, size, why), size, threads, why)

    def load_by_all(self, addresses: Array, why: Instruction) -> Array:
        """16-bit words that the warps of a group read together."""
        at = self._place(addresses.reshape(-1), 2, why)
        words, writers, readers = self._words[2]
        if writers[at].any():
            self.complain("read of what was written since the last barrier", why)
        readers[at] = np.uint16(SEVERAL * 257)
        return words[at].reshape(addresses.shape)

    def pass_barrier(self) -> None:
        self._writers.fill(0)
        self._readers.fill(0)

    def complain(self, what: str, why: Instruction) -> None:
        self.races.add(f"race in shared memory: {what}: {why}")

    def _claim(self, at: Array, size: int, threads: Array, why: Instruction) -> None:
        _, writers, readers = self._words[size]
        warps = self._warps(threads, size)
        if _foreign(writers[at], warps).any():
            self.complain("write over what another warp wrote", why)
        if _foreign(readers[at], warps).any():
            self.complain("write over what another warp read", why)
        writers[at] = warps.view(WORDS[size])

    def _place(self, addresses: Array, size: int, why: Instruction) -> Array:
        if len(addresses) and not 0 <= int(addresses.max()) <= self.size - size:
            raise Fault(f"{why}: {size} bytes at {int(addresses.max())} of {self.size} bytes of shared memory")
        if np.any(addresses % size):
            raise Fault(f"{why}: an access of {size} bytes that is not aligned")
        return addresses // size

    def _warps(self, threads: Array, size: int) -> Array:
        return np.repeat((threads // WARP + 1).astype(np.uint8), size)


def _foreign(words: Array, warps: Array) -> Array:
    """Bytes that another warp has touched."""
    touched = words.view(np.uint8)
    return (touched != 0) & (touched != warps)
