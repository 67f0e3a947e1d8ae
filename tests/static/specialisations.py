"""What Triton would specialise on at real calls, as JSON: printed for test_specialisations.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import builds
import cases_decode as decode
import cases_prefill as calls
import cases_training as training
import torch
from case import Case

ARCH = 90
BF16 = torch.bfloat16


def describe(call: Callable[[], object]) -> list[dict[str, object]]:
    return [
        {
            "kernel": build.name,
            "divisible": build.divisible,
            "constants": {name: value for name, value in build.constexprs.items() if not callable(value)},
        }
        for build in builds.record(Case("", call), ARCH)
    ]


def kinds(series_of_calls: list[Callable[[], object]]) -> int:
    """How many compilations a series of calls causes, for each kernel of a call."""
    return max(
        len({build.key for build in series})
        for series in zip(*(builds.record(Case("", call), ARCH) for call in series_of_calls))
    )


caches = [(1, 2048), (1, 2049), (1, 3000), (1, 30000), (3, 2048), (2, 77)]  # B, S
lengths = [(1, 1, 1), (1, 2500, 30), (1, 2512, 32), (1, 2501, 31), (3, 2500, 30), (2, 2500, 31)]  # B, N, L
print(
    json.dumps(
        {
            "score": describe(calls.score_call(2500, 30, 3072, BF16)),
            "score odd": describe(calls.score_call(2500, 30, 70, BF16)),
            "gather": describe(calls.gather_call(2600, (3072,), BF16)),
            "select": describe(calls.select_call(2500)),
            "gap": describe(calls.gap_call(2500)),
            "score_select": describe(calls.score_select_call(2530, 3072, BF16)),
            "gather_sequence": describe(calls.gather_sequence_call(2530, 3072, BF16)),
            "kinds of score_select by scores": kinds(
                [
                    calls.by_scores(calls.score_select_call(S, 3072, BF16), reach=reach, share=share, beta=beta)
                    for S, reach, share, beta in ((2530, 1, 1.0, 0.0), (2544, 16, 0.5, 0.4), (3001, 7, 0.7, -0.1))
                ]
            ),
            "kinds of score_select": kinds(
                [calls.score_select_call(N + L, 3072, BF16, B=B, ratio=300_000 + N) for B, N, L in lengths[1:]]
            ),
            "kinds of gather_sequence": kinds(
                [calls.gather_sequence_call(N + L, 3072, BF16, B=B, K=N) for B, N, L in lengths]
            ),
            "kinds of score": kinds([calls.score_call(N, L, 3072, BF16, B=B) for B, N, L in lengths]),
            "kinds of gather": kinds([calls.gather_call(N + L, (3072,), BF16, B=B, K=N) for B, N, L in lengths]),
            "kinds of select": kinds([calls.select_call(N) for N in (2049, 2500, 2501, 4096)]),
            "kinds of attend": kinds(
                [decode.attend_call(decode.GEMMA_3, BF16, S=S, B=B, slots=True, left=S % 9) for B, S in caches]
            ),
            "kinds of score_from_lse": kinds([decode.score_call(decode.GEMMA_3, BF16, S=S) for _, S in caches]),
            "kinds of plan": kinds([decode.plan_call(S, B) for B, S in caches[:3]]),
            "kinds of move": kinds([decode.move_call(decode.GEMMA_3, BF16, S=S, B=B, M=S % 9) for B, S in caches]),
            "kinds of key_bias_attention": kinds([training.forward_call(96, BF16, S) for _, S in caches]),
            "kinds of key_bias_attention_grad": kinds([training.grad_call(96, BF16, S) for _, S in caches]),
            "kinds of gap": kinds([calls.gap_call(N) for N in (2049, 2500, 2501, 4096)]),
        }
    )
)
