"""FlashAttention 2.8's arguments, defaults and returns; what is refused, and in which words; rows appended in place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from attention import Call, make_call

import asymvlm_kernels as ak

# of flash_attn 2.8: names and defaults in order
FUNC = {
    "q": None, "k": None, "v": None, "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
KVCACHE = {
    "q": None, "k_cache": None, "v_cache": None, "k": None, "v": None, "rotary_cos": None, "rotary_sin": None,
    "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
    "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None,
    "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "function,wanted,more",
    [
        (ak.flash_attn_func, FUNC, ["return_scores", "score_rows"]),
        (ak.flash_attn_with_kvcache, KVCACHE, ["return_scores", "score_rows", "slot_pos", "q_pos"]),
    ],
)
def test_arguments_are_those_of_flash_attention_and_a_few_keywords(function, wanted, more):
    parameters = inspect.signature(function).parameters.values()
    ours = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in ours] == list(wanted)
    assert [None if p.default is p.empty else p.default for p in ours] == list(wanted.values())
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == more


def test_returns_are_those_of_flash_attention_until_scores_are_asked_for(device):
    call = make_call(2, 1, 4, 2, 20, 16, torch.float32, device)
    out = call.run()
    assert isinstance(out, torch.Tensor)
    assert [x.shape for x in call.run(return_softmax_lse=True)] == [(2, 1, 4, 16), (2, 4, 1)]
    assert [x.shape for x in call.run(return_softmax_lse=True, return_scores=True)][2] == (2, 20)
    assert [x.shape for x in call.run(return_scores=True)] == [(2, 1, 4, 16), (2, 20)]
    q, k, v = call.q, call.k, call.v
    assert torch.equal(ak.flash_attn_func(q, k, v), out)
    assert [x.shape for x in ak.flash_attn_func(q, k, v, return_attn_probs=True)] == [(2, 1, 4, 16), (2, 4, 1), (0,)]
    assert len(ak.flash_attn_func(q, k, v, return_attn_probs=True, return_scores=True)) == 4


def test_new_rows_are_written_behind_those_in_use(device):
    call = make_call(2, 2, 4, 2, 20, 16, torch.float32, device)
    lengths = torch.tensor([3, 9], dtype=torch.int32, device=device)
    new_k, new_v = (torch.randn(2, 2, 2, 16, device=device) for _ in range(2))
    k, v = call.k.clone(), call.v.clone()
    for b, length in enumerate(lengths.tolist()):
        k[b, length : length + 2], v[b, length : length + 2] = new_k[b], new_v[b]
    expected = Call(call.q, k, v).run(cache_seqlens=lengths + 2, causal=True, return_scores=True)
    got = call.run(k=new_k, v=new_v, cache_seqlens=lengths, causal=True, return_scores=True)
    assert torch.equal(call.k, k)
    assert torch.equal(call.v, v)
    assert lengths.tolist() == [3, 9]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_one_length_for_all_samples(device):
    call = make_call(2, 1, 4, 2, 20, 16, torch.float32, device)
    expected = call.run(cache_seqlens=torch.tensor([7, 7], device=device))
    assert torch.equal(call.run(cache_seqlens=7), expected)


def untouched(call: Call, message: str, **options) -> None:
    """The call is refused, and neither cache has changed."""
    k, v = call.k.clone(), call.v.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        call.run(**options)
    assert torch.equal(call.k, k)
    assert torch.equal(call.v, v)


def test_a_refused_call_writes_nothing():
    call = make_call(2, 2, 4, 2, 20, 16, torch.float32, "cpu")
    new = {"k": torch.ones(2, 3, 2, 16), "v": torch.ones(2, 3, 2, 16)}
    room = "cache_seqlens must be 0 to 17, to leave room for 3 rows in 20 slots, got"
    for dtype in (torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        for found in (18, 20, -1, info.max, info.min):
            lengths = torch.tensor([4, found], dtype=dtype)
            at = min(max(found, -1), 2**31 - 1) if dtype == torch.int64 else found
            untouched(call, f"{room} {at}", cache_seqlens=lengths, **new)
    long = {"k": torch.ones(2, 21, 2, 16), "v": torch.ones(2, 21, 2, 16)}
    lengths = torch.zeros(2, dtype=torch.int32)
    untouched(call, "k and v must fit the 20 slots of the cache, got 21 rows", cache_seqlens=lengths, **long)
    for message, wrong in {
        "window_size must be": {"window_size": (-2, 0)},
        "num_splits must be": {"num_splits": -1},
        "score_rows must be": {"return_scores": True, "score_rows": 9},
        "softcap must be": {"softcap": float("nan")},
        "softmax_scale must be": {"softmax_scale": float("inf")},
        "cache_seqlens must be 0 to the 20 slots of the cache, got 21": {"cache_seqlens": 21},
    }.items():
        untouched(call, message, **{"cache_seqlens": lengths, **new, **wrong})


def wrong_arguments() -> dict[str, Callable[[], object]]:
    """Message: call that must raise it."""
    q, k = torch.zeros(2, 1, 4, 8), torch.zeros(2, 5, 2, 8)
    lse, pos, n = torch.zeros(2, 4, 1), torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    keep, move = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    cached = lambda **options: ak.flash_attn_with_kvcache(q, k, k, **options)  # noqa: E731
    plain = lambda **options: ak.flash_attn_func(q, k, k, **options)  # noqa: E731
    scored = lambda **options: ak.score_from_lse(q, k, lse, **options)  # noqa: E731
    kvcache = "flash_attn_with_kvcache does not support"
    together = "slot_pos and q_pos go together, got only"
    return {
        "flash_attn_func does not support dropout_p, got 0.1": lambda: plain(dropout_p=0.1),
        "flash_attn_func does not support alibi_slopes, got a tensor": lambda: plain(alibi_slopes=lse),
        f"{kvcache} rotary_cos, got a tensor": lambda: cached(rotary_cos=q, rotary_sin=q),
        f"{kvcache} cache_batch_idx, got a tensor": lambda: cached(cache_batch_idx=n),
        f"{kvcache} block_table, got a tensor": lambda: cached(block_table=pos),
        "q must have shape (B, Q, H, D), got (1, 4, 8)": lambda: ak.flash_attn_func(q[0], k, k),
        "k must have shape (2, S, G, 8), got (1, 5, 2, 8)": lambda: ak.flash_attn_func(q, k[:1], k),
        "v must have shape (2, 5, 2, 8), got (2, 4, 2, 8)": lambda: ak.flash_attn_func(q, k, k[:, :4]),
        "v_cache must be float32, got float16": lambda: ak.flash_attn_with_kvcache(q, k, k.half()),
        "q must be float32 or float16 or bfloat16, got float64": lambda: ak.flash_attn_func(q.double(), k, k),
        "k must be on cpu, got meta": lambda: ak.flash_attn_func(q, k.to("meta"), k),
        "k must have a contiguous last dimension, got strides (80, 16, 8, 2)": lambda: ak.flash_attn_func(
            q, torch.zeros(200).as_strided((2, 5, 2, 8), (80, 16, 8, 2)), k
        ),
        "the heads of q must be a multiple of the 2 heads of k, got 3": lambda: ak.flash_attn_func(q[:, :, :3], k, k),
        "head_dim must be 1 to 256, got 264": lambda: ak.flash_attn_func(*(torch.zeros(1, 1, 1, 264),) * 3),
        "cache_seqlens must have shape (2,), got (1,)": lambda: cached(cache_seqlens=n[:1]),
        "cache_leftpad must be int32 or int64, got float32": lambda: cached(cache_leftpad=n.float()),
        f"{together} slot_pos": lambda: cached(slot_pos=pos),
        f"{together} q_pos": lambda: scored(q_pos=n),
        "slot_pos must have shape (2, 5), got (2, 4)": lambda: cached(slot_pos=pos[:, :4], q_pos=n),
        "slot_pos must be int32, got int64": lambda: cached(slot_pos=pos.long(), q_pos=n),
        "q_pos must have shape (2, 1), got (2, 5)": lambda: cached(slot_pos=pos, q_pos=pos),
        "q_pos must be int32 or int64, got bool": lambda: cached(slot_pos=pos, q_pos=n.bool()),
        "window_size must be two numbers of -1 or more, got (-2, 0)": lambda: cached(window_size=(-2, 0)),
        "with slot_pos a row never sees later positions: window_size[1] must be -1 or 0, got 3": lambda: cached(
            slot_pos=pos, q_pos=n, window_size=(4, 3)
        ),
        "score_rows must be 1 to the 1 rows of q, got 2": lambda: cached(return_scores=True, score_rows=2),
        "score_rows must be 1 to the 1 rows of q, got 0": lambda: scored(score_rows=0),
        "softcap must be a finite number of at least 0, got -1.0": lambda: cached(softcap=-1.0),
        "softcap must be a finite number of at least 0, got nan": lambda: plain(softcap=float("nan")),
        "softcap must be a finite number of at least 0, got inf": lambda: scored(softcap=float("inf")),
        "softmax_scale must be a finite number, got nan": lambda: plain(softmax_scale=float("nan")),
        "softmax_scale must be a finite number, got -inf": lambda: scored(softmax_scale=-float("inf")),
        "cache_seqlens must be 0 to the 5 slots of the cache, got -1": lambda: cached(cache_seqlens=-1),
        "num_splits must be 0 or more, got -1": lambda: cached(num_splits=-1),
        "k and v go together, got only k": lambda: cached(k=k, cache_seqlens=n),
        "k and v need cache_seqlens, the slots that they are written to, got None": lambda: cached(k=k, v=k),
        "k and v are appended by cache_seqlens: with slot_pos write them to their slots first": lambda: cached(
            k=k[:, :1], v=k[:, :1], cache_seqlens=n, slot_pos=pos, q_pos=n
        ),
        "v must have shape (2, 1, 2, 8), got (2, 5, 2, 8)": lambda: cached(k=k[:, :1], v=k, cache_seqlens=n),
        "lse must have shape (2, 4, 1), got (2, 4)": lambda: ak.score_from_lse(q, k, lse[..., 0]),
        "lse must be float32, got float16": lambda: ak.score_from_lse(q, k, lse.half()),
        "keep must have shape (B, S), got (5,)": lambda: ak.plan_moves(keep[0]),
        "keep must be bool, got int32": lambda: ak.plan_moves(pos),
        "capacity must be 0 or more, got -1": lambda: ak.plan_moves(keep, capacity=-1),
        "target must have shape (2, 3), got (2, 2)": lambda: ak.move_slots_([k], move, move[:, :2]),
        "source must be int64, got int32": lambda: ak.move_slots_([k], move.int(), move),
        "tensors[1] must have shape (2, S, ...), got (1, 5, 2, 8)": lambda: ak.move_slots_([k, k[:1]], move, move),
        "tensors[0] must be on cpu, got meta": lambda: ak.move_slots_([k.to("meta")], move, move),
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_arguments())
def test_message_names_what_was_found_and_wanted(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wrong_arguments()[message]()
