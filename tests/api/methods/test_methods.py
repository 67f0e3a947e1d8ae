"""Methods of vision pruning: the library's controls, and one that somebody else wrote, all through `patch`."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from checks import GREEDY, Selection, assert_close, assert_kept_logits, uniform
from masked_reference import masked_forward, masked_greedy, merged_embeddings
from tiny import family_of, make_batch, vision_columns
from torch import Tensor

import asymvlm
from asymvlm import ThresholdBudget, UniformBudget, VisionPruning
from asymvlm.methods import AsymVLM, BeforeMethod, Kept, SelectingMethod, available_methods

THIRD_PARTY = textwrap.dedent(
    '''
    """Keeps the vision tokens whose embeddings are the longest."""
    import torch
    from asymvlm.methods import BeforeMethod, VisionPrompt

    class Longest(BeforeMethod):
        name = "longest"
        paper = "nobody's"

        def scores(self, prompt: VisionPrompt) -> torch.Tensor:
            return prompt.embeds.float().norm(dim=-1)
    '''
)


@pytest.fixture
def longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a method in an installed package that announces it."""
    (tmp_path / "my_method.py").write_text(THIRD_PARTY)
    info = tmp_path / "my_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[asymvlm.methods]\nlongest = my_method:Longest\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "longest"
    sys.modules.pop("my_method", None)


def prunable(model, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Columns of each row's vision tokens that may go."""
    columns = [[column for image in row for column in image] for row in vision_columns(model, inputs["input_ids"])]
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    return [[column for column in row if column != end] for row, end in zip(columns, last.tolist(), strict=True)]


def keep_best(model, inputs: dict[str, Tensor], scores: Tensor, ratio: float) -> Tensor:
    """``(B, S)`` bool: all but the worst scored vision tokens, an independent restatement of the rule."""
    keep = inputs["attention_mask"].bool().clone()
    for row, columns in enumerate(prunable(model, inputs)):
        count = max(1, len(columns) * round(ratio * 1_000_000) // 1_000_000)
        ranked = sorted(columns, key=lambda column: (-float(scores[row, column]), column))
        keep[row, ranked[count:]] = False
    return keep


def check(plain, model, inputs, handle, found: Tensor, keep: Tensor) -> None:
    index = handle.last.index
    kept = torch.zeros_like(keep)
    for row, columns in enumerate(index.tolist()):
        kept[row, [column for column in columns if column >= 0]] = True
    assert torch.equal(kept, keep)
    assert_kept_logits(found, masked_forward(plain, inputs, keep), Selection(keep, index, keep, [], [], []))


# one image a row and no learned separators: several images have floors of their own, tested beside this
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "phi3_v"], indirect=True)
@pytest.mark.parametrize("batch", ["left_padded", "right_padded"])
def test_a_method_of_an_installed_package_prunes(family, plain, model, longest, batch):
    inputs = make_batch(family, batch)
    rows = [row for row, images in enumerate(vision_columns(plain, inputs["input_ids"])) if len(images) <= 1]
    assert len(rows) > 1
    scores = merged_embeddings(plain, inputs).float().norm(dim=-1)
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=longest)) as handle:
        found = model(**inputs).logits
    assert handle.last.method == "longest"
    keep = keep_best(plain, inputs, scores, 0.5)
    several = [row for row in range(len(keep)) if row not in rows]
    for row in several:  # floors of each image
        keep[row] = False
        keep[row, [column for column in handle.last.index[row].tolist() if column >= 0]] = True
    check(plain, model, inputs, handle, found, keep)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "phi3_v"], indirect=True)
def test_it_generates_as_the_masked_model_does(family, plain, model, longest):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.5, method=longest)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=5)
    keep = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    for row, columns in enumerate(handle.last.index.tolist()):
        keep[row, [column for column in columns if column >= 0]] = True
    ids, logits = masked_greedy(plain, inputs, keep, steps=5)
    assert torch.equal(found.sequences[:, -5:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


def scores_of(method: str, model, inputs: dict[str, Tensor]) -> Tensor:
    """What the control says, one row at a time."""
    scores = torch.zeros(inputs["input_ids"].shape)
    for row, images in enumerate(vision_columns(model, inputs["input_ids"])):
        if method == "stride":
            for number, column in enumerate(prunable(model, inputs)[row]):
                scores[row, column] = -(number * (5**0.5 - 1) / 2 % 1)
        for columns in images if method == "spiral" else ():
            for number, column in enumerate(columns):
                line, place = divmod(number, 4)
                scores[row, column] = min(line, 3 - line, place, 3 - place)
    return scores


@pytest.mark.parametrize("family", ["llava", "gemma3"], indirect=True)
@pytest.mark.parametrize("method", ["stride", "spiral"])
def test_pruning_by_a_method_equals_masking(family, plain, model, method):
    inputs = make_batch(family, "single")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
        found = model(**inputs).logits
    keep = keep_best(plain, inputs, scores_of(method, plain, inputs), 0.5)
    check(plain, model, inputs, handle, found, keep)


@pytest.mark.parametrize("method", ["random", "stride", "spiral"])
def test_a_row_keeps_the_same_tokens_in_any_batch(family, model, method):
    inputs = make_batch(family, "left_padded")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.4, method=method)) as handle:
        model(**inputs)
        together = [[column for column in row if column >= 0] for row in handle.last.index.tolist()]
        single = make_batch(family, "single")
        model(**single)
        alone = [column for column in handle.last.index[0].tolist() if column >= 0]
    padding = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
    rows = [
        row for row, ids in enumerate(inputs["input_ids"].tolist()) if ids[padding:] == single["input_ids"][0].tolist()
    ]
    assert rows
    assert [[column - padding for column in together[row]] for row in rows] == [alone] * len(rows)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_random_tokens_differ_by_seed_and_not_by_call(family, model):
    inputs, found = make_batch("llava", "single"), []
    for seed in (0, 0, 1):
        method = asymvlm.methods.RandomTokens(seed=seed)
        with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
            model(**inputs)
            found.append(handle.last.index.tolist())
    assert found[0] == found[1] != found[2]


