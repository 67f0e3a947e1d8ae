"""Everything about the package is in pyproject.toml; this file puts csrc/ into the wheel and builds it when asked.

The wheel is pure Python and carries the CUDA sources, for ``python -m asymvlm_kernels.build`` on the machine that has
nvcc. ``ASYMVLM_BUILD_CUDA=1 pip install .`` builds the library into a wheel of this platform instead.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
SOURCES = (".cu", ".cuh", ".cpp", ".h")
WITH_LIBRARY = os.environ.get("ASYMVLM_BUILD_CUDA") == "1"


class PlatformWheel(bdist_wheel):
    """Any Python, no ABI, this platform: the library knows neither Python nor torch."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


class BuildWithSources(build_py):
    def run(self):
        if not self.editable_mode:  # modules of an earlier build, renamed or deleted since, are not to reach a wheel
            for name in self.packages:
                shutil.rmtree(Path(self.build_lib) / name.split(".")[0], ignore_errors=True)
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "asymvlm_kernels"
            for source in sorted((ROOT / "csrc").rglob("*")):
                if source.suffix in SOURCES:
                    target = package / source.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)
        else:
            package = ROOT / "asymvlm_kernels"
        if WITH_LIBRARY:
            build_library(package / "lib")


def build_library(folder: Path) -> None:
    """By asymvlm_kernels/build.py, loaded as a file: the package would import torch, which a build must not need."""
    spec = importlib.util.spec_from_file_location("asymvlm_build", ROOT / "asymvlm_kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        print(f"built {module.build(folder / module.NAME, log=Path(os.devnull))}")  # noqa: T201
    except module.BuildError as error:
        raise SystemExit(f"ASYMVLM_BUILD_CUDA=1: {error}") from error


if WITH_LIBRARY:
    commands = {"build_py": BuildWithSources, "bdist_wheel": PlatformWheel}
    setup(distclass=PlatformDistribution, cmdclass=commands)
else:
    setup(cmdclass={"build_py": BuildWithSources})
