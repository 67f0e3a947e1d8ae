"""The folder of a run: files that only grow, one batch of one setting at a time, and that a killed run goes on with.

A unit is one batch under one setting. Its line of ``costs.jsonl`` is written first, then its answers in one piece; both
are flushed. So whatever stands in ``answers.jsonl`` up to the end of a unit is whole, and what follows is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymvlm.app.session import InputError
from asymvlm.evaluation.record import FORMAT, Record, differences
from asymvlm.files.json_files import FileError, first_line, parse, read_lines, read_object

RUN, SAMPLES, ANSWERS, COSTS, SUMMARY = "run.json", "samples.jsonl", "answers.jsonl", "costs.jsonl", "summary.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Unit:
    """One batch under one setting: what its lines must say."""

    batch: int
    method: str
    keep: float | str
    samples: tuple[int, ...]

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """Of its lines of answers."""
        return [(number, self.method, self.keep) for number in self.samples]

    @property
    def cost(self) -> tuple[Any, ...]:
        """Of its line of costs."""
        return (self.batch, self.method, self.keep, list(self.samples))


class Store:
    """The files of one folder.

    Args:
        folder: made where it is missing.
        units: what is to be measured, in order.
    """

    def __init__(self, folder: Path, units: Sequence[Unit]) -> None:
        self.folder, self.units = folder, units

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process writes to the folder; the lock ends with the process, however that ends.

        Raises:
            InputError: if another one does, or the folder cannot be written to.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.folder} is being written by another process, wanted another folder") from error
            except OSError as error:
                raise InputError(f"{self.folder} cannot be locked ({error.strerror}), wanted another folder") from error
            yield

    def open(self, record: Record, samples: Sequence[dict[str, Any]]) -> int:
        """Begin a run, or go on with the one that is there.

        Returns:
            how many units are there whole; what stands behind them is cut off.
        Raises:
            InputError: if the folder holds another run, or lines that a run does not write.
        """
        file = self.folder / RUN
        if not file.exists():
            if (self.folder / ANSWERS).exists():
                raise InputError(f"{self.folder / ANSWERS} is there without {RUN}, wanted both or an empty folder")
            self._write(SAMPLES, "".join(_line(sample) for sample in samples))
            self._write(RUN, json.dumps(record, indent=2, allow_nan=False) + "\n")
            return 0
        found = self.read_record()
        if told := differences(found, record):
            more = f", and {len(told) - 3} more" if len(told) > 3 else ""
            raise InputError(
                f"{file} is of another run: {'; '.join(told[:3])}{more}: wanted the same to go on, or another folder"
            )
        if not (self.folder / SAMPLES).exists():
            self._write(SAMPLES, "".join(_line(sample) for sample in samples))
        return self._mend()

    def read_record(self) -> Record:
        """Of the run in the folder. Raises InputError if it cannot be read, or is of a newer format."""
        try:
            found = read_object(self.folder / RUN, '{"format": 1, ...}')
        except FileError as error:
            raise InputError(str(error)) from error
        if found.get("format") != FORMAT:
            raise InputError(f"{self.folder / RUN}: format {found.get('format')!r} found, wanted {FORMAT}")
        return found

    def append(self, unit: Unit, answers: Sequence[dict[str, Any]], cost: dict[str, Any]) -> None:
        """Write what one unit gave."""
        head = {"batch": unit.batch, "method": unit.method, "keep": unit.keep, "samples": list(unit.samples)}
        self._append(COSTS, _line({**head, **cost}))
        self._append(ANSWERS, "".join(map(_line, answers)))

    def read(self, name: str) -> list[dict[str, Any]]:
        """All lines of one of the files."""
        return [parse(line, where) for where, line in read_lines(self.folder / name)]

    def save_summary(self, summary: Record) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _mend(self) -> int:
        answers = self._whole(ANSWERS, lambda line: (line.get("sample"), line.get("method"), line.get("keep")))
        costs = self._whole(COSTS, lambda line: tuple(map(line.get, ("batch", "method", "keep", "samples"))))
        done = lines = 0
        for unit, cost in zip(self.units, costs, strict=False):
            here = answers[lines : lines + len(unit.samples)]
            keys = [key for key, _, _ in here]
            wrong = next((i for i, key in enumerate(keys) if key != unit.keys[i]), None)
            if wrong is not None:
                raise self._foreign(ANSWERS, lines + wrong, keys[wrong], unit.keys[wrong])
            if cost[0] != unit.cost:
                raise self._foreign(COSTS, done, cost[0], unit.cost)
            if len(here) < len(unit.samples):
                break
            done, lines = done + 1, lines + len(unit.samples)
        if len(costs) > len(self.units) or (done == len(self.units) and len(answers) > lines):
            raise InputError(f"{self.folder}: more lines than the run has, wanted an untouched folder or another one")
        self._cut(ANSWERS, answers[lines - 1][2] if lines else 0)
        self._cut(COSTS, costs[done - 1][2] if done else 0)
        return done

    def _whole(self, name: str, key: Callable[[dict[str, Any]], Any]) -> list[tuple[Any, int, int]]:
        """Keys, starts and ends of the whole lines of a file; a last line that was cut short is none."""
        path = self.folder / name
        if not path.exists():
            return []
        found: list[tuple[Any, int, int]] = []
        start = 0
        content = path.read_bytes()
        while (end := content.find(b"\n", start)) >= 0:
            where = f"{path}:{len(found) + 1}"
            try:
                line = parse(content[start:end].decode(), where)
                found.append((key(line), start, end + 1))
            except (ValueError, AttributeError) as error:
                raise InputError(f"{where}: no line of a run ({first_line(error)}), wanted another folder") from error
            start = end + 1
        return found

    def _foreign(self, name: str, line: int, found: Any, wanted: Any) -> InputError:
        return InputError(f"{self.folder / name}:{line + 1}: {found} found, wanted {wanted}, as the run has it")

    def _cut(self, name: str, size: int) -> None:
        path = self.folder / name
        if path.exists() and path.stat().st_size != size:
            os.truncate(path, size)

    def _append(self, name: str, text: str) -> None:
        with self._writing(), (self.folder / name).open("ab") as file:
            file.write(text.encode())

    def _write(self, name: str, text: str) -> None:
        """A whole file, or none of it."""
        unfinished = self.folder / f"{name}.unfinished"
        with self._writing():
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, self.folder / name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}), wanted room in a folder") from error


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


__all__ = ["ANSWERS", "COSTS", "RUN", "SAMPLES", "SUMMARY", "Store", "Unit"]
