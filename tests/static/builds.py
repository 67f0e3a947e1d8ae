"""Compile what the launchers launch, for GPUs that are not here, and read the machine code.

The launchers run on CPU tensors of real shapes with Triton's launch replaced by a recorder, so the offline build has
the very specialisation (types, divisibility by 16, constants) of a real call. What is built is listed in the files
`cases_*.py`. Prints one JSON object per build:

    PYTHONPATH=. python tests/static/builds.py --jobs 2 > builds.jsonl
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # a kernel decorated for the interpreter cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that this default will change

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from case import Case, Kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from asymvlm_kernels.warming.recording import answering_for

ARCHITECTURES = (80, 89, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
GROUPS = {
    path.stem.removeprefix("cases_"): importlib.import_module(path.stem)
    for path in sorted(Path(__file__).parent.glob("cases_*.py"))
}
BUILDS: list[Build] = []
Grid = Any  # of a launch: numbers, or a function of the arguments


@dataclass(frozen=True)
class Build:
    """One kernel as one launcher would have it compiled for one architecture."""

    case: Case
    arch: int
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def group(self) -> str:
        """The file of cases that describes the kernel, whichever case launches it."""
        owners = [group for group, module in GROUPS.items() if self.name in module.KERNELS]
        assert owners, f"no file of cases describes {self.name}: give it an entry in KERNELS"
        return owners[0]

    @property
    def rules(self) -> list[str]:
        kernel: Kernel = GROUPS[self.group].KERNELS[self.name]
        return kernel.rules(self.case)

    @property
    def key(self) -> tuple[str, ...]:
        """Builds of equal key are one compilation."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.name, str(self.arch), *map(str, parts))

    @property
    def divisible(self) -> list[str]:
        """Arguments known to be multiples of 16. An element of a tuple: its place after a dot."""
        return [self._named(path) for path, facts in self.attributes.items() if ["tt.divisibility", 16] in facts]

    @property
    def constexprs(self) -> dict[str, Any]:
        return {self._named(path): value for path, value in self.constants.items()}

    def _named(self, path: tuple[int, ...]) -> str:
        return ".".join([self.kernel.arg_names[path[0]], *map(str, path[1:])])


@contextlib.contextmanager
def launches_replaced(case: Case, arch: int, act: Callable[[Build, dict[str, Any], Grid], None]) -> Iterator[None]:
    """Where a launcher would launch on a GPU of ``arch``, ``act`` is given the build, the arguments and the grid."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)

    def run(kernel: JITFunction, *args: Any, grid: Grid, warmup: bool, **options: Any) -> None:
        options = {"debug": False, **options}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
        act(Build(case, arch, kernel, signature, constants, attributes, parsed), bound, grid)

    with patch.object(JITFunction, "run", run), answering_for(arch):
        yield


def record(case: Case, arch: int) -> list[Build]:
    """The builds that ``case`` would launch on a GPU of ``arch``."""
    builds: list[Build] = []
    with launches_replaced(case, arch, lambda build, arguments, grid: builds.append(build)):
        case.call()
    return builds


def all_builds(
    architectures: tuple[int, ...] = ARCHITECTURES, groups: Iterable[str] = GROUPS, pattern: str = ""
) -> list[Build]:
    """Every distinct build of every case whose name matches ``pattern``."""
    found: dict[tuple[str, ...], Build] = {}
    for arch in architectures:
        for group in groups:
            for case in GROUPS[group].cases():
                for build in record(case, arch) if re.search(pattern, case.name) and arch >= case.oldest else ():
                    found.setdefault(build.key, build)
    return list(found.values())


def sample(found: list[Build]) -> list[Build]:
    """All builds for sm_90, and the first case of each kernel for the others; fewer of a kernel that says so."""
    count: collections.Counter[tuple[str, int]] = collections.Counter()
    chosen = []
    for build in found:
        count[build.name, build.arch] += 1
        few, is_first = GROUPS[build.group].KERNELS[build.name].sampled, count[build.name, build.arch] == 1
        if is_first and build.arch in (few or ()) if few is not None else build.arch == 90 or is_first:
            chosen.append(build)
    return chosen


def compile_build(build: Build) -> Any:
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes)
    return triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=build.options.__dict__)


def inspect(build: Build) -> dict[str, Any]:
    """Compile one build and count its resources and instructions."""
    compiled = compile_build(build)
    code = disassembled(compiled.asm["cubin"])
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", code)
    assert resources is not None, code
    registers, stack, local = map(int, resources.groups())
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return {
        "case": build.case.name,
        "arch": build.arch,
        "kernel": build.name,
        "group": build.group,
        "rules": build.rules,
        "warps": build.options.num_warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "instructions": len(opcodes),
        "opcodes": collections.Counter(opcodes),
    }


def disassembled(cubin: bytes) -> str:
    """What cuobjdump says of a cubin. Kept in Triton's cache by the cubin's bytes: half a second a call, like ptxas."""
    key = hashlib.sha256(triton.__version__.encode() + cubin).hexdigest()
    kept = Path(os.environ["TRITON_CACHE_DIR"]) / f"{key}.sass"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            binary, text = Path(folder) / "kernel.cubin", Path(folder) / "kernel.sass"
            binary.write_bytes(cubin)
            command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", binary]
            text.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            text.replace(kept)  # at once, so that a run that is broken off leaves no half of it
    return kept.read_text()


def compile_all(builds: list[Build], jobs: int | None, cache: str | None = None) -> Iterator[dict[str, Any]]:
    """`inspect` each build, ``jobs`` at a time. ``cache``: Triton's cache; by default one that is thrown away."""
    global BUILDS
    BUILDS = builds  # forked workers inherit the list: kernels cannot be pickled
    with (
        tempfile.TemporaryDirectory() as fresh,
        patch.dict(os.environ, TRITON_CACHE_DIR=cache or fresh),
        ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool,
    ):
        yield from pool.map(_inspect_number, range(len(builds)))


def _inspect_number(number: int) -> dict[str, Any]:
    return inspect(BUILDS[number])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--group", nargs="*", default=tuple(GROUPS), choices=tuple(GROUPS), help="files of cases")
    parser.add_argument("--case", default="", help="a pattern: only cases with a matching name")
    parser.add_argument("--cache", help="keep Triton's builds here for the next run")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, parents=[options()])
    parser.add_argument("--sample", action="store_true", help="all for sm_90, one case a kernel for the others")
    args = parser.parse_args()
    found = all_builds(tuple(args.arch), args.group, args.case)
    for result in compile_all(sample(found) if args.sample else found, args.jobs, args.cache):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
