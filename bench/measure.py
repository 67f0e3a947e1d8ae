"""Measure cases and write them to a results file, one by one: ``python -m bench.measure --device cpu --file out.json``.

Correctness comes first: every variant is checked on poisoned memory, and a wrong answer aborts its case without a time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment, results
from bench.harness.timing import CapturedCalls, copy_ceiling, cpu_rounds, cuda_rounds, interleave, set_count
from bench.ops.decode import floors as decode_floors
from bench.ops.decode.cases import DECODE_CASES
from bench.ops.decode.shapes import decode_shapes_for
from bench.ops.methods.cases import METHOD_CASES
from bench.ops.methods.floors import method_traffic
from bench.ops.methods.shapes import method_shapes_for
from bench.ops.prefill import floors
from bench.ops.prefill.cases import CASES, Case, Inputs, Variant, WrongAnswer
from bench.ops.prefill.shapes import FIRST, shapes_for

# what a phase measures, at which sizes, and those of a GPU that are measured in fp32 too
PHASES: dict[str, tuple[dict[str, Any], Callable[..., tuple[Any, ...]], tuple[Any, ...]]] = {
    "prefill": (CASES, shapes_for, (FIRST,)),
    "decode": (DECODE_CASES, decode_shapes_for, ()),
    "methods": (METHOD_CASES, method_shapes_for, ()),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PRIMARY = ("device_us", "cpu_us", "wall_us", "stream_us")  # the first one there is stands for the variant
POISON = -12345
GRAPH_CALLS, GRAPH_BYTES = 48, 2 * 10**9  # long against the launch of a graph, yet a millisecond or two


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """Check and time every variant of ``case``, ``seconds`` a round and metric.

    Raises:
        WrongAnswer: if a variant is wrong; nothing of the case is reported then.
    """
    if "compiled" in " ".join(case.variants):
        torch.compiler.reset()  # what other cases compiled would count against the limit of recompilations
    sets = make_sets(case, device)
    record: dict[str, Any] = {"sets": len(sets), "variants": {}}
    rounds = {}
    for name in case.variants:
        entry: dict[str, Any] = {}
        record["variants"][name] = entry
        try:
            entry["max_error"] = check(case, name, sets)
            rounds[name] = _rounds(case, name, sets, device, seconds, entry)
        except WrongAnswer as error:
            raise WrongAnswer(f"{case.key}, {name}: {error}") from error
        except Exception as error:
            if name == "ours":
                raise
            entry["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    traffic = model_of(case.op)(case.op, case.shape, case.dtype.itemsize)
    record["bytes"] = traffic.minimal
    for name, metrics in interleave(rounds).items():
        record["variants"][name] |= metrics
        primary = next(metric for metric in PRIMARY if metric in metrics)
        moved = traffic.minimal if case.variants[name].answers else _copied(case)
        record["variants"][name] |= {"primary": primary, "gbs": round(moved / metrics[primary]["median"] / 1e3, 1)}
    return record


def model_of(op: str) -> Any:
    """The byte count of the phase that ``op`` belongs to."""
    if op in DECODE_CASES:
        return decode_floors.decode_traffic
    return method_traffic if op in METHOD_CASES else floors.traffic


def make_sets(case: Case, device: str) -> list[Inputs]:
    """Different random inputs, enough to fill the last cache four times where memory allows."""
    generator = torch.Generator(device).manual_seed(0)
    first = case.make(generator)
    size = sum(x.nbytes for x in first if isinstance(x, torch.Tensor))
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else 4 * 2**30
    return [first] + [case.make(generator) for _ in range(set_count(size, environment.cache_bytes(device), memory) - 1)]


def check(case: Case, name: str, sets: list[Inputs]) -> float:
    """Largest error of a variant on the first and the last set, on poisoned memory where the allocator reuses it."""
    variant = case.variants[name]
    error = 0.0
    for inputs in (sets[0], sets[-1]):
        blocks = [poison(torch.empty_like(x)) for x in tensors(variant.function(*inputs))]
        del blocks
        output = variant.function(*inputs)
        if variant.answers:
            error = max(error, case.check(inputs, output, variant.tolerance))
    return error


def poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)


def tensors(output: Any) -> Iterator[torch.Tensor]:
    yield from (output if isinstance(output, tuple) else (output,))


def _rounds(
    case: Case, name: str, sets: list[Inputs], device: str, seconds: float, entry: dict[str, Any]
) -> dict[str, Any]:
    variant = case.variants[name]
    calls = [_bind(variant, inputs) for inputs in sets]
    if device == "cpu":
        return cpu_rounds(calls, seconds)
    captured = warm = None
    if variant.capturable:
        size = sum(x.nbytes for x in sets[0] if isinstance(x, torch.Tensor))
        passes = max(1, min(GRAPH_CALLS, GRAPH_BYTES // size) // len(sets))
        try:
            captured = CapturedCalls(calls * passes, held=len(calls))
            warm = CapturedCalls(calls[:1] * len(calls) * passes, held=1)
        except RuntimeError as error:
            entry["not_captured"] = str(error).strip().splitlines()[0][:160]
    else:
        entry["not_captured"] = "synchronises"
    if captured is not None:
        for output in captured.outputs:
            for tensor in tensors(output):
                poison(tensor)
        captured.graph.replay()
        torch.cuda.synchronize()
        for place in {0, len(sets) - 1} if variant.answers else ():
            case.check(sets[place], captured.outputs[place], variant.tolerance)
    return cuda_rounds(calls, captured, warm, seconds)


def _bind(variant: Variant, inputs: Inputs) -> Any:
    return lambda: variant.function(*inputs)


def _copied(case: Case) -> int:
    """Bytes that the plain copy of a case, or a plain decode step, reads and writes."""
    if case.op in DECODE_CASES:
        return decode_floors.decode_traffic("attend", case.shape, case.dtype.itemsize).minimal
    rows = case.shape.N if case.op == "score_tokens" else case.shape.K
    return 2 * case.shape.B * rows * case.shape.D * case.dtype.itemsize


def wanted(
    phase: str, device: str, smoke: bool, ops: list[str] | None, names: list[str], dtypes: list[str]
) -> list[Case]:
    """The cases to measure, most telling first: one size after the other, bf16 before fp32."""
    cases, shapes, in_fp32 = PHASES[phase]
    found = []
    for shape in shapes(device, smoke):
        for dtype in dtypes:
            # on a GPU fp32 runs on other units and is no model's type: one size shows it
            skipped = device == "cuda" and dtype == "float32" and shape not in in_fp32
            if skipped or (names and shape.name not in names):
                continue
            found += [cases[op](shape, DTYPES[dtype], device) for op in cases if op in (ops or cases)]
    # names say in which order, where they are given
    found.sort(key=lambda case: names.index(case.shape.name) if names else 0)
    return list({case.key: case for case in found}.values())  # select has no dtype of its own


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that a command measures."""
    cases = wanted(options.phase, options.device, options.smoke, options.op, options.shape, options.dtype)
    return [case for case in (choose(case, options.compiled) for case in cases) if case.variants]


