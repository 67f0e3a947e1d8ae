"""`asymvlm warmup`: compile the kernels of a patched model before its first call, here or for a GPU elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from asymvlm.app.kernel_calls import kernel_calls
from asymvlm.app.loading import load_config
from asymvlm.app.session import InputError
from asymvlm.cli import console, options
from asymvlm.models import registered
from asymvlm_kernels import BackendError
from asymvlm_kernels import warmup as compile_kernels
from asymvlm_kernels.warming.calls import DTYPES, LENGTHS
from asymvlm_kernels.warming.warm import architecture_of

FLAGS = {"arch": "--arch"}


def warmup(
    *,
    model: str,
    lengths: str | None,
    dtype: str,
    arch: int | None,
    jobs: int | None,
    cache: Path | None,
    methods: bool,
    as_json: bool,
) -> int:
    """Compile all kernels that a patched model will need, before the first call. Exit code 1 if a build fails."""
    wanted = _lengths(lengths)
    try:
        target = architecture_of(arch)
    except (ValueError, BackendError) as error:
        raise InputError(options.in_flags(error, FLAGS)) from error
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"--cache: {cache} is a file, wanted a folder")
    console.hush_transformers(progress=not as_json)
    config = load_config(model)
    weights = _dtype(config, dtype, model)
    adapter = registered(config.model_type)
    assert adapter is not None  # `load_config` takes supported models alone
    calls = kernel_calls(config, adapter, dtype=weights, lengths=wanted, given=True, methods=methods)
    with console.stdout_reserved(as_json), console.interruptible():
        warmed = compile_kernels(calls, arch=target, jobs=jobs, folder=cache, progress=sys.stderr)
    failed = warmed.of("failed")
    if as_json:
        record: dict[str, Any] = {"model": model, "dtype": str(weights).removeprefix("torch."), "lengths": [*wanted]}
        record |= {"arch": warmed.arch, "cache": warmed.folder, "seconds": warmed.seconds}
        record |= {state: len(warmed.of(state)) for state in ("compiled", "found", "failed")}
        console.print_json(record | {"builds": [dataclasses.asdict(build) for build in warmed.builds]})
    else:
        console.print_line(f"{warmed}, in {warmed.folder}")
    return console.EXIT_FAILED if failed else 0


def _lengths(text: str | None) -> tuple[int, ...]:
    if text is None:
        return LENGTHS
    try:
        found = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--lengths: {text} found, wanted whole numbers of tokens, such as 700,3000") from error
    if found[0] < 1:
        raise InputError(f"--lengths: {found[0]} found, wanted 1 token or more")
    return found


def _dtype(config: Any, name: str, model: str) -> torch.dtype:
    """Of the weights, and so of what the kernels read."""
    found: Any = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = DTYPES.get(name, found) if name != "auto" else found
    found = getattr(torch, found) if isinstance(found, str) else found
    if found not in DTYPES.values():
        raise InputError(f"--dtype: the configuration of {model} tells {found}, wanted one of {', '.join(DTYPES)}")
    weights: torch.dtype = found
    return weights
