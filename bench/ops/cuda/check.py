"""What the optional CUDA library has to show on a GPU: ``python -m bench.ops.cuda.check --file results.json``.

Tests against the reference, compute-sanitizer (memcheck, racecheck, synccheck), then times beside Triton's. The library
is the one that ``ASYMVLM_CUDA_LIBRARY`` names, ``build/libasymvlm_cuda.so`` of this checkout (for machines without
nvcc: ``python -m asymvlm_kernels.build --output build/libasymvlm_cuda.so`` elsewhere), or is built here. The last line
says what was shown: `"auto"` may take the library only where a stored result shows all of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from asymvlm_kernels import build
from asymvlm_kernels.unproven.cuda import library as cuda

ROOT = Path(__file__).resolve().parents[3]
CARRIED = ROOT / "build" / build.NAME
TESTS = tuple(f"tests/kernels/cuda/test_cuda_{part}.py" for part in ("prune", "decode", "gpu"))
MATRIX = (
    "tests/kernels/prune/test_prune_sequence.py",
    "tests/kernels/selection/test_select_tokens.py",
    "tests/kernels/selection/test_importance_gap.py",
)
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
TOOLS = ("memcheck", "racecheck", "synccheck")
UNSUPPORTED = "Device not supported"  # how the sanitizer refuses some virtual machines
CLEAN = "all clean"


def library() -> Path | None:
    """File of the library to check, built if there is none and nvcc is at hand; None without both."""
    found = cuda.find() or (CARRIED if CARRIED.exists() else None)
    return found if found is not None or build.nvcc() is None else build.build()


def sanitizer() -> str | None:
    return next((found for name in SANITIZER if (found := shutil.which(name))), None)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="results file, merged into")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the emulator, tests this script"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args(args)
    path = library()
    if path is None:
        print("no CUDA library and no nvcc to build it")
        return 1
    print(f"library: {path.name}", flush=True)
    variables = os.environ | {cuda.ENVIRONMENT_VARIABLE: str(path)}
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", "--maxfail=20"]
    if run([*pytest, *(TESTS[-1:] if options.smoke else [*TESTS, *MATRIX])], variables)[0]:
        return 1
    tool = sanitizer() if options.device == "cuda" else None
    exercise = [python, "-m", "bench.harness.exercise", "--device", options.device, "--backend", "cuda"]
    shown = [check_with(tool, name, exercise, variables) for name in TOOLS] if tool else []
    if not tool and run(exercise, variables)[0]:
        return 1
    measure = [python, "-m", "bench.measure", "--device", options.device, "--file", str(options.file)]
    measure += ["--op", "select_tokens", "prune_sequence", "--dtype", "bfloat16", "--compiled", "without"]
    code = run([*measure, *["--smoke"] * options.smoke], variables)[0]
    if "failed" in shown:
        return 1
    found = dict(zip(TOOLS, shown, strict=False))
    clean = CLEAN if shown and set(shown) == {"clean"} else ", ".join(f"{k} {v}" for k, v in found.items())
    print(f"tests passed; sanitizer: {clean or 'not installed'}", flush=True)
    return code


def check_with(tool: str, name: str, command: list[str], variables: dict[str, str]) -> str:
    """One tool of the sanitizer: ``"clean"``, ``"failed"``, or ``"not supported"`` by this machine."""
    # without torch's cache each tensor is an allocation of its own, so that reading past its end is seen
    code, said = run(
        [tool, "--tool", name, "--error-exitcode", "9", *command], variables | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    return "clean" if code == 0 else "not supported" if UNSUPPORTED in said else "failed"


def run(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a command, which is shown as it comes."""
    print("+ " + " ".join(command[1:] if command[0] == sys.executable else command), flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
