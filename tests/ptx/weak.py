"""Global memory as weakly as PTX allows it, so that a missing release or acquire gives a wrong result.

A plain store lingers in its block until a release that is ordered behind it (by the same thread, or behind a barrier of
the block), or until chance or the end of the grid publishes it. A plain load may be served by what the block has read
before, in sectors of 32 bytes, until the block acquires. Stores of other blocks are then invisible although they are
done: what an L1 that is not coherent does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from formats import WORDS, Array
from storage import Buffer, Tensors

SECTOR = 32
GRAIN = 8  # bytes that are published together


class Overlay:
    """What one block knows of one buffer beyond what all see."""

    def __init__(self, size: int) -> None:
        self.lingers = np.zeros(size, bool)
        self.stored = np.zeros(size, np.uint8)
        self.epoch, self.thread = np.zeros(size, np.int32), np.zeros(size, np.int16)
        self.held = np.zeros(-(-size // SECTOR), bool)  # sectors in L1
        self.old = np.zeros(len(self.held) * SECTOR, np.uint8)


class WeakView:
    """Global memory as one block may see it. ``epoch`` counts the block's barriers."""

    def __init__(self, tensors: Tensors, chance: random.Random) -> None:
        self.tensors, self.chance, self.epoch = tensors, chance, 0
        self.overlays: dict[Buffer, Overlay] = {}

    def load(self, addresses: Array, size: int, why: object, cached: bool = False) -> Array:
        words = np.empty((len(addresses), size), np.uint8)
        for chosen, buffer, overlay, at in self._place(addresses, size, why):
            buffer.bytes_read += at.size
            if cached:
                self._fill_sectors(buffer, overlay, np.unique(at // SECTOR))
            found = np.where(overlay.lingers[at], overlay.stored[at], (overlay.old if cached else buffer.bytes)[at])
            words[chosen] = found
        return words.reshape(-1).view(WORDS[size])

    def store(self, addresses: Array, words: Array, threads: Array, why: object) -> None:
        values = np.ascontiguousarray(words).view(np.uint8).reshape(len(addresses), -1)
        for chosen, buffer, overlay, at in self._place(addresses, words.itemsize, why):
            who, value = np.broadcast_to(threads[chosen][:, None], at.shape), values[chosen]
            self._publish(buffer, overlay, at[overlay.lingers[at] & (overlay.thread[at] != who)])
            overlay.lingers[at], overlay.stored[at] = True, value
            overlay.epoch[at], overlay.thread[at] = self.epoch, who
            held = overlay.held[at // SECTOR]
            overlay.old[at[held]] = value[held]

    def settle(self, addresses: Array, size: int, why: object) -> None:
        for _, buffer, overlay, at in self._place(addresses, size, why):
            self._publish(buffer, overlay, at[overlay.lingers[at]])
            overlay.held[at // SECTOR] = False

    def release(self, threads: Array) -> None:
        for buffer, overlay in self.overlays.items():
            own = np.isin(overlay.thread, threads)
            self._publish(buffer, overlay, np.flatnonzero(overlay.lingers & ((overlay.epoch < self.epoch) | own)))

    def acquire(self) -> None:
        for overlay in self.overlays.values():
            overlay.held[:] = False

    def pass_barrier(self) -> None:
        self.epoch += 1

    def drain(self, share: float = 1.0) -> None:
        for buffer, overlay in self.overlays.items():
            at = np.flatnonzero(overlay.lingers)
            if share < 1 and at.size:
                grains = at // GRAIN
                lucky = np.random.default_rng(self.chance.getrandbits(32)).random(int(grains[-1]) + 1) < share
                at = at[lucky[grains]]
            self._publish(buffer, overlay, at)

    def _place(
        self, addresses: Array, size: int, why: object
    ) -> Iterator[tuple[slice | Array, Buffer, Overlay, Array]]:
        for chosen, buffer, at in self.tensors.place(addresses, size, why):
            if buffer not in self.overlays:
                self.overlays[buffer] = Overlay(len(buffer.bytes))
            yield chosen, buffer, self.overlays[buffer], (at * size)[:, None] + np.arange(size)

    def _fill_sectors(self, buffer: Buffer, overlay: Overlay, sectors: Array) -> None:
        fresh = sectors[~overlay.held[sectors]]
        overlay.held[fresh] = True
        for sector in fresh.tolist():
            at = slice(sector * SECTOR, min((sector + 1) * SECTOR, len(buffer.bytes)))
            overlay.old[at] = np.where(overlay.lingers[at], overlay.stored[at], buffer.bytes[at])

    def _publish(self, buffer: Buffer, overlay: Overlay, at: Array) -> None:
        buffer.bytes[at] = overlay.stored[at]
        overlay.lingers[at] = False
