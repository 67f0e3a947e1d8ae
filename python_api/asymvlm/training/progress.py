"""Progress on stderr for work that takes minutes: a bar in a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str], None]  # one unit done; the text stands behind the bar
SECONDS = 30.0  # between two lines


@contextlib.contextmanager
def progress_bar(
    title: str, total: int, *, shown: bool, done: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Progress through ``total`` units, ``done`` of them already; silent unless ``shown``."""
    if not shown:
        yield lambda text: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(title, total, done, console, clock).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(title, total=total, completed=done, text="")

        def advance(text: str) -> None:
            bar.update(task, advance=1, text=text)

        yield advance


class _Lines:
    """A line at the beginning and at the end, and one every `SECONDS` between."""

    def __init__(self, title: str, total: int, done: int, console: Console, clock: Callable[[], float]) -> None:
        self.title, self.total, self.done, self.console, self.clock = title, total, done, console, clock
        self.before, self.began = done, clock()
        self.spoke = self.began
        self._say("begins")

    def advance(self, text: str) -> None:
        self.done += 1
        now = self.clock()
        if now - self.spoke < SECONDS and self.done < self.total:
            return
        self.spoke, spent = now, now - self.began
        left = spent / (self.done - self.before) * (self.total - self.done)
        words = f", about {_duration(left)} left" if self.done < self.total else ""
        self._say(f"{_duration(spent)}{words}{f', {text}' if text else ''}")

    def _say(self, words: str) -> None:
        line = f"{self.title}: {self.done} of {self.total}, {words}"
        self.console.print(line, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
