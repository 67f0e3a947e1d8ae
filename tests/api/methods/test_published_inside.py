"""FastV, PyramidDrop and SparseVLM, each restated in plain loops and run by hand, layer by layer."""

from __future__ import annotations

import pytest
import tiny
import torch
from by_hand import ByHand, best, clusters, raters
from checks import GREEDY, assert_close
from tiny import single_rows, vision_columns

import asymvlm
from asymvlm import VisionPruning
from asymvlm.methods import FastV, PyramidDrop, SparseVLM, SparseVLM2, StageBudget

STEPS = 4
TWO = StageBudget((1, 2), (9, 4))  # of 16 tokens, in tiny models of three layers
METHODS = {
    "fastv": FastV(2, 0.4),
    "pyramiddrop": PyramidDrop(StageBudget.shares((1, 2), (0.5, 0.25))),
    "sparsevlm": SparseVLM(TWO),
    "sparsevlm v2": SparseVLM2(TWO),
}
CASES = [
    (family, name)
    for family in ("llava", "qwen2_5_vl", "phi3_v")
    for name in METHODS
    if (family, name) != ("qwen2_5_vl", "sparsevlm")
]


def by_hand(model, inputs, name: str) -> ByHand:
    """The method of that name, a second time."""
    method, last = METHODS[name], inputs["input_ids"].shape[1] - 1
    hand = ByHand(model, inputs, method.layers, lambda seen: ([], {}))

    def rate(seen):
        ids = inputs["input_ids"][0].tolist()
        vision = [column for image in vision_columns(model, inputs["input_ids"])[0] for column in image]
        text = [c for c, token in enumerate(ids) if token != tiny.IMAGE and c > vision[0]]
        rows = [seen.place(column) for column in raters(hand.embeds, vision, text)]
        heads = seen.attention
        if name == "sparsevlm v2":
            sums = [float(head[rows][:, seen.vision].sum()) for head in heads]
            chosen = sorted(range(len(sums)), key=lambda head: -sums[head])[: len(sums) // 2]
            heads = heads[chosen]
        return heads[:, rows].mean((0, 1))

    def rule(seen):
        if name in ("fastv", "pyramiddrop"):
            scores = seen.attention[:, seen.place(last)].mean(0)
            count = 6 if name == "fastv" else 8 if seen.stage == 0 else 4
            return best(seen, scores, count), {}
        scores = rate(seen)
        stay = best(seen, scores, (9, 4)[seen.stage])
        if name == "sparsevlm v2":
            return stay, {}
        going = best(seen, scores, len(seen.vision))[len(stay) :]
        recycled = sorted(going[: len(going) * 3 // 10 + 1])
        centres, members = clusters(seen.hidden[recycled], len(recycled) // 10 + 1)
        means = [torch.stack([seen.hidden[recycled[i]] for i in member]).mean(0) for member in members]
        return stay, {recycled[centre]: mean for centre, mean in zip(centres, means, strict=True)}

    hand.rule, hand.ahead, hand.compact = rule, name == "pyramiddrop", name == "sparsevlm"
    return hand


@pytest.mark.parametrize("family, name", CASES, indirect=["family"])
def test_generation_equals_the_method_by_hand(family, plain, model, name):
    inputs = single_rows(family, "one_image_each")[1]
    hand = by_hand(plain, inputs, name)
    ids, logits = hand.greedy(STEPS)
    if (family, name) == ("llava", "sparsevlm"):
        model.set_attn_implementation("eager")
    with asymvlm.patch(model, vision=VisionPruning(method=METHODS[name])) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=STEPS)
    assert handle.last.index[0].tolist() == hand.kept[-1]
    assert found.sequences[0, -STEPS:].tolist() == ids
    assert_close(torch.stack(found.logits, 1)[0], logits)
    lengths = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    first = METHODS[name].layers[0]
    assert lengths == [inputs["input_ids"].shape[1] + STEPS - 1] * first + [len(kept) + STEPS - 1 for kept in hand.kept]
    assert handle.last.method == name
