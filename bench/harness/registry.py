"""Archives of the package registry, fetched into a cache outside of the repository and checked before they are read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asymvlm-bench"


def download(folder: Path, *wanted: str) -> None:
    """Requirements, and options of ``pip download`` before them, into ``folder``, without what they depend on.

    Raises:
        subprocess.CalledProcessError: if the registry does not give one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *wanted], check=True)


def check_sha256(file: Path, wanted: str) -> None:
    """Raises ValueError if ``file`` is another than the known one."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wanted:
        raise ValueError(f"{file}: SHA-256 is {found}, wanted {wanted}")


__all__ = ["CACHE", "check_sha256", "download"]
