"""Build the optional CUDA library from csrc/: ``python -m asymvlm_kernels.build``. Needs nvcc 12.8 or newer, no torch.

The result goes to a cache folder named for the sources, so a build of other sources is never loaded. ``--emulator``
builds the same kernels for a CPU with a C++17 compiler instead: for tests, not for work.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# sm_90a: clusters and the bulk engine of Hopper. sm_80 runs on every 8.x, sm_100 on every 10.x; PTX for what comes.
ARCHITECTURES = ("80", "89", "90a", "100", "120")
PTX = "90"
NAME = "libasymvlm_cuda.so"
EMULATOR = "libasymvlm_emulator.so"
PACKAGE = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


def sources() -> Path | None:
    """The folder with the CUDA sources: beside the package in a checkout, inside it in a wheel."""
    places = (PACKAGE.parent / "csrc", PACKAGE / "csrc")
    return next((place for place in places if (place / "asymvlm.h").exists()), None)


def packaged() -> Path:
    """Where ``ASYMVLM_BUILD_CUDA=1 pip install`` puts the library."""
    return PACKAGE / "lib" / NAME


def cached(name: str = NAME) -> Path | None:
    """Where this module puts it, whether or not it is there; None without sources."""
    folder = sources()
    return None if folder is None else cache_folder() / _digest(folder) / name


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "asymvlm"


@functools.cache
def _digest(folder: Path) -> str:
    """Short hash of the sources and of this file, which holds the compiler's options."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def nvcc() -> str | None:
    """The compiler: ``$NVCC``, on the path, or where NVIDIA installs it."""
    named = os.environ.get("NVCC")
    if named:
        return named
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_command(compiler: str, folder: Path, output: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[str]:
    """The whole build in one command. ``-Xptxas -v`` lists registers and spills of every kernel on standard error."""
    command = [compiler, "-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command += [f"-gencode=arch=compute_{PTX},code=compute_{PTX}"]
    command += ["-Xptxas", "-v", "--threads", "0", f"-I{folder}", "-o", str(output)]
    return [*command, *map(str, sorted(folder.rglob("*.cu")))]


def emulator_command(compiler: str, folder: Path, output: Path) -> list[str]:
    # jumps between stacks are what the emulator is made of: the fortified longjmp forbids them
    command = [
        compiler,
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE",
    ]
    command += ["-DASYMVLM_EMULATE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{folder}", "-o", str(output)]
    return [*command, *map(str, sorted([*folder.rglob("*.cu"), *folder.rglob("*.cpp")]))]


def build(output: Path | None = None, *, emulator: bool = False, log: Path | None = None) -> Path:
    """Build into ``output`` (the cache by default) and return the file. A file in the cache is not built again.

    ``log``: where to keep what the compiler says, in the cache by default.

    Raises:
        BuildError: without sources or a compiler, or when the compiler fails.
    """
    folder = sources()
    if folder is None:
        raise BuildError("no CUDA sources: csrc/ is neither beside the package nor inside it")
    in_cache = cached(EMULATOR if emulator else NAME)
    assert in_cache is not None
    target = in_cache if output is None else output.resolve()  # the compiler runs in another folder
    if output is None and target.exists():
        return target
    compiler = (os.environ.get("CXX") or shutil.which("g++")) if emulator else nvcc()
    if compiler is None:
        raise BuildError(f"no {'g++' if emulator else 'nvcc'} on the path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        result = Path(scratch) / target.name
        command = (emulator_command if emulator else nvcc_command)(compiler, folder, result)
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"{compiler} does not run: {error}") from error
        if done.returncode:
            raise BuildError(f"{' '.join(command[:2])} failed:\n{done.stdout}{done.stderr}")
        (log or target.with_suffix(".log")).write_text(done.stdout + done.stderr)
        result.replace(target)  # whole or not at all, also beside another process that builds
    return target


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write instead of the cache")
    parser.add_argument("--emulator", action="store_true", help="the build for a CPU")
    options = parser.parse_args(args)
    try:
        path = build(options.output, emulator=options.emulator)
    except BuildError as error:
        sys.stderr.write(f"asymvlm_kernels.build: {error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
