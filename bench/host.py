"""The host's share of a call, measured without a GPU: what Python does until the driver would launch.

    python -m bench.host --before ../older-checkout --file bench/results/<machine>/<day>-host.json

Triton's launch runs up to the driver, which does nothing (`bench.harness.fake_gpu`), from CPU tensors. So no figure has
the allocator of CUDA in it, nor the driver, nor the reading of arguments in C, nor the switch to a tensor's device.
Variants take turns, round by round: ``ours``, ``plain`` (every kernel launched by Triton, nothing replayed) and, of
another checkout of this repository, ``before``. Figures are processor time of the calling thread.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is decorated
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that this default will change
if "BENCH_KERNELS" in os.environ:  # another checkout's kernels under this benchmark
    sys.path.insert(0, os.environ["BENCH_KERNELS"])
    import asymvlm_kernels

    assert asymvlm_kernels.__file__.startswith(sys.path.pop(0))

import argparse
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import asymvlm_kernels as ak
from bench.harness import environment, results
from bench.harness.fake_gpu import fake_gpu

ROUNDS, CALLS, WARM_UP = 40, 100, 20
Call = Callable[[], Any]


def prompt(S: int = 1024, D: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vision = torch.arange(S)[None] < S - 40
    return torch.zeros(1, S, D, dtype=torch.bfloat16), vision, ~vision


def prune_bare() -> Call:
    inputs, budget = prompt(), ak.UniformBudget(0.3)
    return lambda: ak.prune_sequence(*inputs, None, budget, static=True)


def prune_carrying() -> Call:
    (embeds, vision, text), weight, budget = prompt(), torch.ones(256), ak.UniformBudget(0.3)
    ids = torch.zeros(vision.shape, dtype=torch.int64)
    carry, pads = {"input_ids": ids, "position_ids": ids.expand(3, *ids.shape).contiguous()}, {"input_ids": -1}
    return lambda: ak.prune_sequence(embeds, vision, text, weight, budget, carry=carry, carry_pad=pads, static=True)


def attend(**options: Any) -> Call:
    q = torch.zeros(1, 1, 32, 128, dtype=torch.bfloat16)
    k, v = (torch.zeros(1, 8, 2048, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    lengths = torch.full((1,), 2048, dtype=torch.int32)
    return lambda: ak.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)


def score() -> Call:
    embeds, _, _ = prompt()
    text, weight = embeds[:, :40].clone(), torch.ones(256)
    return lambda: ak.score_tokens(embeds, text, weight)


def select() -> Call:
    scores, counts = torch.zeros(1, 1024), torch.tensor([300])
    return lambda: ak.select_tokens(scores, counts, capacity=300)


def gather() -> Call:
    rows, index = prompt()[0], torch.zeros(1, 300, dtype=torch.int64)
    return lambda: torch.ops.asymvlm.gather_rows(rows, index, 0)


def plan() -> Call:
    keep = torch.ones(1, 2048, dtype=torch.bool)
    return lambda: ak.plan_moves(keep)


CASES: dict[str, Callable[[], Call]] = {
    "prune_sequence(static=True)": prune_bare,
    "prune_sequence(static=True, carry=ids and positions)": prune_carrying,
    "flash_attn_with_kvcache(return_scores=True)": lambda: attend(return_scores=True),
    "flash_attn_with_kvcache()": attend,
    "score_tokens": score,
    "select_tokens": select,
    "gather_rows (the op)": gather,
    "plan_moves": plan,
}


def round_us(call: Call, calls: int = CALLS) -> float:
    started = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - started) / calls / 1e3


def serve(plain: bool) -> None:
    """Answer each line of input, the name of a case, by one round of it."""
    torch.set_num_threads(1)
    made: dict[str, Call] = {}
    replay = patch("asymvlm_kernels.launch.interface.driver_if_plain", lambda: None) if plain else None
    with fake_gpu(), ak.use_backend("triton"), torch.no_grad():
        if replay is not None:
            replay.start()
        for line in sys.stdin:
            name = line.strip()
            if name not in made:
                made[name] = CASES[name]()
                round_us(made[name], WARM_UP)
            print(round_us(made[name]), flush=True)


class Worker:
    """A process that measures one variant."""

    def __init__(self, kernels: Path, *options: str) -> None:
        command = [sys.executable, "-m", "bench.host", "--serve", *options]
        env = {**os.environ, "BENCH_KERNELS": str(kernels), "PYTHONPATH": str(environment.ROOT)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def round(self, case: str) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        print(case, file=stdin, flush=True)
        return float(stdout.readline())


def source(checkout: Path) -> str:
    """The commit of another checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="results file, merged into; none by default")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.plain)
        return
    workers = {"ours": Worker(environment.ROOT), "plain": Worker(environment.ROOT, "--plain")}
    if options.before:
        workers["before"] = Worker(options.before.resolve())
    number = 0
    if options.file:
        command = shlex.join(["python", "-m", "bench.host", *sys.argv[1:]])
        run = {"command": command, "environment": environment.describe("cpu")}
        number = results.add_run(options.file, run | ({"before": source(options.before)} if options.before else {}))
    for case in CASES:
        rounds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                rounds[name].append(worker.round(case))
        figures = {name: {"least": min(us), "median": statistics.median(us)} for name, us in rounds.items()}
        shown = ", ".join(f"{name} {us['least']:.1f} (median {us['median']:.1f})" for name, us in figures.items())
        print(f"{case}: us {shown}", flush=True)
        if options.file:
            variants = {
                name: {"primary": "cpu_us", "cpu_us": {key: round(us, 1) for key, us in figure.items()}}
                for name, figure in figures.items()
            }
            results.add_case(options.file, case, {"variants": variants, "run": number})
    for worker in workers.values():
        worker.process.communicate()


if __name__ == "__main__":
    main()
