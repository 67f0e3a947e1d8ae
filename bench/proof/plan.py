"""The plan of a run, without running it: times, files, and what each step would compile that the first did not."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.proof.running import ROOT, child_environment
from bench.proof.steps import SECONDS, STEPS

Needs = Mapping[str, Sequence[str] | None]  # keys of the builds of a step; None where nobody knows beforehand


def needs(arch: int, options: argparse.Namespace) -> Needs:
    """What every step would compile, told by a process that compiles nothing."""
    command = [sys.executable, "-m", "bench.proof.builds", "--arch", str(arch)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(options), stdout=subprocess.PIPE, text=True, check=True
    )
    found: Needs = json.loads(done.stdout)
    return found


def new(found: Needs, names: Sequence[str]) -> dict[str, int | None]:
    """How many builds each of the steps ``names``, run in this order, would be the first to ask for."""
    there: set[str] = set()
    counts: dict[str, int | None] = {}
    for name in names:
        wanted = found.get(name)
        counts[name] = None if wanted is None else len(set(wanted) - there)
        there |= set(wanted or ())
    return counts


def show(names: Sequence[str], options: argparse.Namespace) -> None:
    """Print one line a step."""
    arch = options.arch or 90
    found = needs(arch, options)
    counts = new(found, names)
    print(f"steps for sm_{arch}, at most {sum(_limit(name, options) for name in names):.0f} s:")
    for name in names:
        wanted, count = found.get(name), counts[name]
        told = "builds unknown" if wanted is None else f"{len(wanted):3} builds, {count:3} of them new"
        about = (STEPS[name].command.__doc__ or "").split("\n")[0]
        rest = ", and what is left" if STEPS[name].takes_rest else ""
        print(f"  {name:10} {_limit(name, options):4.0f} s{rest}; {told}; {about}")


def _limit(name: str, options: argparse.Namespace) -> float:
    return float(options.limit or STEPS[name].limit * options.seconds / SECONDS)
