"""FlexAttention and FlashAttention: what they make of masks and positions must still be the masked reference.

FlexAttention runs here uncompiled. FlashAttention needs a GPU: a stand-in with its interface takes its place, behind
transformers' own code that decides what to call it with.
"""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, assert_kept_logits, set_tolerance, uniform
from masked_reference import masked_forward, masked_greedy, select
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

import asymvlm
from asymvlm import CacheLimit
from asymvlm.methods import H2O, TOVA, StreamingLLM

FLEX = ("llava", "gemma3", "paligemma", "mistral3", "idefics3")


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("family", FLEX)
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_flex_attention(family, batch, uncompiled):
    set_tolerance(tiny.FAMILIES[family].atol)
    plain, flex = tiny.build(family), tiny.build(family, attention="flex_attention")
    inputs = tiny.make_batch(family, batch)
    ids, logits = masked_greedy(plain, inputs, select(plain, inputs, 0.5).keep, steps=3)
    with asymvlm.patch(flex, vision=uniform(0.5)):
        found = flex.generate(**inputs, **GREEDY, max_new_tokens=3)
    assert torch.equal(found.sequences[:, -3:], ids)
    assert_close(torch.stack(found.logits, 1), logits)


@pytest.mark.parametrize("family, window", [("gemma3", 12), ("mistral3", 30)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_flex_windows_go_by_original_position(family, window, options, uncompiled):
    set_tolerance(tiny.FAMILIES[family].atol)
    plain = tiny.build(family, sliding_window=window)
    flex = tiny.build(family, attention="flex_attention", sliding_window=window)
    inputs = tiny.make_batch(family, "left_padded")
    with asymvlm.patch(plain, vision=uniform(0.5)):
        expected = plain.generate(**inputs, **GREEDY, **options, max_new_tokens=5)
    with asymvlm.patch(flex, vision=uniform(0.5)):
        found = flex.generate(**inputs, **GREEDY, **options, max_new_tokens=5)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1))


