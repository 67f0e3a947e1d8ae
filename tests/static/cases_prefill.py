"""The prefill kernels: what each does, and every configuration and dtype that ships."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from case import HALVES, Case, Kernel

from asymvlm_kernels.prefill import gather, score, score_grad, select
from asymvlm_kernels.prefill.prune import two_launches
from asymvlm_kernels.unproven import one_launch

Launch = functools.partial[object]
KERNELS = {
    "_fold_text_kernel": Kernel(wide_loads=True, wide_stores=True),
    "_score_tokens_kernel": Kernel(wide_loads=True, multiplies=True),
    "_score_tokens_grad_kernel": Kernel(wide_loads=True),
    "_importance_gap_kernel": Kernel(),
    "_select_tokens_kernel": Kernel(),
    "_gather_rows_kernel": Kernel(wide_loads=True, wide_stores=True, only_wide_loads=True),
    "_score_select_kernel": Kernel(wide_loads=True, wide_stores=True, multiplies=True, rounds_float64_twice=True),
    "_select_given_kernel": Kernel(rounds_float64_twice=True),
    "_gather_sequence_kernel": Kernel(wide_loads=True, wide_stores=True),
    "_prune_static_kernel": Kernel(wide_loads=True, wide_stores=True, multiplies=True, rounds_float64_twice=True),
}


def score_call(
    N: int, L: int, D: int, dtype: torch.dtype, *, B: int = 1, bare: bool = False
) -> functools.partial[object]:
    vision, text, weight = torch.empty(B, N, D, dtype=dtype), torch.empty(B, L, D, dtype=dtype), torch.empty(D)
    masks = torch.empty(B, N, dtype=torch.bool), torch.empty(B, L, dtype=torch.bool)
    extra = (None, None, None) if bare else (weight, *masks)
    return functools.partial(score._score_tokens_triton, vision, text, *extra)


def best_call(N: int, L: int, D: int, dtype: torch.dtype) -> Launch:
    """The forward of a training step, with the masks of `score_call`."""
    return functools.partial(score._score_tokens_best_triton, *score_call(N, L, D, dtype).args)


def grad_call(N: int, L: int, D: int, dtype: torch.dtype, *, B: int = 1) -> Launch:
    vision, text, rows = torch.empty(B, N, D, dtype=dtype), torch.empty(B, L, D, dtype=dtype), torch.empty(B, N)
    best = torch.empty(B, N, dtype=torch.int32)
    return functools.partial(score_grad._score_tokens_grad_triton, rows, vision, text, best, rows)


def gather_call(S: int, tail: tuple[int, ...], dtype: torch.dtype, *, B: int = 1, K: int = 1625) -> Launch:
    index = torch.empty(B, K, dtype=torch.int64)
    return functools.partial(gather._gather_rows_triton, torch.empty(B, S, *tail, dtype=dtype), index, 0)


def gap_call(N: int) -> Launch:
    return functools.partial(select._importance_gap_triton, torch.empty(1, N), torch.empty(1, N, dtype=torch.bool))


def select_call(N: int) -> Launch:
    scores, mask = torch.empty(1, N), torch.empty(1, N, dtype=torch.bool)
    return functools.partial(select._select_tokens_triton, scores, torch.empty(1, dtype=torch.int32), mask, N)


def score_select_call(
    S: int, D: int, dtype: torch.dtype, *, B: int = 1, bare: bool = False, ratio: int = 500_000
) -> Launch:
    embeds, mask = torch.empty(B, S, D, dtype=dtype), torch.empty(B, S, dtype=torch.bool)
    extra = (None, None) if bare else (mask, torch.empty(D))
    return functools.partial(
        two_launches._score_select_triton, embeds, mask, mask, *extra, [ratio] * 3, [0.0, ratio], S
    )


def select_given_call(S: int) -> Launch:
    call = score_select_call(S, 8, torch.bfloat16)
    return functools.partial(call.func, *call.args[:4], None, *call.args[5:], torch.empty(1, S))


def by_scores(call: Launch, *, spreads: bool = True, reach: int = 4, share: float = 0.7, beta: float = 0.4) -> Launch:
    """The same with a relative threshold, and where scores spread with a floor of relevant tokens."""
    tokens, (capacity, *given) = call.args[:5], call.args[7:]
    rule = (torch.empty(1, capacity, dtype=torch.int64), reach, share, [beta, 0.3]) if spreads else ()
    return functools.partial(
        call.func, *tokens, [50_000, 1_000_000], [beta], capacity, *(given or [None]), *rule, **call.keywords
    )


def gather_sequence_call(S: int, D: int, dtype: torch.dtype, *, B: int = 1, K: int = 1655, carries: int = 3) -> Launch:
    order, lengths = torch.empty(B, S, dtype=torch.int32), torch.empty(B, dtype=torch.int32)
    ids, flags = torch.empty(B, S, dtype=torch.int64), torch.empty(B, S, dtype=torch.bool)
    carry = [torch.empty(3, B, S, dtype=torch.int64), ids, flags][:carries]
    arguments = (order, lengths, carry, [0, -100, 0][:carries], [True, False, False][:carries], K, True)
    return functools.partial(two_launches._gather_sequence_triton, torch.empty(B, S, D, dtype=dtype), *arguments)


def one_launch_call(S: int, D: int, dtype: torch.dtype, *, B: int = 1, K: int = 1655, carries: int = 3) -> Launch:
    embeds, mask = torch.empty(B, S, D, dtype=dtype), torch.empty(B, S, dtype=torch.bool)
    tokens = (embeds, mask, mask, mask, torch.empty(D))
    _, _, carry, pads, stacked, *_ = gather_sequence_call(S, 8, dtype, B=B, carries=carries).args[1:]
    arguments = ([500_000] * 3, [0.0, 0.5], carry, pads, stacked, K, True)
    return functools.partial(one_launch.prune_in_one_launch, tokens, *arguments)


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, *HALVES):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"score {name} wide", score_call(2500, 30, 3072, dtype), dtype, wide=True)
        yield Case(f"score {name} odd", score_call(2500, 30, 70, dtype), dtype)
        yield Case(f"fused score {name} wide", score_select_call(2530, 3072, dtype), dtype, wide=True)
        yield Case(f"fused score {name} odd", score_select_call(2530, 70, dtype), dtype)
    bf16 = torch.bfloat16
    yield Case("score bare", score_call(2500, 30, 3072, bf16, bare=True), bf16, wide=True)
    yield Case("score rows of 8", score_call(2500, 30, 1176, bf16), bf16, wide=True)  # a multiple of 16 bytes only
    yield Case("score with best", best_call(2500, 30, 3072, bf16), bf16, wide=True)
    yield Case("gradient bfloat16 wide", grad_call(2500, 30, 3072, bf16), wide=True)
    yield Case("gradient bfloat16 odd", grad_call(2500, 30, 70, bf16))
    yield Case("gradient float32 wide", grad_call(2500, 30, 3072, torch.float32), wide=True)
    yield Case("gather bfloat16 wide", gather_call(2600, (3072,), bf16), wide=True)
    yield Case("gather bfloat16 rows of 8", gather_call(2600, (1176,), bf16), wide=True)
    yield Case("gather bfloat16 odd", gather_call(2600, (70,), bf16))
    yield Case("gather float32 wide", gather_call(2600, (3072,), torch.float32), wide=True)
    yield Case("gather int64 positions", gather_call(2600, (), torch.int64))
    yield Case("gather bool flags", gather_call(2600, (), torch.bool))
    yield Case("fused score bare", score_select_call(8000, 3072, bf16, bare=True), bf16, wide=True)
    yield Case("fused score rows of 8", score_select_call(300, 1176, bf16), bf16, wide=True)
    yield Case("fused score long", score_select_call(60000, 3584, bf16), bf16, wide=True)
    yield Case("fused score spread", by_scores(score_select_call(2530, 3072, bf16)), bf16, wide=True)
    yield Case("fused score spread long", by_scores(score_select_call(60000, 3584, bf16)), bf16, wide=True)
    relative = by_scores(score_select_call(2530, 3072, bf16), spreads=False)
    yield Case("fused score relative", relative, bf16, wide=True)
    yield Case("given scores", select_given_call(2530))
    yield Case("given scores long", select_given_call(60000))
    yield Case("given scores spread", by_scores(select_given_call(2530)))
    yield Case("given scores spread long", by_scores(select_given_call(60000)))
    yield Case("fused copy bfloat16 wide", gather_sequence_call(2530, 3072, bf16), wide=True)
    yield Case("fused copy float32 wide", gather_sequence_call(2530, 3072, torch.float32), wide=True)
    yield Case("fused copy bfloat16 odd", gather_sequence_call(2530, 70, bf16, carries=0))
    yield Case("one launch bfloat16 wide", one_launch_call(2530, 3072, bf16), bf16, wide=True)
    yield Case("one launch float32 wide", one_launch_call(2530, 3072, torch.float32), torch.float32, wide=True)
    yield Case("one launch long", one_launch_call(60000, 3584, bf16, carries=1), bf16, wide=True)
    overlap = {"score": score_select_call(2530, 3072, bf16), "copy": gather_sequence_call(2530, 3072, bf16)}
    for name, call in overlap.items():
        yield Case(f"fused {name} overlapped", functools.partial(call, overlap=True), bf16, oldest=90, wide=True)
    for N in (256, 2500, 16384, 65536):
        yield Case(f"gap {N}", gap_call(N))
        yield Case(f"select {N}", select_call(N))
