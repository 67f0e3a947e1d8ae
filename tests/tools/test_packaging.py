"""The wheel and the source archive hold the package and nothing that lay about: no earlier build, no build products."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("asymvlm_kernels", "python_api", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is packaged, as a fresh checkout has it."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "lib")
            shutil.copytree(ROOT / name, copy / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def built(tree: Path) -> tuple[set[str], set[str]]:
    """Names in the wheel and in the source archive, built in place without a network."""
    code = "from setuptools import build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    files = sorted((tree / "dist").iterdir())
    wheel, source = (next(file for file in files if file.suffix == suffix) for suffix in (".whl", ".gz"))
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(source) as opened:
        in_source = {member.name.partition("/")[2] for member in opened if member.isfile()}
    return in_wheel, in_source


@pytest.mark.slow
def test_a_dirty_tree_is_packaged_like_a_clean_one(tree: Path) -> None:
    wheel, source = built(tree)
    assert {"asymvlm/patch.py", "asymvlm_cli/app.py", "asymvlm_kernels/csrc/emulator/emulator.cpp"} <= wheel
    assert {"python_api/asymvlm/patch.py", "python_api/asymvlm_cli/app.py", "csrc/prune.cu", "setup.py"} <= source
    assert any(name.endswith("entry_points.txt") for name in wheel)
    stray = {
        "build/lib/asymvlm/gone.py": "from an earlier build",
        "build/lib/asymvlm_kernels/lib/old.so": "from an earlier build",
        "csrc/prune.o": "a build product",
        "csrc/notes.txt": "notes",
        "asymvlm_kernels/lib/library.so": "a build product",
        "python_api/asymvlm/__pycache__/patch.cpython-311.pyc": "bytecode",
        "python_api/asymvlm/patch.py.orig": "an editor's",
        "python_api/asymvlm/data.json": "notes",
    }
    for name, text in stray.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    shutil.rmtree(tree / "dist")
    assert built(tree) == (wheel, source)
