"""The report of the last call, as each thread or task sees it: others may call the same model meanwhile."""

from __future__ import annotations

from contextvars import ContextVar
from weakref import WeakKeyDictionary

from asymvlm.report.pruning import PruningReport


class LastReport:
    """One a patched model. A thread or task that made a call finds its own, any other the newest there is.

    A task begins with what the one that made it had seen.
    """

    def __init__(self) -> None:
        self._newest: PruningReport | None = None

    def get(self) -> PruningReport | None:
        mine = _mine.get()
        return self._newest if mine is None else mine.get(self, self._newest)

    def set(self, report: PruningReport | None) -> None:
        # a copy: a task begins with the mapping of the one that made it, and must not write into it
        mine = _mine.get()
        mine = WeakKeyDictionary() if mine is None else mine.copy()
        mine[self] = report
        _mine.set(mine)
        self._newest = report


# lives in the context, so it dies with a thread; weak, so it dies with a patch
_mine: ContextVar[WeakKeyDictionary[LastReport, PruningReport | None] | None] = ContextVar(
    "asymvlm_last_report", default=None
)
