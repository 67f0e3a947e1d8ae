"""Hole-fill: what survives, that nothing is both read and written, every dtype and layout, the table of addresses."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asymvlm_kernels import move_slots_, plan_moves, use_backend
from asymvlm_kernels._triton import INTERPRETED
from asymvlm_kernels.decode import address_table, moves, reference

BACKENDS = ("reference", "triton")
any_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(address_table, "_tables", address_table.OrderedDict())


def random_keep(B: int, S: int, device, share: float = 0.6) -> torch.Tensor:
    return (torch.rand(B, S, generator=torch.Generator().manual_seed(S)) < share).to(device)


@any_backend
@given(
    keep=st.integers(1, 90).flatmap(
        lambda S: st.lists(st.lists(st.booleans(), min_size=S, max_size=S), min_size=1, max_size=3)
    )
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_survivors_become_the_first_slots(keep, backend, device):
    mask = torch.tensor(keep, device=device)
    with use_backend(backend):
        source, target = plan_moves(mask)
    for row, kept, sources, targets in zip(range(len(keep)), keep, source.tolist(), target.tolist(), strict=True):
        count = sum(kept)
        real = [place for place in sources if place >= 0]
        holes = [place for place in targets if place >= 0]
        assert sources[len(real) :] == targets[len(holes) :] == [-1] * (len(sources) - len(real))  # -1 only behind
        assert real == [slot for slot in range(count, len(kept)) if kept[slot]], row
        assert holes == [slot for slot in range(count) if not kept[slot]], row


@pytest.mark.parametrize("S", [1, 2, 130, 3000])  # one block, several
def test_backends_plan_the_same_moves(S, device):
    for share in (0.0, 0.2, 0.9, 1.0):
        keep = random_keep(2, S, device, share)
        for capacity in (None, S, 3, 0):
            plans = []
            for backend in BACKENDS:
                with use_backend(backend):
                    plans.append(plan_moves(keep, capacity=capacity))
            for one, other in zip(*plans, strict=True):
                assert torch.equal(one, other)
    strided = torch.stack([keep, ~keep], -1)[..., 0]
    with use_backend("triton"):
        assert torch.equal(plan_moves(strided)[1], reference.plan_moves(keep, S // 2)[1])


def caches(B: int, S: int, device) -> dict[str, torch.Tensor]:
    """Tensors of a cache, of every layout and dtype that may occur, moved together."""
    generator = torch.Generator().manual_seed(1)

    def bits(*size: int, dtype: torch.dtype) -> torch.Tensor:
        raw = torch.randint(0, 256, (*size, torch.tensor([], dtype=dtype).itemsize), generator=generator)
        return raw.to(torch.uint8).view(dtype)[..., 0].to(device)

    halves = bits(B, 2, S, 24, dtype=torch.bfloat16)
    return {
        "heads outside": halves.transpose(1, 2),
        "heads inside": bits(B, S, 3, 64, dtype=torch.float16),
        "longer than a block": bits(B, 1, S, 5000, dtype=torch.float32).transpose(1, 2),
        "positions": bits(B, S, dtype=torch.int32),
        "flags": bits(B, S, dtype=torch.int8),
        "part of each row": bits(B, S, 2, 64, dtype=torch.bfloat16)[..., 1:36],
        "every other slot": bits(B, 2 * S, 4, dtype=torch.float64)[:, ::2],
        "columns outside": bits(B, 3, 5, S, dtype=torch.float32).permute(0, 3, 2, 1),
        "batch inside": bits(S, B, 2, 8, dtype=torch.bfloat16).transpose(0, 1),
        "two heads of five": bits(B, 5, S, 24, dtype=torch.bfloat16)[:, 1:3].transpose(1, 2),
        "five heads": bits(B, 5, S, 24, dtype=torch.bfloat16).transpose(1, 2),
        "one head of many": bits(B, S, 6, 8, dtype=torch.bfloat16)[:, :, 2:3],
        "float8": bits(B, S, 2, 8, dtype=torch.float8_e4m3fn),
        "uint16": bits(B, S, dtype=torch.uint16),
        "uint64": bits(B, S, 3, dtype=torch.uint64),
        "complex": bits(B, S, 3, dtype=torch.complex64),
    }


def test_every_layout_and_dtype_is_moved_bit_for_bit(device):
    B, S = 3, 40
    source, target = plan_moves(random_keep(B, S, device))
    moved, whole = caches(B, S, device), caches(B, S, device)
    expected = caches(B, S, device)
    with use_backend("triton"):
        move_slots_(list(moved.values()), source, target)
    reference.move_slots_(source, target, list(expected.values()))
    for name, tensor in moved.items():
        assert torch.equal(bits_of(tensor), bits_of(expected[name])), name
        assert not torch.equal(bits_of(tensor), bits_of(whole[name])), name
        if tensor._base is not None and expected[name]._base is not None:  # what lies around it stays as it was
            assert torch.equal(bits_of(tensor._base), bits_of(expected[name]._base)), name


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@any_backend
def test_a_cache_after_moves_holds_the_kept_tokens_first(backend, device):
    B, S = 4, 50
    keep = random_keep(B, S, device)
    keep[0], keep[1] = True, False  # nothing to move
    keep[2] = torch.arange(S, device=device) >= S // 2  # everything moves
    place = torch.arange(S, device=device, dtype=torch.int32).repeat(B, 1)
    rows = place[:, :, None, None].float().expand(B, S, 2, 8).contiguous()
    with use_backend(backend):
        move_slots_([rows, place], *plan_moves(keep))
    for b in range(B):
        count = int(keep[b].sum())
        assert sorted(place[b, :count].tolist()) == keep[b].nonzero()[:, 0].tolist()
    assert torch.equal(rows, place[:, :, None, None].float().expand_as(rows))


def test_all_layers_move_in_one_launch_without_an_allocation(monkeypatch, device):
    layers = [torch.randn(2, 3, 40, 64, device=device).bfloat16().transpose(1, 2) for _ in range(10)]
    source, target = plan_moves(random_keep(2, 40, device))
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **options: None

    with use_backend("triton"):
        move_slots_(layers, source, target)
        monkeypatch.setattr(moves, "_move_slots_kernel", Counted())
        monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("an allocation"))
        monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("a copy from the host"))
        move_slots_(layers, source, target)
    assert [grid[:2] for grid in launches] == [(10 * 3, 2)]


def test_the_table_follows_tensors_that_move_and_keeps_none_alive(monkeypatch, device):
    monkeypatch.setattr(address_table, "MAXIMUM_TABLES", 4)
    cache = torch.arange(24.0, device=device).view(1, 6, 4).repeat(2, 1, 1)
    source, target = torch.tensor([[5], [4]], device=device), torch.tensor([[0], [1]], device=device)
    with use_backend("triton"):
        move_slots_([cache], source, target)
        cache.set_(torch.arange(48.0, device=device).view(2, 6, 4))  # new storage, same object
        move_slots_([cache], source, target)
        assert cache[0, 0].tolist() == cache[0, 5].tolist() == [20, 21, 22, 23]
        square = torch.arange(2 * 6 * 6, device=device).view(2, 6, 6)  # two views of one address and shape
        for view in (square, square.mT):
            wanted = view.clone()
            reference.move_slots_(source, target, [wanted])
            move_slots_([view], source, target)
            assert torch.equal(view, wanted)
        for length in range(2, 2 + address_table.MAXIMUM_TABLES + 2):
            move_slots_([torch.zeros(2, 6, length, device=device)], source, target)
    assert len(address_table._tables) <= address_table.MAXIMUM_TABLES
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None


@pytest.mark.skipif(INTERPRETED, reason="captures a CUDA graph")
def test_a_captured_graph_needs_a_call_before_it(device):
    cache = torch.randn(2, 6, 4, device=device)
    source, target = torch.tensor([[5], [4]], device=device), torch.tensor([[0], [1]], device=device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call it once before the capture"), torch.cuda.graph(graph):
        move_slots_([cache], source, target)
    move_slots_([cache], source, target)
    with torch.cuda.graph(graph):
        move_slots_([cache], source, target)
    cache.copy_(torch.randn_like(cache))
    expected = cache.clone()
    reference.move_slots_(source, target, [expected])
    graph.replay()
    assert torch.equal(cache, expected)


@any_backend
def test_nothing_to_move(backend, device):
    source = torch.full((2, 3), -1, device=device)
    cache = torch.randn(2, 6, 4, device=device)
    expected = cache.clone()
    with use_backend(backend):
        move_slots_([cache, cache.new_empty(2, 0, 4), cache.new_empty(2, 6, 0)], source, source)
        move_slots_([cache], source[:, :0], source[:, :0])
        move_slots_([], source, source)
    assert torch.equal(cache, expected)


@any_backend
@pytest.mark.parametrize("wrong", [-2, 8])
def test_a_slot_that_is_not_there_is_refused_before_anything_moves(wrong, backend):
    long, short = torch.arange(20.0).view(2, 10), torch.arange(16).view(2, 8)
    for name in ("source", "target"):
        moves = {"source": torch.tensor([[7, 6], [5, -1]]), "target": torch.tensor([[0, 1], [2, -1]])}
        moves[name][1, 1] = wrong
        with use_backend(backend), pytest.raises(IndexError, match=rf"{name} must be in \[-1, 8\), got {wrong}"):
            move_slots_([long, short], **moves)
    assert torch.equal(long, torch.arange(20.0).view(2, 10))
    assert torch.equal(short, torch.arange(16).view(2, 8))
