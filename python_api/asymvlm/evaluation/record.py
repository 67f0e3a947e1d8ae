"""The record of a run: all that its answers depend on, and a little that they do not. A resumed run must match it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

import asymvlm_kernels
from asymvlm.app.samples import DatasetQuestions, Question
from asymvlm.app.session import InputError, Session
from asymvlm.hf.peft import unwrapped

FORMAT = 1
NOTED = "noted"  # the part that is not compared
VALUES = 64  # read of each parameter
PACKAGES = (Path(__file__).parents[1], Path(asymvlm_kernels.__file__).parent)
Record = dict[str, Any]


def make_record(
    session: Session, samples: Sequence[Question], settings: Record, command: str, metrics: Record | None = None
) -> Record:
    """Of a run with these ``settings``; ``metrics`` are those of the caller's own, with digests of their code. Reads
    every image file once."""
    record = {
        "format": FORMAT,
        "settings": settings,
        "data": {"samples": len(samples), "sha256": digest_samples(samples)},
        "model": _model(session),
        "versions": versions(),
        "machine": _machine(session.device),
        NOTED: {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command,
            "model": session.name,
            "load": round(os.getloadavg()[0], 2),
            "metrics": metrics or {},
        },
    }
    found: Record = json.loads(json.dumps(record))  # as a file gives it back
    return found


def differences(found: Record, wanted: Record) -> list[str]:
    """In words, where a record on file is not that of the run that is to go on; what is noted is left out."""
    told = []
    for name, before, now in _leaves(found, wanted, ""):
        told.append(f"{name} {_short(before)} on file, {_short(now)} now")
    return told


def versions() -> Record:
    """Of what the answers depend on; ``source`` is a digest of this package's files but those of the command line."""
    digest = hashlib.sha256()
    for folder in PACKAGES:
        for path in sorted(folder.rglob("*.py")):
            if folder / "cli" in path.parents:
                continue
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return {
        "asymvlm": asymvlm_kernels.__version__,
        "source": digest.hexdigest()[:16],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _installed(name) for name in ("transformers", "tokenizers", "triton", "pillow", "numpy")},
    }


def commit() -> str | None:
    """Of the checkout that this package lies in, with a ``+`` where files differ from it; None outside of one."""
    root = PACKAGES[0]
    found = [_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")]
    return found[0] and found[0] + ("+" if found[1] else "")


def digest_samples(samples: Sequence[Question]) -> str:
    """Of questions, answers and pixels: of image files their bytes, so that a folder may move."""
    digest = hashlib.sha256()
    stored = getattr(getattr(samples, "rows", None), "_fingerprint", None)  # of a dataset, which knows its content
    if isinstance(samples, DatasetQuestions) and stored is not None:
        return hashlib.sha256(f"{stored} {len(samples)} {sorted(samples.columns.items())}".encode()).hexdigest()[:32]
    known: dict[Path, str] = {}
    for sample in samples:
        images = [_digest_image(image, known, sample.where) for image in sample.images]
        told = [images, sample.question, sample.answers, sample.id, sample.group]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()[:32]


def _digest_image(image: Any, known: dict[Path, str], where: str) -> str:
    if not isinstance(image, (str, Path)):
        # the colours of a palette and the colour that is transparent are no part of its bytes
        told = [image.mode, image.size, getattr(image, "palette", None) and image.getpalette("RGBA")]
        told.append(image.info.get("transparency"))
        return hashlib.sha256(repr(told).encode() + image.tobytes()).hexdigest()
    path = Path(os.path.expanduser(image))
    if path not in known:
        try:
            with path.open("rb") as file:
                known[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{where}: image {image}: cannot be read ({error.strerror})") from error
    return known[path]


def _model(session: Session) -> Record:
    model = unwrapped(session.model)
    config: Any = model.config
    return {
        "model_type": config.model_type,
        "dtype": session.dtype,
        "attention": getattr(config, "_attn_implementation", None),
        "chat_template": session.has_chat_template,
        "sha256": digest_model(session),
        "generation": _public(cast("Any", session.model).generation_config.to_dict()),
    }


def digest_model(session: Session) -> str:
    """Of names, shapes, types and `VALUES` evenly spaced values of all parameters, of the configuration, and of how
    prompts are made: chat template, tokenizer, image processor."""
    digest = hashlib.sha256()
    for name, parameter in session.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        if parameter.is_meta:
            continue  # offloaded
        flat = parameter.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(VALUES, len(flat)), dtype=torch.float64).long()
        values = flat[places.to(flat.device)].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    config = cast("Any", unwrapped(session.model)).config.to_dict()
    digest.update(json.dumps(_public(config), sort_keys=True, default=str).encode())
    digest.update(json.dumps(getattr(session.processor, "chat_template", None)).encode())
    digest.update(_tokenizer(session.processor).encode())
    digest.update(str(getattr(session.processor, "image_processor", "")).encode())
    return digest.hexdigest()[:32]


def _public(value: Any) -> Any:
    """Settings without what a version of transformers writes about itself and where files came from."""
    if isinstance(value, dict):
        return {
            str(name): _public(entry)
            for name, entry in value.items()
            if not str(name).startswith("_") and name != "transformers_version" and entry is not None
        }
    if isinstance(value, (list, tuple)):
        return [_public(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _tokenizer(processor: Any) -> str:
    """What a tokenizer splits text by; without padding and truncation, which each call sets anew."""
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps({**json.loads(backend.to_str()), "padding": None, "truncation": None})
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return json.dumps(sorted(known.items()))


def _machine(device: torch.device) -> Record:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _leaves(found: Any, wanted: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if name or key != NOTED:
                yield from _leaves(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif found != wanted:
        yield name, found, wanted


def _short(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, dict) and "method" in entry for entry in value):
        return ", ".join(f"{entry['method']} {entry['keep']}" for entry in value) or "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> str:
    """The command of this process."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


__all__ = ["FORMAT", "NOTED", "Record", "command_line", "commit", "differences", "digest_samples", "make_record"]