def choose(case: Case, compiled: str) -> Case:
    """``case`` with or without its compiled peers. With ``"only"`` a case that has none loses all its variants."""
    plain = {name: variant for name, variant in case.variants.items() if not _is_compiled(name)}
    has = len(plain) < len(case.variants)
    if compiled == "without" and has:
        return replace(case, variants=plain)
    return replace(case, variants={}) if compiled == "only" and not has else case


def _is_compiled(name: str) -> bool:
    return "compiled" in name or name == "FlexAttention"


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--file", type=Path, required=True, help="results file, merged into")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, few calls: tests the harness")
    parser.add_argument("--resume", action="store_true", help="skip what this source has measured already")
    parser.add_argument("--phase", choices=tuple(PHASES), default="prefill")
    parser.add_argument(
        "--op", nargs="+", choices=(*CASES, *DECODE_CASES, *METHOD_CASES), help="of the phase; all by default"
    )
    parser.add_argument("--shape", nargs="+", default=[], help="names from bench/ops/prefill/shapes.py; all by default")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--compiled", choices=("with", "without", "only"), default="with", help="the compiled peers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this long")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    return run(options)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    record: dict[str, Any] = {
        "command": os.environ.get("BENCH_COMMAND") or shlex.join(["python", "-m", "bench.measure", *sys.argv[1:]]),
        "environment": environment.describe(options.device),
        "ceiling": copy_ceiling(options.device, options.smoke),
    }
    number = results.add_run(options.file, record)
    seconds = 0.0 if options.smoke else 0.4 if options.device == "cpu" else 0.05
    failures = 0
    outcome: dict[str, Any]
    for case in chosen(options):
        key = case.key if options.device == "cuda" else f"{case.key}@{torch.get_num_threads()}"
        if options.resume and results.is_measured(options.file, key, record["environment"]["source"], case.variants):
            print(f"{key}: measured already", flush=True)
            continue
        if time.monotonic() - started > options.seconds:
            print(f"{key}: not measured, out of time (--resume goes on)", flush=True)
            failures += 1
            continue
        try:
            with torch.no_grad():
                outcome = measure(case, options.device, seconds)
            print(results.line(key, outcome), flush=True)
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
            print(f"{key}: FAILED, {outcome['error']}", flush=True)
            failures += 1
        results.add_case(options.file, key, outcome | {"run": number})
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