@dataclasses.dataclass(frozen=True)
class Similarity(BeforeMethod):
    """AsymVLM's own scores by the way that other methods take."""

    name = "similarity"
    needs_text = True

    def scores(self, prompt):
        return AsymVLM().scores(prompt)


@pytest.mark.every_family
def test_scores_handed_in_lead_to_what_the_fused_path_keeps(family, model):
    inputs, found = make_batch(family, "left_padded"), []
    for method in (None, Similarity()):
        with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
            logits = model(**inputs).logits
        found.append((handle.last.index, handle.last.counts, logits))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class EveryOther(SelectingMethod):
    """Keeps every other token and, with ``joins``, adds the one behind it."""

    name = "every other"

    def __init__(self, joins: bool = False) -> None:
        self.joins = joins

    def keep(self, prompt, counts):
        number = prompt.tokens.prunable.long().cumsum(1) - 1
        mask = prompt.tokens.prunable & (number % 2 == 0) & (number // 2 < counts[:, None])
        if not self.joins:
            return Kept(mask)
        return Kept(mask, torch.where(mask[..., None], prompt.embeds + prompt.embeds.roll(-1, 1), prompt.embeds))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_method_may_choose_a_set(family, plain, model):
    inputs = make_batch(family, "single")
    keep = inputs["attention_mask"].bool().clone()
    keep[0, prunable(plain, inputs)[0][1::2]] = False
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=EveryOther())) as handle:
        found = model(**inputs).logits
    check(plain, model, inputs, handle, found, keep)
    assert handle.last.kept == [8]


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_method_may_join_tokens(family, plain, model):
    inputs = make_batch(family, "single")
    embeds, columns = merged_embeddings(plain, inputs), prunable(plain, inputs)[0]
    short = torch.ones(embeds.shape[1], dtype=torch.bool)
    short[columns[1::2]] = False
    joined = embeds.clone()
    joined[0, columns[::2]] += embeds[0, [column + 1 for column in columns[::2]]]
    positions = torch.arange(embeds.shape[1])[short][None]
    with torch.no_grad():
        wanted = plain(inputs_embeds=joined[:, short], position_ids=positions, attention_mask=short[short][None].long())
        with asymvlm.patch(model, vision=uniform(0.5, method=EveryOther(joins=True))):
            found = model(**inputs).logits
    assert_close(found, wanted.logits)


def test_the_library_knows_its_own_methods():
    assert {"asymvlm", "random", "spiral", "stride"} <= set(available_methods(BeforeMethod))


def test_a_scorer_is_short_for_its_method():
    weight = torch.rand(32)
    long, short = VisionPruning(method=AsymVLM(weight)), VisionPruning(scorer=weight)
    assert long.scorer is short.scorer is long.scored_by.weight is short.scored_by.weight
    assert dataclasses.replace(long, scorer=None).scored_by.weight is None


class Wrong(BeforeMethod):
    name = "wrong"

    def scores(self, prompt):
        return prompt.embeds.double().norm(dim=-1)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_wrong_methods_are_told(family, model):
    with pytest.raises(ValueError, match=r"no method is called 'nothing'; known: .*asymvlm.*spiral"):
        VisionPruning(method="nothing")
    with pytest.raises(TypeError, match="method must be of BeforeMethod or InsideMethod, or the name of one, got 3"):
        VisionPruning(method=3)
    with pytest.raises(ValueError, match="scorer is that of the method 'asymvlm'"):
        VisionPruning(method="random", scorer=torch.ones(32))
    inputs = make_batch(family, "single")
    told = r"scores of Wrong must be \(1, \d+\) torch.float32, got .*float64"
    with asymvlm.patch(model, vision=uniform(0.5, method=Wrong())), pytest.raises(ValueError, match=told):
        model(**inputs)
    tiers = ThresholdBudget(0.1, 0.2, 0.8, 0.5, 0.2)
    told = "every other chooses tokens without scoring them: pass a UniformBudget"
    vision = VisionPruning(budget=tiers, method=EveryOther())
    with asymvlm.patch(model, vision=vision), pytest.raises(ValueError, match=told):
        model(**inputs)
    assert isinstance(VisionPruning(method="random").budget, UniformBudget)
    assert family_of(model)
