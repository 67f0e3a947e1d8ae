"""Compile what the launchers launch, for GPUs that are not here, and read the machine code.

The launchers run on CPU tensors of real shapes with Triton's launch replaced by a recorder, so the offline build has
the very specialisation (types, divisibility by 16, constants) of a real call. Prints one JSON object per build:

    python tests/static/builds.py --jobs 2 > builds.jsonl
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that this default will change

import argparse
import collections
import contextlib
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from asymvlm_kernels.prefill import fused, gather, score, score_grad, select

ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALVES = (torch.float16, torch.bfloat16)
BUILDS: list[Build] = []


@dataclass(frozen=True)
class Build:
    """One kernel as one launcher would have it compiled for one architecture."""

    case: str
    arch: int
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def key(self) -> tuple[str, ...]:
        """Builds of equal key are one compilation."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.kernel.fn.__name__, str(self.arch), *map(str, parts))

    @property
    def divisible(self) -> list[str]:
        """Arguments known to be multiples of 16."""
        names = self.kernel.arg_names
        return [names[path[0]] for path, facts in self.attributes.items() if ["tt.divisibility", 16] in facts]

    @property
    def constexprs(self) -> dict[str, Any]:
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constants.items()}


def record(case: str, arch: int, call: Callable[[], object]) -> list[Build]:
    """The builds that ``call`` would launch on a GPU of ``arch``."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    builds = []

    def run(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        options = {"debug": False, **options}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
        builds.append(Build(case, arch, kernel, signature, constants, attributes, parsed))

    with patch.object(JITFunction, "run", run), contextlib.ExitStack() as patched:
        for module in (score, fused):
            patched.enter_context(patch.object(module, "architecture", lambda device: arch))
        call()
    return builds


def score_call(N: int, L: int, D: int, dtype: torch.dtype, *, B: int = 1, bare: bool = False) -> Callable[[], object]:
    vision, text, weight = torch.empty(B, N, D, dtype=dtype), torch.empty(B, L, D, dtype=dtype), torch.empty(D)
    masks = torch.empty(B, N, dtype=torch.bool), torch.empty(B, L, dtype=torch.bool)
    extra = (None, None, None) if bare else (weight, *masks)
    return functools.partial(score._score_tokens_triton, vision, text, *extra)


def grad_call(N: int, L: int, D: int, dtype: torch.dtype, *, B: int = 1) -> Callable[[], object]:
    vision, text, rows = torch.empty(B, N, D, dtype=dtype), torch.empty(B, L, D, dtype=dtype), torch.empty(B, N)
    best = torch.empty(B, N, dtype=torch.int32)
    return functools.partial(score_grad._score_tokens_grad_triton, rows, vision, text, best, rows)


def gather_call(
    S: int, tail: tuple[int, ...], dtype: torch.dtype, *, B: int = 1, K: int = 1625
) -> Callable[[], object]:
    index = torch.empty(B, K, dtype=torch.int64)
    return functools.partial(gather._gather_rows_triton, torch.empty(B, S, *tail, dtype=dtype), index, 0)


def gap_call(N: int) -> Callable[[], object]:
    return functools.partial(select._importance_gap_triton, torch.empty(1, N), torch.empty(1, N, dtype=torch.bool))


def select_call(N: int) -> Callable[[], object]:
    scores, mask = torch.empty(1, N), torch.empty(1, N, dtype=torch.bool)
    return functools.partial(select._select_tokens_triton, scores, torch.empty(1, dtype=torch.int32), mask, N)


def score_select_call(
    S: int, D: int, dtype: torch.dtype, *, B: int = 1, bare: bool = False, ratio: int = 500_000
) -> Callable[[], object]:
    embeds, mask = torch.empty(B, S, D, dtype=dtype), torch.empty(B, S, dtype=torch.bool)
    extra = (None, None) if bare else (mask, torch.empty(D))
    return functools.partial(fused._score_select_triton, embeds, mask, mask, *extra, [ratio] * 3, [0.0, ratio], S)


def gather_sequence_call(
    S: int, D: int, dtype: torch.dtype, *, B: int = 1, K: int = 1655, carries: int = 3
) -> Callable[[], object]:
    order, lengths = torch.empty(B, S, dtype=torch.int32), torch.empty(B, dtype=torch.int32)
    ids, flags = torch.empty(B, S, dtype=torch.int64), torch.empty(B, S, dtype=torch.bool)
    carry = [torch.empty(3, B, S, dtype=torch.int64), ids, flags][:carries]
    arguments = (order, lengths, carry, [0, -100, 0][:carries], [True, False, False][:carries], K, True)
    return functools.partial(fused._gather_sequence_triton, torch.empty(B, S, D, dtype=dtype), *arguments)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel with every configuration and dtype that ships. "wide" rows must move 16 bytes at a time."""
    for dtype in (torch.float32, *HALVES):
        name = str(dtype).removeprefix("torch.")
        yield f"score {name} wide", score_call(2500, 30, 3072, dtype)
        yield f"score {name} odd", score_call(2500, 30, 70, dtype)
        yield f"gradient {name} wide", grad_call(2500, 30, 3072, dtype)
        yield f"gradient {name} odd", grad_call(2500, 30, 70, dtype)
    yield "score bfloat16 wide, no weight or mask", score_call(2500, 30, 3072, torch.bfloat16, bare=True)
    yield "score bfloat16 wide, rows of 8", score_call(2500, 30, 1176, torch.bfloat16)  # a multiple of 16 bytes only
    yield "gather bfloat16 wide", gather_call(2600, (3072,), torch.bfloat16)
    yield "gather bfloat16 wide, rows of 8", gather_call(2600, (1176,), torch.bfloat16)
    yield "gather bfloat16 odd", gather_call(2600, (70,), torch.bfloat16)
    yield "gather float32 wide", gather_call(2600, (3072,), torch.float32)
    yield "gather int64 positions", gather_call(2600, (), torch.int64)
    yield "gather bool flags", gather_call(2600, (), torch.bool)
    for dtype in (torch.float32, *HALVES):
        name = str(dtype).removeprefix("torch.")
        yield f"fused score {name} wide", score_select_call(2530, 3072, dtype)
        yield f"fused score {name} odd", score_select_call(2530, 70, dtype)
    yield "fused score bfloat16 wide, no weight or protection", score_select_call(8000, 3072, torch.bfloat16, bare=True)
    yield "fused score bfloat16 wide, rows of 8", score_select_call(300, 1176, torch.bfloat16)
    yield "fused score bfloat16 wide, in chunks", score_select_call(60000, 3584, torch.bfloat16)
    yield "fused copy bfloat16 wide", gather_sequence_call(2530, 3072, torch.bfloat16)
    yield "fused copy float32 wide", gather_sequence_call(2530, 3072, torch.float32)
    yield "fused copy bfloat16 odd", gather_sequence_call(2530, 70, torch.bfloat16, carries=0)
    for N in (256, 2500, 4096, 16384, 65536):
        yield f"gap {N}", gap_call(N)
        yield f"select {N}", select_call(N)


def all_builds(architectures: tuple[int, ...]) -> list[Build]:
    """Every distinct build of `cases`."""
    found: dict[tuple[str, ...], Build] = {}
    for arch in architectures:
        for case, call in cases():
            for build in record(case, arch, call):
                found.setdefault(build.key, build)
    return list(found.values())


def inspect(build: Build) -> dict[str, Any]:
    """Compile one build and count its resources and instructions."""
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=build.options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert resources is not None, usage
    registers, stack, local = map(int, resources.groups())
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return {
        "case": build.case,
        "arch": build.arch,
        "kernel": build.kernel.fn.__name__,
        "warps": build.options.num_warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "instructions": len(opcodes),
        "opcodes": collections.Counter(opcodes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    args = parser.parse_args()
    global BUILDS
    BUILDS = all_builds(tuple(args.arch))  # forked workers inherit the list: kernels cannot be pickled
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, TRITON_CACHE_DIR=cache),  # never a build of yesterday
        ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool,
    ):
        for result in pool.map(_inspect_number, range(len(BUILDS))):
            print(json.dumps(result), flush=True)


def _inspect_number(number: int) -> dict[str, Any]:
    return inspect(BUILDS[number])


if __name__ == "__main__":
    main()
