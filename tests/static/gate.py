"""What machine code must obey, and the committed baseline it may not grow past.

Every rule looks at one build of `builds.py` and answers with a complaint that names the value found and the value
wanted, or with an empty string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Build = dict[str, Any]
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
REGISTERS = 65536  # of one SM
FRAME = 8  # bytes of stack that ptxas reserves around the subroutine of a division and never touches

FOLDER = Path(__file__).parent / "baseline"
FIGURES = ("registers", "shared", "instructions", "narrow")
# Noise: registers are given out by eights, and for sm_100 two builds of one source differ by a few instructions and up
# to three narrow accesses (Triton 3.9).
MARGIN: dict[str, Callable[[int], int]] = {
    "registers": lambda known: known + 8,
    "shared": lambda known: known,
    "instructions": lambda known: known + max(16, known // 33),
    "narrow": lambda known: known + known // 32,
}


def count(build: Build, pattern: str) -> int:
    return sum(number for opcode, number in build["opcodes"].items() if re.match(pattern, opcode))


def no_spills(build: Build) -> str:
    found = count(build, "LDL|STL")
    spills = found or build["local"] or build["stack"] > FRAME
    return f"spills: {found} local accesses, {build['stack']} bytes of stack, none wanted" if spills else ""


def fits(build: Build) -> str:
    most = SHARED_MEMORY[build["arch"]] * 1024
    if build["shared"] > most:
        return f"{build['shared']} bytes of shared memory, at most {most} wanted"
    registers = build["registers"] * build["warps"] * 32
    return f"{registers} registers a block, at most {REGISTERS} wanted" if registers > REGISTERS else ""


def wide_loads(build: Build) -> str:
    return "" if count(build, r"LDG(STS)?\.(.*\.)?128") else "no load of 128 bits"


def wide_stores(build: Build) -> str:
    return "" if count(build, r"STG\.(.*\.)?128") else "no store of 128 bits"


def only_wide_loads(build: Build) -> str:
    narrow = count(build, r"LDG(?!\.(.*\.)?(128|64))")  # those of 64 bits read the index
    return f"{narrow} loads of 32 bits or less, none wanted" if narrow else ""


def wide_copies(build: Build) -> str:
    return "" if count(build, r"LDGSTS\.(.*\.)?128") else "no asynchronous copy of 128 bits"


def tensor_cores(build: Build) -> str:
    wanted = TENSOR_CORE[build["arch"]]
    return "" if count(build, wanted) else f"no {wanted}"


def any_tensor_cores(build: Build) -> str:
    return "" if count(build, "HMMA|HGMMA|UTC.*MMA") else "no matrix product on tensor cores"


def no_tensor_cores(build: Build) -> str:
    found = count(build, "HMMA|HGMMA|UTC.*MMA")
    return "" if not found and count(build, "FFMA") else f"{found} instructions that round fp32 to TF32, FFMA wanted"


def rounds_float64_twice(build: Build) -> str:
    # PyTorch rounds the product, then the sum
    return "" if not count(build, "DFMA") and count(build, "DMUL") else "float64 is contracted to DFMA"


RULES = {
    rule.__name__: rule
    for rule in (
        wide_loads,
        wide_stores,
        only_wide_loads,
        wide_copies,
        tensor_cores,
        any_tensor_cores,
        no_tensor_cores,
        rounds_float64_twice,
    )
}


def figures(build: Build) -> dict[str, int]:
    """What the baseline holds of a build. ``narrow``: accesses of global memory of less than 128 bits."""
    narrow = count(build, r"(LDG|LDGSTS|STG)(?!\.(.*\.)?128)")
    return {name: narrow if name == "narrow" else build[name] for name in FIGURES}


def name_of(build: Build) -> str:
    return f"{build['case']} | {build['kernel']} | sm_{build['arch']}"


def broken_rules(build: Build) -> list[str]:
    """Complaints about one build, without looking at the baseline."""
    rules = (no_spills, fits, *(RULES[name] for name in build["rules"]))
    return [f"{name_of(build)}: {complaint}" for rule in rules if (complaint := rule(build))]


def growth(build: Build, known: dict[str, list[int]]) -> list[str]:
    """Figures of one build that grew past the margin around the baseline; a build it lacks is a complaint too."""
    if name_of(build) not in known:
        return [f"{name_of(build)}: not in the baseline"]
    found = figures(build)
    return [
        f"{name_of(build)}: {name} {found[name]}, was {old}"
        for name, old in zip(FIGURES, known[name_of(build)], strict=True)
        if found[name] > MARGIN[name](old)
    ]


def baseline_file(version: str, group: str) -> Path:
    """``baseline/triton-3.9/prefill.json`` for 3.9.0."""
    return FOLDER / f"triton-{'.'.join(version.split('.')[:2])}" / f"{group}.json"


def load(file: Path) -> dict[str, list[int]]:
    content: dict[str, list[int]] = json.loads(file.read_text()) if file.exists() else {}
    return content


def save(file: Path, builds: Iterable[Build]) -> None:
    """One build a line, so that a diff reads."""
    lines = [f" {json.dumps(name_of(build))}: {list(figures(build).values())}" for build in builds]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def diff(builds: Iterable[Build], known: dict[str, list[int]]) -> list[str]:
    """What an update changes, build by build: new, gone, and every figure that moved."""
    lines, names = [], set()
    for build in builds:
        name, found = name_of(build), list(figures(build).values())
        names.add(name)
        if name not in known:
            lines.append(f"+ {name}: {dict(zip(FIGURES, found, strict=True))}")
        elif found != known[name]:
            moved = [(f, o, n) for f, o, n in zip(FIGURES, known[name], found, strict=True) if o != n]
            lines.append(f"~ {name}: " + ", ".join(f"{figure} {old} -> {new}" for figure, old, new in moved))
    return lines + [f"- {name}" for name in known if name not in names]
