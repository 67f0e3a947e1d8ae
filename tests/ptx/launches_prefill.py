"""Small launches of the prefill kernels and of `relative_counts`, beside their references."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from check import Emulated, Launch, close, same

from asymvlm_kernels.prefill import gather, reference, relative, score, score_grad, select
from asymvlm_kernels.prefill.prune import known_length, scratch, two_launches
from asymvlm_kernels.testing import exact_inputs, prefill_inputs
from asymvlm_kernels.tuning import prune as tuning
from asymvlm_kernels.unproven import one_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCORE = 4e-6  # of a cosine: sums in another order
TWO = ("_score_select_kernel", "_gather_sequence_kernel")
ONE = ("_prune_static_kernel",)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_gather(shape: tuple[int, ...], dtype: torch.dtype, emulated: Emulated) -> None:
    B, S = shape[:2]
    rows = torch.randn(shape, generator=draw())
    rows = rows > 0 if dtype == torch.bool else (rows * 50).to(dtype)
    index = torch.rand(B, S, generator=draw(1)).argsort(-1)[:, : S // 2]
    index[-1, S // 3 :] = -1
    pad = 0 if dtype == torch.bool else 3
    with emulated():
        got = gather._gather_rows_triton(rows, index, pad)
    same(got, reference.gather_rows(rows, index, pad), "rows")


def ties_and_nan(N: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores, mask = torch.randn(2, N, generator=draw()), torch.rand(2, N, generator=draw(1)) > 0.2
    scores[0, 5] = float("nan")
    scores[0, 7:30] = scores[0, 40]
    return scores, mask


def check_select(N: int, emulated: Emulated) -> None:
    scores, mask = ties_and_nan(N)
    counts = torch.tensor([N // 3, 7], dtype=torch.int32)
    with emulated():
        got = select._select_tokens_triton(scores, counts, mask, N // 2)
    same(got, reference.select_tokens(scores, counts, mask, N // 2), "index")


def check_gap(N: int, emulated: Emulated) -> None:
    scores, mask = ties_and_nan(N)
    with emulated():
        got = select._importance_gap_triton(scores, mask)
    same(got, reference.importance_gap(scores, mask), "gap")


def check_relative(N: int, emulated: Emulated) -> None:
    scores, mask = torch.randn(2, N, generator=draw()), torch.rand(2, N, generator=draw(1)) > 0.2
    with emulated():
        got = relative._relative_counts_triton(scores, mask, 0.4, 50_000, 1_000_000)
    same(got, relative._relative_counts_reference(scores, mask, 0.4, 50_000, 1_000_000), "counts")


def masks_of(N: int, L: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, N, generator=draw()) > 0.2, torch.rand(2, L, generator=draw(1)) > 0.2


def check_score(N: int, L: int, D: int, dtype: torch.dtype, emulated: Emulated) -> None:
    inputs = prefill_inputs(2, N, L, D, dtype)
    arguments = (inputs.vision, inputs.text, inputs.weight, *masks_of(N, L))
    with emulated():
        got = score._score_tokens_triton(*arguments)
    close(got, reference.score_tokens(*arguments), SCORE, "scores")


def check_best_and_gradient(N: int, L: int, D: int, dtype: torch.dtype, emulated: Emulated) -> None:
    inputs = prefill_inputs(2, N, L, D, dtype)
    arguments = (inputs.vision, inputs.text, inputs.weight, *masks_of(N, L))
    grad = torch.randn(2, N, generator=draw())
    want = reference.score_tokens_best(*arguments)
    with emulated():
        got = score._score_tokens_best_triton(*arguments)
        gradient = score_grad._score_tokens_grad_triton(grad, inputs.vision, inputs.text, *want[1:])
    close(got[0], want[0], SCORE, "scores")
    same(got[1], want[1], "best")
    close(got[2][want[1] >= 0], want[2][want[1] >= 0], SCORE, "norms")
    close(gradient, reference.score_tokens_grad(grad, inputs.vision, inputs.text, *want[1:]), 1e-5, "gradient")


def sequence(B: int, N: int, L: int, D: int, dtype: torch.dtype, *, exact: bool = False) -> tuple[Any, ...]:
    """Arguments of `prune_static`: text around the image, padding in the last sample, three carried tensors."""
    inputs = exact_inputs(B, N, L, D, dtype) if exact else prefill_inputs(B, N, L, D, dtype, count=N // 2)
    embeds = torch.cat([inputs.text[:, :3], inputs.vision, inputs.text[:, 3:]], 1).contiguous()
    S = N + L
    vision = torch.zeros(B, S, dtype=torch.bool)
    vision[:, 3 : 3 + N] = True
    text = ~vision
    if B > 1:
        text[-1, -2:] = False
    protect = torch.zeros_like(vision)
    carry = [torch.arange(S).repeat(3, B, 1), torch.arange(S).repeat(B, 1), text.clone()]
    tokens = (embeds, vision, text, protect, inputs.weight)
    moving = (carry, [0, -100, 0], [True, False, False], N // 2 + L + 2, True)
    return *tokens, [500_000] * 3, [0.0, 0.5], *moving


def pruned_in_one_launch(*arguments: Any) -> tuple[Any, ...]:
    (*selected, _, own), moved = one_launch.prune_in_one_launch(arguments[:5], *arguments[5:])
    return *selected, *moved, own


def compare_pruned(got: tuple[Any, ...], want: tuple[Any, ...], exact: bool = False) -> None:
    for number, name in enumerate(("scores", "gap")):
        if exact:
            same(got[number], want[number], name)
        else:
            close(got[number], want[number], SCORE, name)
    for number, name in enumerate(("counts", "lengths", "rows", "index"), 2):
        same(got[number], want[number], name)
    same(got[6], want[6], "carried")
    for use, counters in scratch._counters.items():
        assert not counters.any(), f"counters {use} are not left zero"


def check_prune(
    prune: Callable[..., Any],
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    emulated: Emulated,
    *,
    exact: bool = False,
) -> None:
    arguments = sequence(*size, dtype, exact=exact)
    scratch._counters.clear()  # a launch that was broken off may have left them
    with emulated():
        got = prune(*arguments)
    compare_pruned(got, known_length._prune_static_reference(*arguments), exact)


def check_splits(size: tuple[int, int, int, int], dtype: torch.dtype, emulated: Emulated) -> None:
    """However the parts of a tile share the width, the bits are the same."""
    tokens = sequence(*size, dtype)[:7]
    found = []
    for parts, rounds in ((1, 0), (3, 1), (3, 2), (6, 2)):
        split = tuning.Split(parts, rounds)
        with emulated(), patch.object(two_launches, "split_of", lambda *_, split=split: split):
            found.append(two_launches._score_select_triton(*tokens, size[1] + size[2]))
    for other in found[1:]:
        for name, got, want in zip(("scores", "gap", "counts", "lengths", "order"), other, found[0], strict=True):
            same(got, want, name)
    close(found[0][0], two_launches._score_select_reference(*tokens, size[1] + size[2])[0], SCORE, "scores")


def check_given(N: int, emulated: Emulated) -> None:
    arguments = sequence(2, N, 9, 8, BF16)
    given, _ = ties_and_nan(N + 9)
    tokens = (*arguments[:4], None)
    with emulated():
        got = known_length._prune_static_triton(*tokens, *arguments[5:], given)
    compare_pruned(got, known_length._prune_static_reference(*tokens, *arguments[5:], given), exact=True)


def spreading(arguments: tuple[Any, ...], beta: float = 0.4) -> tuple[Any, ...]:
    """Arguments of `prune_static` with lines of 7 places, a relative threshold and a floor of relevant tokens."""
    lines = (torch.arange(arguments[1].shape[1]) // 7).expand(2, -1)[: len(arguments[1])].contiguous()
    return *arguments[:5], [50_000, 900_000], [beta], *arguments[7:], None, lines, 3, 0.7, [0.3, 0.1]


def check_by_scores(prune: Callable[..., Any], size: tuple[int, int, int, int], emulated: Emulated) -> None:
    """Exact scores spread and are counted; alone as in a batch with a floor that decides."""
    arguments = spreading(sequence(*size, BF16, exact=True))
    scratch._counters.clear()
    with emulated():
        got = prune(*arguments)
    compare_pruned(got, known_length._prune_static_reference(*arguments), exact=True)
    same(got[7], known_length._prune_static_reference(*arguments)[7], "own")


def check_given_by_scores(N: int, emulated: Emulated) -> None:
    """NaN and ties spread; then a threshold without spread."""
    given, _ = ties_and_nan(N + 9)
    arguments = list(spreading(sequence(2, N, 9, 8, BF16)))
    arguments[4], arguments[12] = None, given
    for beta, lines in ((0.4, arguments[13]), (1.3, arguments[13]), (0.4, None)):
        arguments[6], arguments[13] = [beta], lines
        with emulated():
            got = known_length._prune_static_triton(*arguments)
        want = known_length._prune_static_reference(*arguments)
        compare_pruned(got, want, exact=True)
        same(got[7], want[7], "own")


def launches() -> Iterator[Launch]:
    part = functools.partial
    two, one = known_length._prune_static_triton, pruned_in_one_launch
    row = ("_gather_rows_kernel",)
    yield Launch("gather bfloat16 wide", row, part(check_gather, (2, 37, 3072), BF16), (80, 90))
    yield Launch("gather bfloat16 odd", row, part(check_gather, (2, 37, 70), BF16), (90,))
    yield Launch("gather bool flags", row, part(check_gather, (2, 600), torch.bool), (90,))
    yield Launch("gather int64 positions", row, part(check_gather, (2, 600), torch.int64))
    yield Launch("select 256", ("_select_tokens_kernel",), part(check_select, 256), (80, 90))
    yield Launch("select 9000", ("_select_tokens_kernel",), part(check_select, 9000))
    yield Launch("gap 256", ("_importance_gap_kernel",), part(check_gap, 256), (80, 90))
    yield Launch("gap 9000", ("_importance_gap_kernel",), part(check_gap, 9000))
    yield Launch("relative 256", ("_relative_counts_kernel",), part(check_relative, 256), (80, 90))
    score_tokens = ("_fold_text_kernel", "_score_tokens_kernel")
    yield Launch("score bfloat16 odd", score_tokens, part(check_score, 70, 9, 70, BF16), (90,))
    yield Launch("score bfloat16 rows of 8", score_tokens, part(check_score, 70, 40, 136, BF16))
    yield Launch("score float16", score_tokens, part(check_score, 70, 9, 128, FP16))
    yield Launch("score float32", score_tokens, part(check_score, 40, 9, 128, FP32))
    best = (*score_tokens, "_score_tokens_grad_kernel")
    yield Launch("best and gradient bfloat16", best, part(check_best_and_gradient, 70, 9, 136, BF16))
    yield Launch("best and gradient bfloat16 odd", best, part(check_best_and_gradient, 40, 9, 70, BF16))
    yield Launch("best and gradient bfloat16 wide", best, part(check_best_and_gradient, 20, 9, 3072, BF16), (90,))
    yield Launch("given scores", ("_select_given_kernel", TWO[1]), part(check_given, 300), (90,))
    given = ("_select_given_kernel", TWO[1])
    yield Launch("given scores by scores", given, part(check_given_by_scores, 300), (90,))
    yield Launch("given scores by scores long row", given, part(check_given_by_scores, 9000))
    yield Launch("two launches by scores", TWO, part(check_by_scores, two, (2, 130, 9, 256)))
    yield Launch("two launches by scores long row", TWO, part(check_by_scores, two, (1, 8300, 9, 64)))
    yield Launch("one launch by scores", ONE, part(check_by_scores, one, (2, 130, 9, 256)))
    yield Launch("two launches bfloat16", TWO, part(check_prune, two, (2, 130, 9, 256), BF16), (90,))
    yield Launch("two launches bfloat16 long text", TWO, part(check_prune, two, (2, 130, 40, 256), BF16), (90,))
    yield Launch("two launches bfloat16 200 texts", TWO, part(check_prune, two, (1, 130, 200, 256), BF16))
    yield Launch("splits bfloat16", TWO[:1], part(check_splits, (1, 70, 200, 512), BF16))
    yield Launch("splits float16", TWO[:1], part(check_splits, (1, 70, 70, 256), FP16))
    yield Launch("two launches bfloat16 odd", TWO, part(check_prune, two, (1, 130, 33, 70), BF16))
    yield Launch("two launches float16", TWO, part(check_prune, two, (1, 130, 9, 256), FP16))
    yield Launch("two launches float32", TWO, part(check_prune, two, (1, 70, 9, 128), FP32))
    yield Launch("two launches ties", TWO, part(check_prune, two, (2, 130, 9, 256), BF16, exact=True), (90,))
    yield Launch("two launches long row", TWO, part(check_prune, two, (1, 8300, 9, 64), BF16, exact=True))
    yield Launch("one launch bfloat16", ONE, part(check_prune, one, (3, 130, 9, 256), BF16), (90,))
    yield Launch("one launch bfloat16 long text", ONE, part(check_prune, one, (2, 130, 40, 256), BF16))
    yield Launch("one launch float32", ONE, part(check_prune, one, (1, 70, 9, 128), FP32))
