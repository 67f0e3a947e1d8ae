"""What is remembered of a call: keys tell apart what a launch or a check could, and memory is bounded."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch

from asymvlm_kernels import ThresholdBudget, UniformBudget, flash_attn_with_kvcache, prune_sequence
from asymvlm_kernels.launch.key import Remembered, describe, outline

MEMORY = torch.zeros(64)
DIFFERENT: list[Any] = [
    *(None, 0, 1, 2, 1.0, 0.0, -0.0, 2.5, True, False, "1", float("inf"), float("nan"), -float("nan")),
    *([], [1], (1,), [1.0], [1, 1], [[1], 1], [None]),
    MEMORY[:8],
    MEMORY[4:12].double(),
    MEMORY[1:9],  # 4 bytes behind 16
    MEMORY[:16:2],
    MEMORY[:8].view(2, 4),
    MEMORY[:8].view(2, 4).t(),
    MEMORY[:8].view(torch.int32),
    [MEMORY[:8]],
    [MEMORY[:8], None],
]


def key(*values: Any) -> Any:
    return describe(values, [], [])


def test_keys_tell_apart_what_differs():
    for one, other in itertools.combinations(range(len(DIFFERENT)), 2):
        assert key(DIFFERENT[one]) != key(DIFFERENT[other]), (DIFFERENT[one], DIFFERENT[other])
        assert key(DIFFERENT[one], 7) != key(DIFFERENT[other], 7)


def test_keys_of_equal_calls_are_equal():
    for value in DIFFERENT:
        assert key(value) == key(value)
        assert hash(key(value)) == hash(key(value))
    assert key(MEMORY[:8]) == key(MEMORY[4:12])  # another address, as well aligned
    assert key(float("nan")) == key(float("nan"))
    assert key(torch.nn.Parameter(MEMORY[:8])) == key(MEMORY[:8])


def test_an_outline_asks_for_no_address():
    assert outline((MEMORY[:8],)) == outline((MEMORY[1:9],))
    meta = torch.zeros(8, device="meta")
    assert outline((meta,)) not in (None, outline((MEMORY[:8],)))


def test_what_is_unknown_has_no_key():
    class Own(torch.Tensor):
        pass

    for value in (object(), np.float64(1), MEMORY[:8].as_subclass(Own), {1: 2}, [object()], torch.float32):
        assert key(value) is None


def test_tensors_and_addresses_come_in_order():
    tensors: list[torch.Tensor] = []
    addresses: list[int] = []
    one, two, three = MEMORY[:1], MEMORY[1:2], MEMORY[2:3]
    describe((one, 3, [two, None], three), tensors, addresses)
    assert addresses == [x.data_ptr() for x in (one, two, three)] == [x.data_ptr() for x in tensors]


def test_the_oldest_go_first():
    remembered = Remembered(3)
    for number in range(5):
        remembered.put(number, str(number))
    assert [remembered.get(number) for number in range(5)] == [None, None, "2", "3", "4"]
    remembered.put(2, "new")
    remembered.put(5, "5")
    assert [remembered.get(number) for number in (2, 3, 4, 5)] == ["new", None, "4", "5"]


def test_threads_share_it():
    remembered = Remembered(8)
    wrong: list[Any] = []

    def work(first: int) -> None:
        for number in range(500):
            remembered.put((first, number % 20), number % 20)
            found = remembered.get((first, number % 20))
            if found not in (None, number % 20) or len(remembered.values) > 8:
                wrong.append(found)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def prompt() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    vision = torch.arange(40)[None] < 36
    return torch.randn(1, 40, 8), vision, ~vision


def test_a_remembered_prune_sequence_follows_its_numbers_and_refuses_as_before():
    embeds, vision, text = prompt()
    for _ in range(2):
        kept = [int(prune_sequence(embeds, vision, text, None, b).counts) for b in (0.25, 0.5, UniformBudget(0.75))]
        assert kept == [9, 18, 27]
        gap = ThresholdBudget(gap_low=-2.0, gap_high=-1.0, conservative=0.9, moderate=0.5, aggressive=0.25)
        assert int(prune_sequence(embeds, vision, text, None, gap).counts) == 9
        flat = {"x": torch.ones(1, 40)}
        for pad in (0.0, -0.0, float("nan")):
            moved = prune_sequence(embeds, vision, text, carry=flat, carry_pad={"x": pad}, static=True).carry["x"][0, 0]
            assert str(moved.item()) == str(pad)
        with pytest.raises(ValueError, match="padding_side"):
            prune_sequence(embeds, vision, text, padding_side="up")
        with pytest.raises(ValueError, match="carry_pad"):
            prune_sequence(embeds, vision, text, carry=flat, carry_pad={"y": 0})
        with pytest.raises(ValueError, match="not differentiable in embeds"):
            prune_sequence(embeds.clone().requires_grad_(), vision, text)


def test_remembered_attention_follows_its_numbers_and_refuses_as_before():
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    for _ in range(2):
        out, scores = flash_attn_with_kvcache(q, k, v, return_scores=True)
        assert scores.sum().item() == pytest.approx(1)
        for seen in (1, 2):
            few = flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([seen], dtype=torch.int32))
            assert torch.equal(few, flash_attn_with_kvcache(q, k[:, :seen], v[:, :seen]))
            assert torch.equal(few, flash_attn_with_kvcache(q, k, v, cache_seqlens=seen))
            assert not torch.equal(few, out)
        scored = {"score_rows": 2, "return_scores": True}
        for wrong in (scored, {"num_splits": -1}, {"softcap": -1.0}, {"window_size": (-2, 0)}):
            with pytest.raises(ValueError, match=r"score_rows|num_splits|softcap|window_size"):
                flash_attn_with_kvcache(q, k, v, **wrong)
        with pytest.raises(ValueError, match="not differentiable in q"):
            flash_attn_with_kvcache(q.clone().requires_grad_(), k, v, return_scores=True)
