"""Machine code of every shipped kernel for five architectures: rules for all, and nothing grows past the baseline."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import gate
import pytest
import torch
from case import Case, Kernel

UPDATE = "PYTHONPATH=. python tests/static/baseline.py --update"


def kernels(group: str) -> dict[str, Kernel]:
    found: dict[str, Kernel] = importlib.import_module(f"cases_{group}").KERNELS
    return found


def test_every_kernel_is_built_for_every_architecture(builds):
    built: dict[str, set[int]] = {}
    for build in builds:
        few = kernels(build["group"])[build["kernel"]].sampled
        built.setdefault(build["kernel"], set(gate.SHARED_MEMORY) - set(few) if few else set()).add(build["arch"])
    assert len(built) >= 8
    assert not {kernel: arches for kernel, arches in built.items() if arches != set(gate.SHARED_MEMORY)}


def test_machine_code_obeys_the_rules(builds):
    complaints = [complaint for build in builds for complaint in gate.broken_rules(build)]
    assert not complaints, "\n".join(complaints)


def test_nothing_grows_past_the_baseline(builds):
    complaints = []
    for group in sorted({build["group"] for build in builds}):
        file = gate.baseline_file(metadata.version("triton"), group)
        if not file.exists():
            pytest.skip(
                f"no baseline for this Triton: `PYTHONPATH=. python tests/static/baseline.py --update` writes {file}"
            )
        known = gate.load(file)
        part = [build for build in builds if build["group"] == group]
        complaints += [complaint for build in part for complaint in gate.growth(build, known)]
        whole = {name for name, kernel in kernels(group).items() if kernel.sampled is None}
        wanted = {name for name in known if name.endswith("sm_90") and name.split(" | ")[1] in whole}  # all are built
        complaints += [f"{name}: no longer built" for name in wanted - {gate.name_of(build) for build in part}]
    assert not complaints, "\n".join([*complaints, f"if that is meant: `{UPDATE}`, and commit what it changed"])


def build(**values: Any) -> dict[str, Any]:
    plain = {"case": "copy", "kernel": "_copy_kernel", "arch": 90, "rules": [], "warps": 4, "stack": 0, "local": 0}
    sizes = {"registers": 100, "shared": 1000, "instructions": 1000, "opcodes": {"LDG.E.128": 4, "STG.E": 2}}
    return plain | sizes | values


def test_growth_is_measured_with_a_margin():
    known = {gate.name_of(build()): list(gate.figures(build()).values())}
    assert known == {"copy | _copy_kernel | sm_90": [100, 1000, 1000, 2]}
    assert not gate.growth(build(registers=108, instructions=1030), known)
    assert not gate.growth(build(registers=10, shared=0, instructions=1), known)
    worse = {"registers": 109, "shared": 1001, "instructions": 1031, "opcodes": {"LDG.E.128": 4, "STG.E": 3}}
    for name, value in worse.items():
        (complaint,) = gate.growth(build(**{name: value}), known)
        assert "was" in complaint
    assert "not in the baseline" in gate.growth(build(case="new"), known)[0]


def test_an_update_says_what_it_changes(tmp_path):
    file = tmp_path / "triton-9.9" / "copies.json"
    gate.save(file, [build(), build(arch=80)])
    known = gate.load(file)
    assert not gate.diff([build(), build(arch=80)], known)
    assert gate.diff([build(registers=90), build(case="new")], known) == [
        "~ copy | _copy_kernel | sm_90: registers 100 -> 90",
        "+ new | _copy_kernel | sm_90: {'registers': 100, 'shared': 1000, 'instructions': 1000, 'narrow': 2}",
        "- copy | _copy_kernel | sm_80",
    ]


def test_rules_follow_from_the_kernel_and_the_case():
    kernel = Kernel(wide_loads=True, wide_stores=True, multiplies=True)
    cases = [Case("", print, dtype, wide=wide) for dtype in (torch.float16, torch.float32) for wide in (True, False)]
    wide = ["wide_loads", "wide_stores"]
    products = ["tensor_cores"], ["no_tensor_cores"]
    assert [kernel.rules(case) for case in cases] == [wide + products[0], products[0], wide + products[1], products[1]]
