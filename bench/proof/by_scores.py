"""`prune_sequence` with all that looks at the scores themselves: they spread, a threshold counts them, a floor does."""

from __future__ import annotations

from typing import Any

import torch

import asymvlm_kernels as ak
from asymvlm_kernels.prefill.prune.specification import PLAIN, select_places
from asymvlm_kernels.prefill.score import score_tokens
from bench.ops.prefill.cases import SCORE_TOLERANCE, Case, Inputs, Variant, WrongAnswer, prune_case
from bench.ops.prefill.shapes import Shape

BUDGET, SPREAD, FLOOR = ak.RelativeThresholdBudget(0.5), ak.Spread(), ak.AtLeastRelevant(0.6, usual=0.1)
WIDTH = 50  # tokens of a line


def by_scores_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Right are scores near those of `score_tokens`, and the very places that the reference keeps of these scores."""
    plain = prune_case(shape, dtype, device)

    def make(generator: torch.Generator) -> Inputs:
        embeds, vision, text, weight = plain.make(generator)
        lines = torch.arange(shape.S, device=generator.device).div(WIDTH, rounding_mode="floor")
        return embeds, vision, text, weight, torch.where(vision, lines, -1)

    def ours(embeds: torch.Tensor, *inputs: torch.Tensor) -> Any:
        vision, text, weight, lines = inputs
        options: dict[str, Any] = {"spread": SPREAD, "lines": lines, "floor": FLOOR, "static": True}
        return ak.prune_sequence(embeds, vision, text, weight, BUDGET, **options)

    def check(inputs: Inputs, output: ak.PrunedSequence, tolerance: float) -> float:
        embeds, vision, text, weight, lines = inputs
        with ak.use_backend("reference"):
            scores = score_tokens(embeds, embeds, weight, vision_mask=vision, text_mask=text)
            rule: dict[str, Any] = {"spreading": (SPREAD, lines), "floor": FLOOR}
            tokens = (embeds, vision, text, None, None)
            wanted = select_places(PLAIN, tokens, output.own, BUDGET, shape.S, **rule)
        error = float((output.own[vision] - scores[vision]).abs().max())
        if not error <= tolerance:  # NaN fails too
            raise WrongAnswer(f"scores are {error:.1e} from the reference, allowed {tolerance:.0e}")
        for name, found in zip(("scores", "gap", "counts", "lengths"), wanted[:4], strict=True):
            if not torch.equal(getattr(output, name), found):
                raise WrongAnswer(f"{name} are not those of the reference")
        kept = [row[row >= 0].tolist() for row in output.index]
        if kept != [row[row >= 0].tolist() for row in wanted[4]]:
            raise WrongAnswer("other places are kept than by the reference")
        return error

    return Case("prune_by_scores", shape, dtype, make, check, {"ours": Variant(ours, tolerance=SCORE_TOLERANCE)})


BY_SCORES = {"prune_by_scores": by_scores_case}

__all__ = ["BY_SCORES"]
