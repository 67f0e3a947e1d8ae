"""Faults planted in the text of a kernel: what the emulator has to find. Each answers with the changed PTX."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

Change = Callable[[str], str]


def replaced(pattern: str, by: str, text: str) -> str:
    """Every occurrence; a kernel without one stays as it is."""
    return re.sub(pattern, by, text)


def without_barrier(number: int, text: str) -> str:
    """Without the barrier of that number, where there are so many."""
    found = list(re.finditer(r"bar(rier)?\.sync[^;]*;", text))
    if number >= len(found):
        return text
    return text[: found[number].start()] + text[found[number].end() :]


def barriers(text: str) -> int:
    return len(re.findall(r"bar(?:rier)?\.sync[^;]*;", text))


# An arrival that orders nothing; a ready flag that publishes nothing; a wait whose load may come from L1, for ever.
ORDER: dict[str, Change] = {
    "relaxed arrival": functools.partial(replaced, r"\.gpu\.acq_rel\.add", ".gpu.relaxed.add"),
    "relaxed flag": functools.partial(replaced, r"\.gpu\.release\.exch", ".gpu.relaxed.exch"),
    "plain wait": functools.partial(replaced, r"ld\.global\.gpu\.acquire", "ld.global"),
}
