"""How the CUDA library is found, loaded, refused and explained."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from asymvlm_kernels import BackendError, build, dispatch, gather_rows, importance_gap, select_tokens, use_backend
from asymvlm_kernels.unproven.cuda import library as cuda

CPU = torch.device("cpu")


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:
    """No library, whatever this machine has built."""
    monkeypatch.delenv("ASYMVLM_CUDA_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "packaged", lambda: tmp_path / "lib" / build.NAME)
    return tmp_path


def test_it_is_looked_for_by_name_then_in_the_package_then_in_the_cache(nowhere, monkeypatch):
    assert cuda.find() is None
    assert "is not built (python -m asymvlm_kernels.build" in cuda.why_not(CPU)
    cached, packaged = build.cached(), build.packaged()
    for path in (cached, packaged):
        assert path is not None
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        assert cuda.find() == path
    monkeypatch.setenv("ASYMVLM_CUDA_LIBRARY", "/no/such/file.so")
    assert cuda.find() == Path("/no/such/file.so")
    assert "/no/such/file.so cannot be loaded" in cuda.why_not(CPU)


def test_a_file_that_is_no_library_is_told_and_auto_goes_on(nowhere, monkeypatch):
    wrong = nowhere / "wrong.so"
    wrong.write_text("text")
    monkeypatch.setenv("ASYMVLM_CUDA_LIBRARY", str(wrong))
    with use_backend("cuda"), pytest.raises(BackendError, match=r"wrong\.so cannot be loaded"):
        importance_gap(torch.zeros(1, 4))
    with use_backend("auto"):
        assert importance_gap(torch.arange(4.0)[None]).item() == 3.0
    assert "wrong.so cannot be loaded" in dispatch.explain_backend()["available"]["cuda"]["reason"]


@pytest.mark.parametrize("name", ["INTERFACE", "Prune"])
def test_a_build_of_other_sources_is_refused(name, cuda_library, monkeypatch):
    other = cuda.INTERFACE + 1 if name == "INTERFACE" else type("Prune", (cuda.Prune,), {"_fields_": [("x", cuda.Int)]})
    monkeypatch.setattr(cuda, name, other)
    cuda.load.cache_clear()
    with pytest.raises(ImportError, match=r"build it again|bytes there and \d+ here"):
        cuda.load(cuda_library)
    cuda.load.cache_clear()


def test_the_cache_is_named_for_the_sources(nowhere, monkeypatch, tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "asymvlm.h").write_text("1")
    monkeypatch.setattr(build, "sources", lambda: folder)
    first = build.cached()
    (folder / "new.cuh").write_text("2")
    build._digest.cache_clear()
    assert build.cached() != first
    assert build.cached() == build.cached()
    build._digest.cache_clear()


def test_a_build_without_a_compiler_or_with_an_error_says_so(nowhere, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert build.main([]) == 2
    assert capsys.readouterr().err == "asymvlm_kernels.build: no nvcc on the path\n"
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho 'error: no such architecture' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(build, "nvcc", lambda: str(failing))
    with pytest.raises(build.BuildError, match="no such architecture"):
        build.build()
    assert cuda.find() is None
    monkeypatch.setattr(build, "nvcc", lambda: "/no/such/compiler")
    with pytest.raises(build.BuildError, match="does not run"):
        build.build()
    monkeypatch.setattr(build, "sources", lambda: None)
    with pytest.raises(build.BuildError, match="no CUDA sources"):
        build.build()


def test_a_build_is_whole_and_made_once(nowhere, monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        '#!/bin/sh\necho "$0 $@" >> ' + str(tmp_path / "calls") + '\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo "ptxas info : 0 bytes spill stores" >&2\necho built > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    path = build.build()
    assert build.build() == path == cuda.find()
    assert path.read_text() == "built\n"
    assert "spill" in path.with_suffix(".log").read_text()
    (call,) = (tmp_path / "calls").read_text().splitlines()
    for arch in ("sm_80", "sm_90a", "sm_100", "sm_120", "code=compute_90", "-cudart static"):
        assert arch in call
    assert sorted(item.name for item in path.parent.iterdir()) == sorted([path.name, path.with_suffix(".log").name])


def test_the_command_prints_the_file(nowhere, capsys, monkeypatch):
    target = build.cached(build.EMULATOR)
    assert target is not None
    target.parent.mkdir(parents=True)
    target.write_bytes(b"")
    assert build.main(["--emulator"]) == 0
    assert capsys.readouterr().out == f"{target}\n"


def test_ops_without_a_kernel_run_as_under_auto(cuda_backend, device):
    rows = torch.arange(6.0, device=device).view(1, 3, 2)
    assert gather_rows(rows, torch.tensor([[2, -1]], device=device)).tolist() == [[[4.0, 5.0], [0.0, 0.0]]]


def test_what_the_library_cannot_serve_is_refused_by_name(monkeypatch):
    def cannot(*args):
        raise dispatch.Unsupported("too long")

    monkeypatch.setitem(dispatch.cuda_launchers(), "importance_gap", cannot)
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match="'cuda' was asked for but cannot run importance_gap: too"),
    ):
        importance_gap(torch.zeros(1, 4))
    with use_backend("auto"):  # which never asks the library
        assert importance_gap(torch.arange(4.0)[None]).item() == 3.0


def test_a_row_that_is_too_long_is_refused(cuda_backend, device):
    scores, counts = torch.zeros(1, 65537, device=device), torch.tensor([3], device=device)
    with pytest.raises(BackendError, match="a row of 65537 scores, at most 65536"):
        select_tokens(scores, counts)


def test_the_packages_import_without_building_anything(tmp_path):
    wanted = "asymvlm_kernels.build", "asymvlm_kernels.unproven"
    code = f"import sys, asymvlm_kernels; print(any(name in sys.modules for name in {wanted}))"
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    python = __import__("sys").executable
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
    assert list(tmp_path.iterdir()) == []