class StandIn:
    """flash_attn's functions in plain PyTorch, and a record of the sequences they were given."""

    def __init__(self) -> None:
        self.sequences: list[list[int]] = []

    def flash(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False) -> Tensor:
        self.sequences.append([q.shape[1]] * q.shape[0])
        return _attend(q, k, v, softmax_scale, causal)

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool = False,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        assert [max(x) for x in lengths] == [max_seqlen_q, max_seqlen_k]
        assert [sum(x) for x in lengths] == [len(q), len(k)], "every token belongs to a sequence"
        self.sequences.append(lengths[0])
        parts = zip(*(x.split(n) for x, n in zip((q, k, v), (lengths[0], *[lengths[1]] * 2), strict=True)), strict=True)
        return torch.cat([_attend(*(x[None] for x in part), softmax_scale, causal)[0] for part in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """(B, length, heads, head_dim), causal from the lower right."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    if causal:
        queries, keys = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(queries, keys).tril(keys - queries) == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def stand_in(monkeypatch):
    stand_in, utils = StandIn(), modeling_flash_attention_utils
    pad, unpad = utils._pad_input, utils._unpad_input
    process = utils._lazy_define_process_function(stand_in.varlen)
    functions = (stand_in.flash, stand_in.varlen, None, pad, unpad)
    two = "_process_with_kvcache_kwargs_fn" in inspect.getsource(utils)
    answer = (functions, (process, dict) if two else process)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: answer)
    return stand_in


def with_flash(family: str, **text: object) -> PreTrainedModel:
    model = tiny.build(family, **text)
    for module in [model.get_decoder(), *model.get_decoder().modules()]:
        if hasattr(module, "config"):
            module.config._attn_implementation = {"": "flash_attention_2"}  # unchecked: the package is not here
    return model


@pytest.mark.parametrize("family", ["llava", "mistral3", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", ["single", "left_padded"])
def test_flash_attention(family, batch, stand_in):
    """A row is one sequence however its positions jump; padded rows are unpadded."""
    set_tolerance(tiny.FAMILIES[family].atol)
    plain, flash = tiny.build(family), with_flash(family)
    inputs = tiny.make_batch(family, batch)
    selection = select(plain, inputs, 0.5)
    _, logits = masked_greedy(plain, inputs, selection.keep, steps=3)
    with torch.no_grad(), asymvlm.patch(flash, vision=uniform(0.5)):
        found = flash.generate(**inputs, **GREEDY, max_new_tokens=3)
        assert stand_in.sequences[0] == [int(row.sum()) for row in selection.keep]
        forward = flash(**inputs).logits
    assert_close(torch.stack(found.logits, 1), logits)
    assert_kept_logits(forward, masked_forward(plain, inputs, selection.keep), selection)


@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_one_padded_row_and_a_later_turn_stay_whole_under_flash_attention(family, stand_in):
    """Neither starts at position 0, where packed sequences do."""
    set_tolerance(tiny.FAMILIES[family].atol)
    plain, flash = tiny.build(family), with_flash(family)
    padded = {name: value[:1] for name, value in tiny.make_batch(family, "left_padded").items()}
    selection = select(plain, padded, 0.5)
    expected = masked_forward(plain, padded, selection.keep)
    with torch.no_grad(), asymvlm.patch(flash, vision=uniform(0.5)):
        assert_kept_logits(flash(**padded).logits, expected, selection)
        calls = len(stand_in.sequences)
        first = flash.generate(**padded, **GREEDY, max_new_tokens=3)
        image = tiny.FAMILIES[family].image
        new = torch.tensor([[71, *image, 72]])
        ids = torch.cat([first.sequences, new], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn["attention_mask"][:, : padded["input_ids"].shape[1]] = padded["attention_mask"]
        turn |= tiny.FAMILIES[family].processor(new, tiny.Images(1, seed=3))
        found = flash.generate(**turn, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=2)
    assert all(len(sequences) == 1 for sequences in stand_in.sequences[calls:])
    both = tiny.FAMILIES[family].processor(ids, tiny.Images(2))
    for name in both:
        both[name] = torch.cat([padded[name], turn[name]])
    whole = {**turn, **both}
    kept = select(plain, whole, 0.5, first=first.sequences.shape[1] - 1).keep
    kept[:, : selection.keep.shape[1]] = selection.keep
    assert_close(torch.stack(found.logits, 1), masked_greedy(plain, whole, kept, steps=2)[1])


def test_windows_are_refused_under_flash_attention_beyond_their_reach(stand_in):
    inputs = tiny.make_batch("mistral3", "single")
    narrow = with_flash("mistral3", sliding_window=12)
    refusal = pytest.raises(NotImplementedError, match=r"FlashAttention cannot window \d+ tokens.*'sdpa'.*'compact'")
    with asymvlm.patch(narrow, vision=uniform(0.5)), refusal:
        narrow.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("method", [TOVA(), H2O(), StreamingLLM()], ids=lambda method: method.name)
def test_a_limited_cache_under_flash_attention(method, stand_in):
    """Where the lines of a layer are equally long, and no later turn comes in several tokens."""
    plain, flash, inputs = tiny.build("llava"), with_flash("llava"), tiny.make_batch("llava", "left_padded")
    limit = CacheLimit(method, tokens=14)
    with asymvlm.patch(plain, cache=limit):
        expected = plain.generate(**inputs, **GREEDY, max_new_tokens=4)
    with asymvlm.patch(flash, cache=limit):
        found = flash.generate(**inputs, **GREEDY, max_new_tokens=4)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits))
        ids = torch.cat([found.sequences, torch.full((3, 2), 7)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
        if len(found.past_key_values.tables) > 1:
            with pytest.raises(NotImplementedError, match="need attn_implementation 'sdpa' or 'eager' here"):
                flash.generate(
                    input_ids=ids, attention_mask=mask, past_key_values=found.past_key_values, max_new_tokens=2
                )
