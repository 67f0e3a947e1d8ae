"""What the code that runs now is part of: the one context variable of the library. Threads do not see each other's.

A frame is what one layer of the library knows about the work in hand: a call of a patched model, a merge that only
records, a pass of scorer training, a decoder step that wants scores. Frames lie on top of each other, and each lives
exactly as long as the work it belongs to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(eq=False, kw_only=True)
class Frame:
    """A kind of work in hand; subclasses say what it knows."""

    outer: Frame | None = field(default=None, repr=False)  # what it is part of


_top: ContextVar[Frame | None] = ContextVar("asymvlm_frame", default=None)
Kind = TypeVar("Kind", bound=Frame)


def top() -> Frame | None:
    return _top.get()


def innermost(kind: type[Kind]) -> Kind | None:
    """The innermost frame of a kind; None without one."""
    frame = _top.get()
    while frame is not None and not isinstance(frame, kind):
        frame = frame.outer
    return frame


@contextlib.contextmanager
def entered(frame: Kind) -> Iterator[Kind]:
    """The frame is in hand for the time of a block."""
    push(frame)
    try:
        yield frame
    finally:
        pop(frame)


def push(frame: Frame) -> None:
    """For hooks, which begin and end in two functions; `pop` has to follow."""
    frame.outer = _top.get()
    _top.set(frame)


def pop(frame: Frame) -> None:
    """Take a frame away with all that was left on it by work that was interrupted. Does nothing if it is gone."""
    found = _top.get()
    while found is not None and found is not frame:
        found = found.outer
    if found is frame:
        _top.set(frame.outer)
