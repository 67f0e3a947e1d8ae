"""The CUDA library compiled for every architecture: registers, spills, the instructions it is made of, and its loading.

Built once for these sources, into the cache that the library is loaded from; skipped where there is no nvcc.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from asymvlm_kernels import build
from asymvlm_kernels.unproven.cuda import library as cuda

CLUSTERS, BULK = {"sm_90a", "sm_100"}, {"sm_90a", "sm_100", "sm_120"}
ARCHITECTURES = {f"sm_{arch}" for arch in build.ARCHITECTURES}
NO_DRIVER, NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice


@pytest.fixture(scope="module")
def library() -> Path:
    if build.nvcc() is None:
        pytest.skip("no nvcc")
    target = build.cached()
    assert target is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:  # one of pytest-xdist's workers builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build.build()


@pytest.fixture(scope="module")
def resources(library) -> dict[tuple[str, str], dict[str, int]]:
    """What ptxas says of each (kernel, architecture)."""
    log = library.with_suffix(".log").read_text()
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    names = ("stack", "stores", "loads", "registers")
    return {(kernel, arch): dict(zip(names, map(int, rest))) for kernel, arch, *rest in entry.findall(log)}


def cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    found = shutil.which("cuobjdump") or (str(beside) if beside is not None and beside.exists() else None)
    if found is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton")
    return found


@pytest.fixture(scope="module")
def opcodes(library) -> dict[tuple[str, str], collections.Counter[str]]:
    """Instructions of each (kernel, architecture)."""
    found: dict[tuple[str, str], collections.Counter[str]] = {}
    for arch in ARCHITECTURES:
        command = [cuobjdump(), "--dump-sass", "-arch", arch, str(library)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in code.split("Function : ")[1:]:
            lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part)
            found[part.split()[0], arch] = collections.Counter(lines)
    return found


def kernels(found: dict[tuple[str, str], object], name: str, architectures: set[str] = ARCHITECTURES) -> list:
    chosen = [value for (kernel, arch), value in found.items() if name in kernel and arch in architectures]
    assert len(chosen) >= len(architectures), name
    return chosen


def plain(kernel: str) -> str:
    """Name without the mangling around it."""
    return next((word for word in re.findall(r"[a-z]+_kernel", kernel)), kernel)


def count(instructions: collections.Counter[str], pattern: str) -> int:
    return sum(number for opcode, number in instructions.items() if re.match(pattern, opcode))


def test_every_kernel_is_compiled_for_every_architecture(resources):
    names = {kernel for kernel, _ in resources}
    assert sum("prune_kernel" in name for name in names) == 3  # one a dtype
    assert {"select_kernel", "merge_kernel", "move_kernel", "probe_kernel"} <= {plain(name) for name in names}
    assert {(name, arch) for name in names for arch in ARCHITECTURES} == set(resources)


def test_nothing_spills(resources):
    assert not [key for key, used in resources.items() if used["stack"] or used["stores"] or used["loads"]]


def test_a_block_of_each_kernel_fits_on_a_processor(resources):
    for (kernel, arch), used in resources.items():
        threads = 512 if "select_kernel" in kernel else 256
        assert used["registers"] * threads <= 65536, (kernel, arch)


def test_halves_are_multiplied_by_tensor_cores_and_fp32_is_not(opcodes):
    for half in ("prune_kernelINS_4Half", "prune_kernelINS_6Bfloat"):
        assert all(count(code, "HMMA.16816.F32") == 64 for code in kernels(opcodes, half))
    for code in kernels(opcodes, "prune_kernelIf"):
        assert count(code, "HMMA|HGMMA") == 0
        assert count(code, "FFMA") > 50


def test_rows_come_asynchronously(opcodes):
    for code in kernels(opcodes, "prune_kernel", BULK):
        assert count(code, "UBLKCP") >= 2  # rows in, kept rows out
        assert count(code, "SYNCS.PHASECHK")
    for code in kernels(opcodes, "prune_kernel", ARCHITECTURES - BULK):
        assert count(code, r"LDGSTS\.E\.BYPASS\.128")
        assert count(code, "ARRIVES.LDGSTSBAR")
        assert not count(code, "UBLKCP")


def test_teams_are_clusters_where_there_are_clusters(opcodes):
    for code in kernels(opcodes, "prune_kernel", CLUSTERS):
        assert count(code, "UCGABAR_ARV") == count(code, "UCGABAR_WAIT") > 0
    for code in kernels(opcodes, "prune_kernel", ARCHITECTURES - CLUSTERS):
        assert not count(code, "UCGABAR")


def test_nothing_is_kept_in_local_memory(opcodes):
    assert not [key for key, code in opcodes.items() if count(code, "LDL|STL")]


def test_method_b_is_not_contracted(opcodes):
    for code in kernels(opcodes, "prune_kernel"):
        assert count(code, "DMUL") == 2
        assert not count(code, "DFMA")


def test_the_library_loads_and_says_whether_there_is_a_gpu(library):
    loaded = cuda.load(str(library))
    assert loaded.asymvlm_emulated() == 0
    code = loaded.asymvlm_probe()
    if torch.cuda.is_available():
        assert code == 0
        return
    assert code in (NO_DRIVER, NO_DEVICE)
    call, plan = cuda.Prune(B=1, S=4, D=8, capacity=4, dtype=2), cuda.Plan()
    assert loaded.asymvlm_prune_plan(ctypes.byref(call), ctypes.byref(plan)) == code
    assert loaded.asymvlm_select(None, None, None, 0, None, None, 1, 4, 4, None) == code
    why = cuda._why_not(str(library), "cpu", None)
    assert f"cannot run here: CUDA error {code}" in why
    assert "driver" in why or "device" in why
