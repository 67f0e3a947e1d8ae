"""Counters of captured calls: outside the memory of a CUDA graph, so that the graph need not zero them by a node.

A graph may be replayed beside other work, on any stream, so each captured call has counters of its own. While a stream
is captured nothing may be allocated outside the graph's memory nor zeroed outside the graph. So they are pieces of an
arena that an eager call has zeroed before: a call is warmed up before it is captured. A captured call that finds too
little left takes zeros from the graph, by one more node; the next eager call of its thread adds to the arena.

A piece is never given back, since nobody tells when a graph is gone. Of a device the arena takes what its captured
calls take, each rounded up to 128 bytes, and at most one and a half `SLAB` more (or the largest call's, if larger).
"""

from __future__ import annotations

import threading

import torch

SLAB = 65536  # int32: 256 KiB, 1024 captured calls of a few images
LINE = 32  # int32: a cache line, so that graphs side by side do not share one


class Arena:
    """Zeroed counters of one device, each handed out once. Threads may share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free = [zeroed(SLAB, device)]  # what is left of each slab
        self.lock = threading.Lock()
        self.short = _Short()

    def take(self, size: int) -> torch.Tensor | None:
        """A piece that nobody else has or will have, or None where too little is left."""
        rounded = -(-size // LINE) * LINE
        with self.lock:
            place = next((place for place, free in enumerate(self.free) if len(free) >= rounded), None)
            found = None
            if place is not None:
                found, self.free[place] = self.free[place][:size], self.free[place][rounded:]
            if found is None or self._left() < SLAB // 2:
                self.short.of = max(self.short.of, rounded)
            return found

    def refill(self) -> None:
        """Before a call outside a capture: a new slab where a captured call of this thread found little left.

        Of this thread, because an allocation would break off the capture that another thread may be in.
        """
        wanted, self.short.of = self.short.of, 0
        if wanted == 0:
            return
        with self.lock:
            if self._left() < SLAB // 2 or all(len(free) < wanted for free in self.free):
                self.free = [free for free in self.free if len(free)] + [zeroed(max(wanted, SLAB), self.device)]

    def _left(self) -> int:
        return sum(map(len, self.free))


class _Short(threading.local):
    of = 0  # counters of the largest captured call of this thread that left little or found too little


_arenas: dict[torch.device, Arena] = {}
_lock = threading.Lock()


def take(device: torch.device, size: int) -> torch.Tensor | None:
    """Zeroed counters for a call that is being captured, kept for good; None where no eager call came before."""
    arena = _arenas.get(device)
    return None if arena is None else arena.take(size)


def refill(device: torch.device) -> None:
    """For a call outside a capture: see that later captures find counters."""
    arena = _arenas.get(device)
    if arena is not None:
        arena.refill()
        return
    with _lock:
        if device not in _arenas:
            _arenas[device] = Arena(device)


def zeroed(size: int, device: torch.device) -> torch.Tensor:
    """Zeros that are there when this returns: a graph may be replayed on a stream that does not wait for this one.

    The first eager call on a device and the rare refill wait for it.
    """
    zeros = torch.zeros(size, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return zeros
