"""What the machine code of the decode kernels shows beyond the rules that all kernels obey."""

from __future__ import annotations

import re

ARITHMETIC = "HMMA|HGMMA|UTC.*MMA|F(ADD|MUL|FMA|MNMX|SEL|2FP)|FFMA|MUFU"


def test_scores_change_nothing_of_the_arithmetic_of_the_output(builds):
    # the interpreter shows equal bits; here, that the compiler contracts and orders neither build differently
    found: dict[tuple[str, int], dict[str, int]] = {}
    for build in builds:
        if build["kernel"] == "_attend_slots_kernel":
            found[build["case"], build["arch"]] = {
                opcode: number for opcode, number in build["opcodes"].items() if re.match(ARITHMETIC, opcode)
            }
    arches = {arch for case, arch in found if case == "attend scores"}
    assert 90 in arches
    for arch in arches:
        assert found["attend plain", arch] == found["attend scores", arch], arch
        assert sum(found["attend plain", arch].values()) > 100
