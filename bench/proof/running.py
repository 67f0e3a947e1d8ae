"""Run one step: a process group of its own that ends with its time, and a record of what came of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.harness import environment, results
from bench.proof import records
from bench.proof.steps import STEPS, Skip, beside

ROOT = Path(__file__).resolve().parents[2]
# how tools of NVIDIA refuse some virtual machines and some users
UNSUPPORTED = ("Device not supported", "ERR_NVGPUCTRPERM")
# glibc hands fresh pages back after every large tensor; their faults would be most of a CPU measurement, and vary
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def is_done(name: str, file: Path) -> bool:
    """Whether the file of the day says that these very sources have passed a step."""
    part = results.load(file)["parts"].get(name, {})
    return bool(part.get("status") == "passed" and part.get("source") == environment.source_digest())


def run_step(name: str, options: argparse.Namespace, file: Path, limit: float) -> str:
    """Run one step, record it in ``file`` and return its status: passed, failed, timeout or skipped."""
    record: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        command = STEPS[name].command(options, file.relative_to(ROOT) if file.is_relative_to(ROOT) else file, limit)
    except Skip as reason:
        print(f"== {name}: skipped, {reason}", flush=True)
        results.add_part(file, name, record | {"status": "skipped", "summary": str(reason)})
        return "skipped"
    print(f"== {name}, at most {limit:.0f} s: {shown(command)}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code, lines = stream(command, child_environment(options), limit)
    status = "timeout" if code is None else "failed" if code else "passed"
    if STEPS[name].kind == "xml":  # also of tests that were broken off
        records.to_junit(beside(file, name, "jsonl"), beside(file, name, "xml"))
    log = beside(file, name, "txt")  # of tools that write what they found there
    told = "\n".join([*lines, log.read_text(errors="replace") if log.exists() else ""])
    if status == "failed" and any(words in told for words in UNSUPPORTED):
        status = "skipped"
    said = [line for line in lines if line.strip()]
    record |= {"status": status, "seconds": round(time.monotonic() - started, 1), "command": shown(command)}
    record |= {"source": environment.source_digest(), "summary": said[-1] if said else ""}
    results.add_part(file, name, record if status == "passed" else record | {"tail": said[-40:]})
    print(f"== {name}: {status} in {record['seconds']} s", flush=True)
    return status


def stream(command: list[str], variables: dict[str, str], limit: float) -> tuple[int | None, list[str]]:
    """Run a command, echo its output line by line, and end its whole process group at ``limit`` seconds."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    output = process.stdout

    def echo() -> None:
        for line in output:
            lines.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=echo, daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:  # out of time, interrupted from the keyboard, or ended before a child of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return code, lines


def shown(command: list[str]) -> str:
    """A command as one would type it: results name no path of the machine they come from."""
    return shlex.join("python" if word == sys.executable else word for word in command)


def child_environment(options: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    variables |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    variables["BENCH_COMMAND"] = shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])  # what the results name
    if options.cache is not None:
        variables["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    return variables | (KEEP_PAGES if options.device == "cpu" else {})
