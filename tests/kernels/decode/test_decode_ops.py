"""The decode ops as registered ops: opcheck, torch.compile, refused gradients, no waiting, launches and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention import make_call
from watch import Watch

import asymvlm_kernels as ak
from asymvlm_kernels import use_backend
from asymvlm_kernels.decode import attend, merge, moves, reference, score

any_backend = pytest.mark.parametrize("backend", ["reference", "triton"])
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.fixture
def guarded_scratch() -> None:
    """Off: opcheck compares the storage of a result with that of its fake."""


def arguments(device) -> dict[str, tuple]:
    """Positional arguments of each registered op, with and without its optional ones."""
    call = make_call(2, 2, 4, 2, 20, 16, torch.float32, device, slots=True, lengths=[20, 11], leftpad=[1, 0])
    q, k, v, option = call.q, call.k, call.v, call.options
    slots = (option["cache_seqlens"], option["cache_leftpad"], option["slot_pos"], option["q_pos"])
    none = (None,) * 4
    keep = option["slot_pos"] >= 0
    moved = [k.clone(), v.clone(), option["slot_pos"].clone()]
    return {
        "attend_slots": (q, k, v, *slots, 0.3, 9, -1, 2.0, 0, True, 2),
        "attend_slots bare": (q, k, v, *none, 0.3, -1, -1, 0.0, 0, False, 0),
        "score_from_lse": (q, k, torch.ones(2, 4, 2, device=device), *slots, 0.3, 9, -1, 2.0, 2),
        "score_from_lse bare": (q, k, torch.ones(2, 4, 2, device=device), *none, 0.3, -1, -1, 0.0, 1),
        "plan_moves": (keep, 10),
        "move_slots_": (*reference.plan_moves(keep, 10), moved),
    }


@any_backend
@pytest.mark.parametrize("name", arguments("cpu"))
def test_opcheck(name, backend, device):
    with use_backend(backend):
        op = getattr(torch.ops.asymvlm, name.split()[0]).default
        torch.library.opcheck(op, arguments(device)[name])


def evict(k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = k * 2, v + 1
    ak.move_slots_([k, v], *ak.plan_moves(keep))
    return k, v


CALLS: dict[str, Callable[..., object]] = {
    "flash_attn_func": lambda q, k, v, keep: ak.flash_attn_func(q * 2, k, v, causal=True, return_scores=True),
    "flash_attn_with_kvcache": lambda q, k, v, keep: ak.flash_attn_with_kvcache(
        q, k, v, return_scores=True, slot_pos=keep.int() - 1, q_pos=keep.sum(-1), window_size=(7, 0)
    ),
    "score_from_lse": lambda q, k, v, keep: ak.score_from_lse(q, k, q.sum(-1).mT, cache_seqlens=keep.sum(-1)),
    "move_slots_": lambda q, k, v, keep: evict(k, v, keep),
}


def inputs(S: int, device) -> tuple[torch.Tensor, ...]:
    call = make_call(2, 1, 4, 2, S, 16, torch.float32, device)
    return call.q, call.k, call.v, torch.rand(2, S, device=device) < 0.6


def same(one: object, other: object) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(*pair) for pair in pairs)


@any_backend
@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name, backend, device):
    torch.compiler.reset()
    with use_backend(backend), torch.no_grad():
        compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
        arguments = inputs(20, device)
        assert same(compiled(*arguments), CALLS[name](*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_a_longer_cache_is_not_traced_again_and_again(name, device):
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(CALLS[name], fullgraph=True, backend=count)
        for S in (20, 24, 31, 40, 57):
            arguments = inputs(S, device)
            assert same(compiled(*arguments), CALLS[name](*arguments))
    assert len(graphs) <= 2  # the second is the one for every length


def test_inputs_that_require_grad_are_refused(device):
    q, k, v, keep = inputs(20, device)
    wants = k.clone().requires_grad_()
    lse, moves = torch.zeros(2, 4, 1, device=device), ak.plan_moves(keep)
    calls = {
        "flash_attn_func is not differentiable in k": lambda: ak.flash_attn_func(q, wants, v),
        "flash_attn_with_kvcache is not differentiable in v_cache": lambda: ak.flash_attn_with_kvcache(q, k, wants),
        "score_from_lse is not differentiable in k": lambda: ak.score_from_lse(q, wants, lse),
        "move_slots_ is not differentiable in tensors": lambda: ak.move_slots_([wants], *moves),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
        with torch.no_grad():
            call()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that are launched. None runs: what they write stays as it is."""
    names: list[str] = []
    for module in (attend, merge, score, moves):
        for name in [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]:

            class Recorder:
                def __init__(self, name: str) -> None:
                    self.name = name

                def __getitem__(self, grid: object) -> Callable[..., None]:
                    names.append(self.name)
                    return lambda *args, **options: None

            monkeypatch.setattr(module, name, Recorder(name))
    return names


def test_two_launches_with_and_without_scores_and_no_copy_of_the_cache(launched, device):
    call = make_call(2, 1, 16, 8, 4096, 256, torch.bfloat16, device, slots=True)
    args = (call.q, call.k, call.v, None, None, *(call.options[name] for name in ("slot_pos", "q_pos")))
    for scores in (0, 1):
        with Watch() as watch:
            attend._attend_slots_triton(*args, 0.1, -1, -1, 0.0, 0, False, scores)
        assert launched == ["_attend_slots_kernel", "_merge_parts_kernel"]
        assert not watch.waits
        assert watch.largest <= call.k.nbytes // 25  # partial outputs: 3 % of K, and 3 % of V
        launched.clear()
    lse = torch.zeros(2, 16, 1, device=device)
    moves._move_slots_triton(*reference.plan_moves(call.options["slot_pos"] >= 0, 64), [call.k, call.v])  # the table
    launched.clear()
    with Watch() as watch:
        score._score_from_lse_triton(call.q, call.k, lse, *args[3:], 0.1, -1, -1, 0.0, 1)
        plan = moves._plan_moves_triton(call.options["slot_pos"] >= 0, 64)
        moves._move_slots_triton(*plan, [call.k, call.v])
    assert launched == ["_score_from_lse_kernel", "_plan_moves_kernel", "_move_slots_kernel"]
    assert not watch.waits


def test_reference_does_not_wait_where_there_is_a_device_to_wait_for():
    q, k, v, keep = (x.to("meta") for x in inputs(20, "cpu"))
    with Watch() as watch:
        plan = reference.plan_moves(keep, 10)
        reference.move_slots_(*plan, [k, v])
        slots = (keep.sum(-1), None, keep.int(), keep.sum(-1)[:, None])
        _, lse, _ = reference.attend_slots(q, k, v, *slots, 0.3, 5, -1, 0.0, 0, True, 1)
        reference.score_from_lse(q, k, lse, *slots, 0.3, 5, -1, 0.0, 1)
    assert not watch.waits
