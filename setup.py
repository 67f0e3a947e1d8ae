"""Everything about the package is in pyproject.toml; this file is the door for the optional CUDA library (csrc/)."""

import os

from setuptools import setup

if os.environ.get("ASYMVLM_BUILD_CUDA") == "1":
    raise SystemExit("ASYMVLM_BUILD_CUDA=1: csrc/ holds no CUDA source yet; unset it to install the Triton kernels")

setup()
