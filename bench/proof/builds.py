"""What the steps of `make gpu` will have Triton compile, without a GPU: ``python -m bench.proof.builds --arch 90``.

The very calls of each step are made on CPU tensors that nobody fills, inside `asymvlm_kernels.warming.recording`. With
``--file`` all of it is compiled, many at a time, into Triton's cache, and told there build by build; without, one line
of JSON says which builds each step needs. Not counted: the suite's, of small sizes that only its tests know.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter cannot be compiled
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this process forks: no context

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig

from asymvlm.app.kernel_calls import kernel_calls
from asymvlm.methods.before.similarity import sequence_scores
from asymvlm.models import registered
from asymvlm_kernels.unproven import paths
from asymvlm_kernels.warming.calls import call_all
from asymvlm_kernels.warming.compiling import compile_builds, distinct
from asymvlm_kernels.warming.recording import Build, recording
from bench import bench_eviction, measure, vlm
from bench.harness import exercise
from bench.ops.decode import cases as decode_cases
from bench.ops.decode.shapes import DecodeShape
from bench.ops.prefill import cases as prefill_cases
from bench.proof import goals, profiled, steps

OVERLAPS = 90  # oldest architecture that can
HARMLESS = {torch.int32: 1, torch.int64: -1}  # a length, a place: what nobody has computed is read as these
FILE = Path("day.json")


def of_cases(names: list[str]) -> None:
    """The cases of a command of `bench.measure`."""
    for case in measure.chosen(measure.parse(names)):
        inputs = case.make(torch.Generator())
        for name, variant in case.variants.items():
            if name.startswith("ours") and not (name == goals.SLOW and "ours static" in case.variants):
                variant.function(*inputs)


def of_core() -> None:
    for goal in goals.goals():
        fixed = goal.variant == goals.SLOW and "ours static" in goal.case.variants
        goals.Goal(goal.case, "ours static" if fixed else goal.variant).run(goal.case.make(torch.Generator()))


def of_profile() -> None:
    for case, variant in profiled.calls():
        case.variants[variant].function(*case.make(torch.Generator()))


def of_sanitizer() -> None:
    (B, N, D, L), dtype = exercise.ONE
    exercise.exercise(B, N, D, L, dtype, "cpu", "triton")
    exercise.exercise_decode(B, N, D, dtype, "cpu", "triton")


def of_model(size: vlm.Size, dtype: torch.dtype, text: int = 36) -> None:
    """The calls of a patched model of `bench.vlm`, from its configuration."""
    decoder = LlamaConfig(
        hidden_size=size.width, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, pad_token_id=0
    )
    config = SimpleNamespace(get_text_config=lambda: decoder)
    adapter = registered("llava")
    assert adapter is not None
    call_all(kernel_calls(config, adapter, dtype=dtype, lengths=(size.vision_tokens + text,)))


def of_eviction() -> None:
    of_model(bench_eviction.SIZES["gpu"], torch.bfloat16)
    of_model(bench_eviction.SIZES["tiny"], torch.float32)  # is verified first


def of_training(size: vlm.Size = vlm.SIZES["0.4B"], dtype: torch.dtype = torch.bfloat16, text: int = 36) -> None:
    """A step of the scorer's training: scores and their gradient, attention with a bias and its gradients."""
    shape = DecodeShape("model", 1, size.vision_tokens, size.heads, size.kv_heads, size.width // size.heads, 1)
    attention = goals.key_bias_case(shape, dtype, "cuda")
    attention.variants["ours"].function(*attention.make(torch.Generator()))
    is_text = torch.arange(size.vision_tokens + text)[None] < text
    weight = torch.ones(size.width, requires_grad=True)
    sequence_scores(torch.empty(*is_text.shape, size.width, dtype=dtype), ~is_text, is_text, weight).sum().backward()


def calls_of(name: str, options: argparse.Namespace) -> Callable[[], None] | None:
    """What a step calls; None for one whose calls nobody knows beforehand."""
    if name in (*steps.TIMED, "prefill"):
        words = steps.STEPS[name].command(options, FILE, 60.0)
        return lambda: of_cases(words[words.index("bench.measure") + 1 :])
    known: dict[str, Callable[[], None]] = {
        "core": of_core,
        "profile": of_profile,
        "memcheck": of_sanitizer,
        "racecheck": of_sanitizer,
        "generate": lambda: of_model(vlm.SIZES["8B"], torch.bfloat16),
        "eviction": of_eviction,
        "training": of_training,
    }
    return known.get(name)


def recorded(name: str, arch: int) -> list[Build] | None:
    """The builds of a step, one of each; None where nobody knows."""
    options = argparse.Namespace(device="cuda", smoke=False, resume=False, threads=None)
    call = calls_of(name, options)
    if call is None:
        return None
    with unfilled(arch), recording(arch) as found:
        call()
    return distinct(found)


@contextlib.contextmanager
def unfilled(arch: int) -> Iterator[None]:
    """Tensors are allocated and not filled, but for a few integers; what is computed from them is not compared."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        tensor = plain(*size, **options)
        return tensor.fill_(HARMLESS[tensor.dtype]) if tensor.dtype in HARMLESS else tensor

    def normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return plain(size, dtype=dtype)

    with (
        patch.object(torch, "empty", empty),
        patch.object(prefill_cases, "_normal", normal),
        patch.object(decode_cases, "_normal", normal),
        patch.object(prefill_cases, "by_cuda", lambda variant, device: {}),  # not Triton's
        patch.object(torch, "randn", lambda *size, generator=None, device=None, **more: plain(*size, **more)),
        patch.object(torch.testing, "assert_close", lambda *compared, **how: None),
        patch.object(paths, "can_overlap", lambda device: arch >= OVERLAPS),
    ):
        yield


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, required=True, help="compute capability, 90")
    parser.add_argument("--jobs", type=int, default=steps.JOBS)
    parser.add_argument("--file", type=Path, help="compile, and tell of it here")
    options = parser.parse_args(args)
    started = time.monotonic()
    torch.set_num_threads(1)  # before a fork
    found = {name: recorded(name, options.arch) for name in steps.STEPS if name not in (*steps.BY_NAME, "warm")}
    builds = distinct([build for some in found.values() for build in some or ()])
    if options.file is None:
        needs: dict[str, list[Build] | None] = {"warm": builds, **found}
        keys = {name: None if some is None else [build.key for build in some] for name, some in needs.items()}
        json.dump(keys, sys.stdout)
        return 0
    print(f"{len(builds)} builds found in {time.monotonic() - started:.1f} s", flush=True)
    outcomes: list[dict[str, Any]] = []
    for outcome in compile_builds(builds, options.jobs):
        outcomes.append(outcome)
        told = f"{outcome['kernel']} {outcome['state']} in {outcome['seconds']:.1f} s"
        print(f"{len(outcomes)} of {len(builds)}: {told} {outcome['problem']}".rstrip(), flush=True)
        record = {"arch": options.arch, "jobs": options.jobs, "wanted": len(builds), "builds": outcomes}
        partial = options.file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, options.file)  # whenever the step is broken off
    counts = [f"{sum(one['state'] == state for one in outcomes)} {state}" for state in ("compiled", "found", "failed")]
    print(f"{', '.join(counts)} in {time.monotonic() - started:.1f} s", flush=True)
    return 1 if any(one["state"] == "failed" for one in outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
