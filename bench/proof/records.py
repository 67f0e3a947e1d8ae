"""A record of each test as it ends, in lines of JSON, and those lines as a JUnit file.

A pytest plugin (``-p bench.proof.records --records FILE``). pytest's own JUnit file is written when the run is over: a
run that is broken off would leave none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

AGAIN = "ASYMVLM_AGAIN"  # set in a second run of the files that failed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="file to append a line to for each test")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--records")
    if file is not None and not hasattr(config, "workerinput"):  # with pytest-xdist the workers report to us
        config.pluginmanager.register(_Recorder(Path(file)), "asymvlm-records")


class _Recorder:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.again = bool(os.environ.get(AGAIN))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for the call of a test, or for the part around it that failed or skipped it."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.duration, str(report.longrepr or ""))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, str(report.longrepr))

    def _write(self, test: str, outcome: str, seconds: float, told: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "again": self.again}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line | {"told": told[-4000:]}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All whole lines: the last one may be half of one."""
    return list(_lines(file.read_text(encoding="utf-8"))) if file.exists() else []


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def failed(lines: list[dict[str, Any]]) -> list[str]:
    """The tests that failed when they last ran."""
    last = {line["test"]: line["outcome"] for line in lines}
    return [test for test, outcome in last.items() if outcome == "failed"]


def to_junit(lines: Path, file: Path) -> None:
    """Turn the lines into a JUnit file, one suite for each run, and remove them."""
    found = read(lines)
    if not found:
        return
    suites = ElementTree.Element("testsuites")
    for again in sorted({line["again"] for line in found}):
        part = [line for line in found if line["again"] == again]
        counts = {"tests": str(len(part)), "failures": str(sum(line["outcome"] == "failed" for line in part))}
        counts["skipped"] = str(sum(line["outcome"] == "skipped" for line in part))
        name = "again, in fresh processes" if again else "first"
        suite = ElementTree.SubElement(suites, "testsuite", {"name": name, **counts})
        for line in part:
            place, _, test = line["test"].partition("::")
            case = ElementTree.SubElement(suite, "testcase", classname=place, name=test, time=str(line["seconds"]))
            if line["outcome"] != "passed":
                kind = "failure" if line["outcome"] == "failed" else "skipped"
                told = "".join(sign for sign in line["told"] if sign.isprintable() or sign in "\n\t")
                ElementTree.SubElement(case, kind, message=(told.strip().splitlines() or [""])[-1][:200]).text = told
    ElementTree.indent(suites)
    partial = file.with_suffix(".partial")
    ElementTree.ElementTree(suites).write(partial, encoding="utf-8", xml_declaration=True)
    os.replace(partial, file)
    lines.unlink()
