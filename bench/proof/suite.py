"""Run tests so that none hides another: ``python -m bench.proof.suite --records FILE --seconds N -- tests...``.

No number of failures ends the run. A kernel that reads outside of its tensors takes the CUDA context of its process
along, and every later test of that process fails too: each file with a failure therefore runs once more in a fresh
process, where launches are waited for one by one. What counts is how a test ended last.
Exit code: 0 all passed, 1 some failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.proof import records

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.proof.records", "--tb=short")
BY_WORKERS = ("-n", "--dist")  # options with a value that a single process needs not


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="file of lines, one a test")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no second run after this long")
    parser.add_argument("tests", nargs="+", help="what pytest is given")
    options = parser.parse_args(args)
    started = time.monotonic()
    options.records.parent.mkdir(parents=True, exist_ok=True)
    options.records.unlink(missing_ok=True)
    code = _pytest(options.records, options.tests)
    first = records.failed(records.read(options.records))
    for file in sorted({test.split("::")[0] for test in first}):
        if time.monotonic() - started > options.seconds - 5:
            print(f"{file}: not run again, out of time", flush=True)
            continue
        print(f"== again, alone: {file}", flush=True)
        _pytest(options.records, [*_options(options.tests), file], {"CUDA_LAUNCH_BLOCKING": "1", records.AGAIN: "1"})
    found = records.read(options.records)
    failed = records.failed(found)
    for test in failed:
        print(f"failed: {test}", flush=True)
    passed = {line["test"] for line in found if line["outcome"] == "passed"} - set(failed)
    mended = len(set(first) - set(failed))
    print(f"{len(passed)} passed, {len(failed)} failed, {mended} of the first run's failures passed alone", flush=True)
    return 1 if failed or (code not in (0, 1) and not first) or not found else 0


def _pytest(file: Path, tests: list[str], more: dict[str, str] | None = None) -> int:
    command = [sys.executable, *PYTEST, "--records", str(file), *tests]
    return subprocess.run(command, env=os.environ | (more or {}), check=False).returncode


def _options(tests: list[str]) -> list[str]:
    """What was given beside files and workers: ``-m gpu``."""
    kept, skip = [], False
    for number, word in enumerate(tests):
        if skip:
            skip = False
        elif word in BY_WORKERS:
            skip = True
        elif word.startswith("-") or (number and tests[number - 1] in ("-m", "-k")):
            kept.append(word)
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
