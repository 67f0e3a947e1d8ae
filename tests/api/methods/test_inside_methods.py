"""Methods between the layers of the decoder: later layers must see what they would if the other columns were closed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import tiny
import torch
from attending import attending_by
from checks import GREEDY, assert_close, uniform
from masked_reference import ranked
from model_state import changes, snapshot
from tiny import make_batch, text_layers, vision_columns
from torch import Tensor

import asymvlm
from asymvlm import TextEviction, VisionPruning
from asymvlm.methods import InsideMethod
from asymvlm_kernels import UniformBudget

FAMILIES = ["llava", "qwen2_5_vl", "phi3_v", "internvl"]


@dataclass(frozen=True)
class AttentionRank(InsideMethod):
    """What the last token attends to."""

    name = "attention rank"
    layers: tuple[int, ...] = (1,)

    def scores(self, seen):
        return seen.attention


@dataclass(frozen=True)
class TextRows(AttentionRank):
    """What all text attends to."""

    def rows(self, stage):
        return stage.tokens.text


class ByLayer:
    """Whole sequences, with the columns that later layers have lost closed there; nothing of the library in it."""

    def __init__(self, model, inputs: dict[str, Tensor], layers: tuple[int, ...], ratio: float, all_text=False) -> None:
        self.model, self.inputs, self.layers, self.ratio = model, dict(inputs), layers, ratio
        self.all_text = all_text
        self.open = {0: inputs["attention_mask"].bool()}  # first layer -> (B, S)
        self.probabilities: dict[int, Tensor] = {}
        self.position_ids = None
        if not tiny.family_of(model).mrope:
            self.position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    @torch.no_grad()
    def forward(self) -> Tensor:
        extra = {} if self.position_ids is None else {"position_ids": self.position_ids}
        with self._attention():
            return self.model(**self.inputs, **extra, use_cache=False).logits

    def run(self) -> Tensor:
        """Logits of the prompt, stage by stage: what a stage drops is known once the layers before it have run."""
        vision = vision_columns(self.model, self.inputs["input_ids"])
        for layer in self.layers:
            self.forward()
            keep = self.open[max(self.open)].clone()
            heads = self.probabilities[layer - 1].mean(1)  # (B, S, S)
            for row, images in enumerate(vision):
                left = [column for image in images for column in image if keep[row, column]]
                real = self.inputs["attention_mask"][row].nonzero()[:, 0].tolist()
                ids = self.inputs["input_ids"][row].tolist()
                text = [column for column in real if ids[column] != tiny.IMAGE]
                queries = text if self.all_text else real[-1:]
                scores = heads[row, queries].mean(0)
                count = max(1, len(left) * round(self.ratio * 1_000_000) // 1_000_000)
                keep[row, ranked(scores, left)[count:]] = False
            self.open[layer] = keep
        return self.forward()

    def append(self, token: Tensor) -> None:
        self.inputs["input_ids"] = torch.cat([self.inputs["input_ids"], token], 1)
        for name, value in {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}.items():
            if name in self.inputs:
                self.inputs[name] = torch.nn.functional.pad(self.inputs[name], (0, 1), value=value)
        if self.position_ids is not None:
            self.position_ids = torch.cat([self.position_ids, self.position_ids[:, -1:] + 1], 1)
        self.open = {layer: torch.nn.functional.pad(keep, (0, 1), value=True) for layer, keep in self.open.items()}

    @contextmanager
    def _attention(self):
        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            stage = self.open[max(first for first in self.open if first <= module.layer_idx)]
            logits = query @ key.mT * scaling + attention_mask
            logits = logits.masked_fill(~stage[:, None, None], torch.finfo(logits.dtype).min)
            self.probabilities[module.layer_idx] = logits.softmax(-1)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        with attending_by(self.model, attend):
            yield


def one_image_each(family: str) -> dict[str, Tensor]:
    """A left-padded batch; several images in a row have floors of their own, which this oracle does not know."""
    return make_batch(family, "one_image_each")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [AttentionRank(), AttentionRank((1, 2)), TextRows((2,))], ids=str)
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_a_forward_equals_closing_the_columns_of_later_layers(family, plain, model, method, implementation):
    inputs = one_image_each(family)
    model.set_attn_implementation(implementation)
    oracle = ByLayer(plain, inputs, method.layers, 0.5, all_text=isinstance(method, TextRows))
    expected = oracle.run()
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
        found = model(**inputs)
    index = handle.last.index
    kept = torch.zeros_like(oracle.open[method.layers[-1]])
    rows, slots = (index >= 0).nonzero(as_tuple=True)
    kept[rows, index[rows, slots]] = True
    assert torch.equal(kept, oracle.open[method.layers[-1]])
    assert_close(found.logits[rows, slots], expected[rows, index[rows, slots]])


@pytest.mark.parametrize("method", [AttentionRank(), AttentionRank((1, 2))], ids=str)
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_generate_goes_on_with_other_lengths_in_each_layer(family, plain, model, method):
    inputs = one_image_each(family)
    oracle, ids, logits = ByLayer(plain, inputs, method.layers, 0.5), [], []
    logits.append(oracle.run()[:, -1])
    for _ in range(5):
        ids.append(logits[-1].argmax(-1, keepdim=True))
        oracle.append(ids[-1])
        logits.append(oracle.forward()[:, -1])
    ids.append(logits[-1].argmax(-1, keepdim=True))
    with asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
        found = model.generate(**inputs, **GREEDY, max_new_tokens=6)
    assert torch.equal(found.sequences, torch.cat([inputs["input_ids"], *ids], 1))
    assert_close(torch.stack(found.logits, 1), torch.stack(logits, 1))
    lengths = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    assert lengths[0] == inputs["input_ids"].shape[1] + 5
    assert lengths[-1] == handle.last.index.shape[1] + 5 < lengths[0]
    assert handle.last.flops_after < handle.last.flops_before
    assert found.pruning_report is handle.last


@pytest.mark.parametrize("method", [AttentionRank((1,)), AttentionRank((2, 3)), TextRows((1, 3))], ids=str)
@pytest.mark.parametrize("window", [9, 20])
def test_sliding_windows_reach_by_original_position(method, window):
    """Layers 0 and 2 slide: they score, and lose tokens, with windows shorter and longer than an image."""
    model = tiny.build("gemma3", sliding_window=window)
    inputs, steps = one_image_each("gemma3"), 4
    oracle, logits = ByLayer(model, inputs, method.layers, 0.5, all_text=isinstance(method, TextRows)), []
    prompt = oracle.run()
    logits.append(prompt[:, -1])
    for _ in range(steps - 1):
        oracle.append(logits[-1].argmax(-1, keepdim=True))
        logits.append(oracle.forward()[:, -1])
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=method)) as handle:
        found = model(**inputs)
        answer = model.generate(**inputs, **GREEDY, max_new_tokens=steps)
    index = handle.last.index
    rows, slots = (index >= 0).nonzero(as_tuple=True)
    assert_close(found.logits[rows, slots], prompt[rows, index[rows, slots]])
    assert_close(torch.stack(answer.logits, 1), torch.stack(logits, 1))


def test_a_row_of_a_batch_is_a_batch_of_its_own():
    model = tiny.build("llava")
    inputs, rows = make_batch("llava", "left_padded"), tiny.single_rows("llava", "left_padded")
    with asymvlm.patch(model, vision=uniform(0.4, method=AttentionRank((1, 2)))):
        together = model.generate(**inputs, **GREEDY, max_new_tokens=5)
        for number, row in enumerate(rows):
            alone = model.generate(**row, **GREEDY, max_new_tokens=5)
            assert torch.equal(alone.sequences[0, -5:], together.sequences[number, -5:])
            assert_close(torch.stack(alone.logits, 1)[0], torch.stack(together.logits, 1)[number])


def test_a_later_turn_of_text_goes_on_and_one_with_images_is_refused():
    model, inputs = tiny.build("llava"), make_batch("llava", "one_image_each")
    oracle = ByLayer(model, inputs, (1,), 0.5)
    oracle.run()
    question = torch.full((3, 4), 7)
    with asymvlm.patch(model, vision=uniform(0.5, method=AttentionRank())):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
        name = "past_key_values"
        later = {"input_ids": ids, "attention_mask": mask, name: first.past_key_values}
        with pytest.raises(NotImplementedError, match="pruning needs an empty cache"):
            model.generate(**later, pixel_values=inputs["pixel_values"], max_new_tokens=1)
        after = model.generate(**later, **GREEDY, max_new_tokens=1)
    for column in ids[:, inputs["input_ids"].shape[1] :].unbind(1):
        oracle.append(column[:, None])
    assert_close(after.logits[0], oracle.forward()[:, -1])
    later |= {"input_ids": torch.cat([after.sequences, question], 1), name: after.past_key_values}
    later["attention_mask"] = torch.nn.functional.pad(mask, (0, 5), value=1)
    with pytest.raises(RuntimeError, match="vision tokens were pruned from"):
        model.generate(**later, max_new_tokens=1)


def test_ratio_1_is_the_model_and_removal_leaves_no_trace():
    model, inputs = tiny.build("llava"), make_batch("llava", "left_padded")
    expected = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    with asymvlm.patch(model, vision=uniform(1.0, method=AttentionRank())):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    with asymvlm.patch(model, vision=uniform(0.5, method=AttentionRank())) as handle:
        model.generate(**inputs, max_new_tokens=2)
        handle.enabled = False
        found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert not any(layer._forward_pre_hooks for layer in text_layers(model))
    found = model.generate(**inputs, **GREEDY, max_new_tokens=4)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_failed_call_leaves_nothing_behind():
    model, inputs = tiny.build("llava"), make_batch("llava", "left_padded")

    def fail(module, args):
        raise OSError("on its way")

    with asymvlm.patch(model, vision=uniform(0.5, method=AttentionRank())):
        expected = model.generate(**inputs, max_new_tokens=4)
        hook = text_layers(model)[2].register_forward_pre_hook(fail)
        with pytest.raises(OSError, match="on its way"):
            model.generate(**inputs, max_new_tokens=4)
        hook.remove()
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), expected)


def test_what_it_does_not_know_is_refused():
    model, inputs = tiny.build("llava"), make_batch("llava", "single")
    vision = VisionPruning(budget=UniformBudget(0.5), method=AttentionRank())
    for layers in ((), (0,), (3,), (2, 1)):
        with pytest.raises(ValueError, match=r"layers of a method must ascend within 1 .. 2, got"):
            asymvlm.patch(model, vision=VisionPruning(method=AttentionRank(layers)))
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="inside the decoder, not beside text eviction"):
        asymvlm.patch(model, vision=vision, text=TextEviction(5, 0.5))
    assert not changes(before, snapshot(model)), "a refused patch leaves nothing on the model"
    for family, reason in (("qwen3_vl", "features added"), ("qwen3_5", "recurrent"), ("paligemma", "both ways")):
        with pytest.raises(NotImplementedError, match=reason):
            asymvlm.patch(tiny.build(family), vision=vision)
    with pytest.raises(NotImplementedError, match="attention in chunks"):
        asymvlm.patch(tiny.build("llama4", attention_chunk_size=20), vision=vision)
    windowed, prompt = tiny.build("gemma3", sliding_window=20), make_batch("gemma3", "single")
    with (
        asymvlm.patch(windowed, vision=uniform(0.5, method=AttentionRank(), positions="compact")),
        pytest.raises(NotImplementedError, match="sliding windows keeps positions"),
    ):
        windowed.generate(**prompt, max_new_tokens=1)
    with pytest.raises(NotImplementedError, match=r"works inside the decoder: use asymvlm\.patch"):
        asymvlm.prune_inputs(model, vision, **inputs)
    with asymvlm.patch(model, vision=vision) as handle:
        for options, reason in (
            ({"num_beams": 2}, "do not work with beams"),
            ({"cache_implementation": "static"}, "on a cache that grows"),
            ({"use_cache": False}, "need the cache of the pruned prompt in every step"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
        with pytest.raises(ValueError, match="a patch is made for its method inside the decoder"):
            handle.vision = VisionPruning()
        with pytest.raises(NotImplementedError, match="without labels"):
            model(**inputs, labels=inputs["input_ids"])


class Late(AttentionRank):
    """The first tokens go."""

    def scores(self, seen):
        return seen.hidden.new_ones(seen.tokens.ids.shape).cumsum(1)


def test_a_dropped_first_column_is_not_counted_as_kept():
    """Rows that keep fewer tokens are padded, and padding stands for no column."""
    model, text = tiny.build("llava"), list(range(10, 31))
    rows = [[tiny.IMAGE] * 32 + text[:5], [tiny.IMAGE] * 16 + text]
    pixels = torch.cat([make_batch("llava", "single")["pixel_values"]] * 3)
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(2, 37, dtype=torch.long)}
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5, method=Late())) as handle:
        model(**inputs, pixel_values=pixels)
    assert 0 not in handle.last.index[0].tolist()
    assert handle.last.kept == [16, 8]
