"""The machine, its software and the commit: what a figure is worth nothing without."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe(device: str) -> dict[str, Any]:
    """JSON-safe record of where and on what a run takes place."""
    record: dict[str, Any] = {
        "device": device_name(device),
        "type": device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "source": source_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return record | {"cache_mib": round(cache_bytes(device) / 2**20, 1)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else cpu_name()


def device_slug(device: str) -> str:
    """Folder of a device's results: ``nvidia-h100-80gb-hbm3``, ``cpu-amd-epyc``."""
    name = re.sub(r"\(r\)|\(tm\)|@.*", "", device_name(device).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return slug if device == "cuda" else f"cpu-{slug}"


def cpu_name() -> str:
    """Model name with family and model number, since virtual machines shorten the name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", platform.machine()).strip()
    family = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return name + family


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory: L2 of a GPU, the largest cache of a CPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) * 1024 for size in sizes if size.endswith("K")), default=32 * 2**20)


def source_digest() -> str:
    """Short hash of the kernel sources: tells results apart that share a commit but not a working tree."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "asymvlm_kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
