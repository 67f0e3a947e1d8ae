"""`asymvlm doctor`: what is installed and compiled, which backend runs here and why, whether pruning is right."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import asymvlm_kernels
from asymvlm.app.loading import VISION_COMMAND, VISION_EXTRA
from asymvlm.cli import console
from asymvlm.hf import versions
from asymvlm.models import supported_models
from asymvlm_kernels import UniformBudget, prune_sequence
from asymvlm_kernels.dispatch import explain_backend
from asymvlm_kernels.warming import cache

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "matplotlib", *VISION_EXTRA)


def doctor(*, as_json: bool) -> int:
    """Show versions, devices, the chosen backend and supported models, and test pruning against plain PyTorch."""
    with console.stdout_reserved(as_json):
        record = diagnose()
    if as_json:
        console.print_json(record)
    else:
        _show(record)
    return 0 if all(test["ok"] for test in record["self_test"]) else console.EXIT_FAILED


def diagnose() -> dict[str, Any]:
    """Everything the command prints, JSON-safe."""
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "asymvlm-kernels": asymvlm_kernels.__version__,  # also right in a bare checkout
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "transformers": {
            "tested": list(versions.TESTED),
            "installed_is_tested": versions.is_tested(),
        },
        "devices": [_describe(name) for name in devices],
        "backend": explain_backend(),
        "compiled": cache.describe(),
        "c_compiler": cache.c_compiler(),
        "supported_models": supported_models(),
        "self_test": [self_test(name) for name in devices],
    }


def self_test(device: str) -> dict[str, Any]:
    """Prune two tiny samples on ``device`` and compare with `literal_prune`, written out token by token."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 40, 32, generator=generator)
    vision_mask = torch.zeros(2, 40, dtype=torch.bool)
    vision_mask[0, 4:28] = True
    vision_mask[1, 2:19] = True
    text_mask = ~vision_mask
    weight = torch.rand(32, generator=generator) + 0.5
    wanted = literal_prune(embeds, vision_mask, text_mask, weight, 0.4)
    try:
        pruned = prune_sequence(
            embeds.to(device), vision_mask.to(device), text_mask.to(device), weight.to(device), UniformBudget(0.4)
        )
        rows = [row[row >= 0].tolist() for row in pruned.index.cpu()]
        problem = "" if rows == wanted else f"kept {rows}, wanted {wanted}"
        for b, kept in enumerate(wanted):
            real = pruned.index[b].cpu() >= 0
            if not problem and not torch.equal(pruned.embeds[b].cpu()[real], embeds[b, kept]):
                problem = f"row {b}: the kept embeddings are not the input's"
    except Exception as error:  # a doctor reports a crash, whatever it is
        problem = f"{type(error).__name__}: {error}"
    return {"device": device, "ok": not problem, "problem": problem}


def literal_prune(
    embeds: torch.Tensor, vision_mask: torch.Tensor, text_mask: torch.Tensor, weight: torch.Tensor, ratio: float
) -> list[list[int]]:
    """Positions each row keeps: Eq. 1 for each vision token by itself, then the K best and all text, ascending."""
    rows = []
    for b in range(len(embeds)):
        vision = vision_mask[b].nonzero()[:, 0].tolist()
        text = text_mask[b].nonzero()[:, 0].tolist()
        scores = {}
        for i in vision:
            unit = embeds[b, i] / embeds[b, i].norm()
            scores[i] = max(float((unit * weight) @ (embeds[b, j] / embeds[b, j].norm())) for j in text)
        count = max(1, int(len(vision) * round(ratio * 1e6)) // 10**6)
        best = sorted(vision, key=lambda i: (-scores[i], i))[:count]
        rows.append(sorted(best + text))
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        name = platform.processor() or platform.machine()
        return {"device": device, "name": name, "threads": torch.get_num_threads(), "capability": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": device,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _show(record: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in record["versions"].items():
        table.add_row(name, version or "absent")
    if missing := [name for name in VISION_EXTRA if record["versions"][name] is None]:
        words = f"{' and '.join(missing)} absent: models whose processor has a video part (Qwen2-VL and later, SmolVLM)"
        table.add_row("processors", f"{words} cannot be loaded from a checkpoint; {escape(VISION_COMMAND)}")
    tested, known = ", ".join(record["transformers"]["tested"]), record["transformers"]["installed_is_tested"]
    verdict = "the installed one is" if known else "NOT the installed one: run `asymvlm verify --model DIR`"
    table.add_row("tested with", f"transformers {tested}; {verdict}")
    for device in record["devices"]:
        capability = device["capability"]
        table.add_row(device["device"], f"{device['name']}{f', compute capability {capability}' if capability else ''}")
    backend = record["backend"]
    table.add_row("backend", f"{backend['backend']}: {backend['reason']}")
    for name, state in backend["available"].items():
        table.add_row(f"  {name}", "available" if state["ok"] else f"not available: {state['reason']}")
    compiled, compiler = record["compiled"], record["c_compiler"]
    archs = ", ".join(f"{count} for {name}" for name, count in compiled["architectures"].items())
    found = f"{compiled['builds']} builds of this package{f' ({archs})' if archs else ''}"
    table.add_row("compiled", f"{found}, {compiled['bytes'] / 2**20:.1f} MiB in {compiled['folder']}")
    words = compiler["path"] if compiler["ok"] else f"{compiler['path'] or 'none'}: {compiler['reason']}"
    table.add_row("C compiler", f"{words} (Triton calls it when it first launches a kernel)")
    table.add_row("models", ", ".join(record["supported_models"]))
    for test in record["self_test"]:
        verdict = "ok" if test["ok"] else f"FAILED: {test['problem']}"
        table.add_row("self-test", f"{verdict} (prune_sequence on {test['device']} against plain PyTorch)")
    console.out.print(table)
