"""Compare our methods with other people's implementations: ``make peers``, results in ``bench/results/peers``.

Each peer runs in an environment of its own, ``.venv-peer-<name>``, as ``python -m bench.peers.<name> FOLDER``, and
leaves one file a case. Beside it the published rule is computed in plain torch, and our library runs. The exit code is
1 where we differ from the rule, or a peer from us in a way that is not known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import environment, results
from bench.peers.cases import KV_CASES
from bench.peers.pages import PAGES, positions
from bench.peers.records import Side, judge

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "peers"
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "."}
Cases = Iterator[tuple[str, dict[str, Any], dict[str, Any]]]


def kvpress_cases(folder: Path) -> Cases:
    """Name, record and versions of each case."""
    from bench.peers import ours, rules

    for case in KV_CASES:
        peer = Side.load(folder / f"{case.name}.safetensors")
        other = rules.DESCRIBED.get(case.method)
        record = judge(
            case.expected,
            ours=ours.run(case),
            peer=peer,
            published=rules.run(case, rules.PUBLISHED[case.method]),
            described=None if other is None else rules.run(case, other),
        )
        yield case.name, asdict(case) | record, peer.facts


def openvino_cases(folder: Path) -> Cases:
    """Name, record and versions of each page; of the positions, how far the text behind the images is off."""
    from transformers.utils import logging

    from bench.peers import dpp, ours_vision

    logging.disable_progress_bar()
    for page in PAGES:
        peer = Side.load(folder / f"{page.name}.safetensors")
        record = judge(page.expected, ours=ours_vision.run(folder / "model", page), peer=peer,
                       **dpp.run(folder / "model", page))  # fmt: skip
        found = [*peer.facts.pop("positions").values()]
        wanted = positions(page, peer.held[0, 0, 0])
        record["text_moved_by"] = wanted[0][-1] - found[0][-1]
        record["positions_equal"] = wanted == found
        yield page.name, asdict(page) | record, peer.facts


PEERS: dict[str, Callable[[Path], Cases]] = {"kvpress": kvpress_cases, "openvino": openvino_cases}


def run_peer(name: str, folder: Path) -> None:
    """Run a peer's side in its environment.

    Raises:
        SystemExit: it is not set up, or failed; with the end of what it said.
    """
    python = ROOT / f".venv-peer-{name}" / "bin" / "python"
    if not python.exists():
        sys.exit(f"bench.peers: {python.relative_to(ROOT)} is missing, `make peers` sets it up")
    command = [str(python), "-m", f"bench.peers.{name}", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench.peers: {name} failed\n{done.stderr[-4000:]}")


def compare_with(name: str, results_folder: Path) -> bool:
    """Run one peer and ours, write the record; whether all cases are as expected."""
    cases: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_peer(name, Path(folder))
        for case, record, facts in PEERS[name](Path(folder)):
            cases[case] = record
            versions |= facts
            same = record["peer"]
            found = "equal" if same["equal"] else f"differs in {same['lines'] - same['lines_equal']} of {same['lines']}"
            print(f"{name}/{case}: {found}{'' if record['as_expected'] else ', NOT AS EXPECTED'}", flush=True)
    content = {
        "schema": 1,
        "command": f"make peers ARGS={name}",
        "peer": versions,
        "ours": environment.describe("cpu"),
        "cases": cases,
    }
    results.save(results_folder / f"{name}.json", content)
    return all(record["as_expected"] for record in cases.values())


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=(*PEERS, []), help="all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(args)
    verdicts = [compare_with(name, options.out) for name in options.peers or PEERS]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
