"""Run every op once on awkward sizes and compare it with the reference: a small job for ``compute-sanitizer``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import asymvlm_kernels as ak
from asymvlm_kernels.unproven.paths import PrefillPath, use_path

SIZES = ((1, 1, 16, 1), (2, 37, 70, 5), (1, 300, 128, 65))  # B, N, D, L
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = ((2, 37, 70, 5), torch.bfloat16)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto", help="what is compared with the reference")
    parser.add_argument("--one", action="store_true", help="one combination, where each takes a minute")
    options = parser.parse_args(args)
    device, backend = options.device, options.backend
    chosen = [ONE] if options.one else [(size, dtype) for size in SIZES for dtype in DTYPES]
    for (B, N, D, L), dtype in chosen:
        exercise(B, N, D, L, dtype, device, backend)
        exercise_decode(B, N, D, dtype, device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(chosen)} combinations agree with the reference on {device}", flush=True)
    return 0


def exercise(B: int, N: int, D: int, L: int, dtype: torch.dtype, device: str, backend: str = "auto") -> None:
    """Raises AssertionError where ``backend`` and the reference differ."""
    generator = torch.Generator().manual_seed(B * N + D)
    vision, text = (torch.randn(B, rows, D, generator=generator).to(device, dtype) for rows in (N, L))
    weight = (torch.rand(D, generator=generator) + 0.5).to(device)
    mask = (torch.rand(B, N, generator=generator) > 0.2).to(device)
    counts = torch.full((B,), max(N // 2, 1), device=device)
    scores, gap, index, rows, gradient, counted = [], [], [], [], [], []
    for name in ("reference", backend):
        with ak.use_backend(name):
            scores.append(ak.score_tokens(vision, text, weight, vision_mask=mask))
            gap.append(ak.importance_gap(scores[0], mask))
            index.append(ak.select_tokens(scores[0], counts, mask=mask, capacity=N))
            rows.append(ak.gather_rows(vision, index[0]))
            vision_mask = torch.cat((mask, torch.zeros(B, L, dtype=torch.bool, device=device)), dim=1)
            text_mask = torch.arange(N + L, device=device).expand(B, -1) >= N
            embeds = torch.cat((vision, text), dim=1)
            arguments = (embeds, vision_mask, text_mask, weight, ak.UniformBudget(0.5))
            pruned = [ak.prune_sequence(*arguments, static=True)]
            for path in (PrefillPath(launches=1), PrefillPath(overlap=True)):
                with use_path(path):
                    pruned.append(ak.prune_sequence(*arguments, static=True))
            if backend != "cuda":  # the CUDA library refuses what looks at all scores
                counted.append(prune_by_scores(*arguments[:3], scores[0]))
            trained = weight.clone().requires_grad_()
            ak.score_tokens(vision, text, trained, vision_mask=mask).masked_fill(~mask, 0).sum().backward()
            gradient.append(trained.grad)
        for other in pruned[1:]:  # every path gives the same bits
            torch.testing.assert_close((other.embeds, other.index), (pruned[0].embeds, pruned[0].index), rtol=0, atol=0)
    torch.testing.assert_close(gradient[1], gradient[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gap[1], gap[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(index[1], index[0], rtol=0, atol=0)
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=0)
    for one in counted[1:]:
        torch.testing.assert_close(one, counted[0], rtol=0, atol=0, equal_nan=True)


def prune_by_scores(
    embeds: torch.Tensor, vision_mask: torch.Tensor, text_mask: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Kept tokens, counts and spread scores where spread, threshold and floor look at all ``(B, N)`` scores."""
    B, S = vision_mask.shape
    lines = torch.arange(S, device=embeds.device).expand(B, -1) // 7
    given = torch.nn.functional.pad(scores, (0, S - scores.shape[1]))
    rule: dict[str, Any] = {"spread": ak.Spread(), "lines": lines, "floor": ak.AtLeastRelevant(0.6)}
    budget = ak.RelativeThresholdBudget(0.5)
    found = ak.prune_sequence(embeds, vision_mask, text_mask, None, budget, scores=given, static=True, **rule)
    assert found.scores is not None
    return found.index, found.counts, found.scores


def exercise_decode(B: int, S: int, D: int, dtype: torch.dtype, device: str, backend: str = "auto") -> None:
    """The same for the ops of a decode step: S slots in any order with holes, two key heads with three query heads."""
    generator = torch.Generator().manual_seed(S + D)
    q, k, v = (torch.randn(B, n, h, D, generator=generator).to(device, dtype) for n, h in ((2, 6), (S, 2), (S, 2)))
    place = torch.stack([torch.randperm(S, generator=generator) for _ in range(B)]).int()
    place = place.masked_fill(torch.rand(B, S, generator=generator) < 0.2, -1).to(device)
    slots: dict[str, Any] = {"slot_pos": place, "q_pos": torch.full((B,), S, device=device), "window_size": (S // 2, 0)}
    found = []
    for name in ("reference", backend):
        with ak.use_backend(name):
            out, lse, scores = ak.flash_attn_with_kvcache(
                q, k, v, softcap=20.0, return_softmax_lse=True, return_scores=True, score_rows=2, **slots
            )
            again = ak.score_from_lse(q, k, lse, softcap=20.0, score_rows=2, **slots)
            plain = ak.flash_attn_with_kvcache(q, k, v, causal=True, cache_seqlens=max(S - 1, 1))
            source, target = ak.plan_moves(place >= 0)
            moved = [k.clone(), v.clone(), place.clone()]
            ak.move_slots_(moved, source, target)
        found.append((out, scores, again, plain, source, target, *moved))
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        rtol, atol = (0.0, 0.0) if number >= 4 else (1e-4, 1e-5) if dtype == torch.float32 else (0.02, 0.02)
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)


if __name__ == "__main__":
    raise SystemExit(main())
