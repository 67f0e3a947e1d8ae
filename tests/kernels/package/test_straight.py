"""Ops that are called past PyTorch's dispatcher are still seen by whoever watches calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from asymvlm_kernels import flash_attn_with_kvcache, straight
from asymvlm_kernels.decode import attend


@pytest.fixture(autouse=True)
def no_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # tracing would see the poison


def inputs() -> list[torch.Tensor]:
    return [torch.randn(1, rows, 2, 16) for rows in (1, 8, 8)]


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return flash_attn_with_kvcache(q, k, v, return_scores=True)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_op(mode):
    given = inputs()
    call(*given)
    with mode() as seen:
        call(*given)
    assert "asymvlm.attend_slots.default" in seen.names


def test_a_profile_shows_the_op():
    given = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*given)
    assert "asymvlm::attend_slots" in {event.key for event in profile.key_averages()}


def test_a_trace_holds_the_op():
    graph = make_fx(call)(*inputs())
    assert "asymvlm.attend_slots.default" in {str(node.target) for node in graph.graph.nodes}


def test_fake_and_meta_tensors_run_the_fake():
    with FakeTensorMode():
        out, scores = call(*inputs())
    assert (out.shape, scores.shape) == ((1, 1, 2, 16), (1, 8))
    out, scores = call(*(tensor.to("meta") for tensor in inputs()))
    assert out.is_meta
    assert scores.shape == (1, 8)


def test_vmap_is_refused():
    q, k, v = (tensor[None] for tensor in inputs())
    with pytest.raises(ValueError, match=r"vmap|torch\.func"):
        torch.func.vmap(call)(q, k, v)


def test_a_subclass_sees_the_op():
    seen = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    q, k, v = inputs()
    call(q.as_subclass(Own), k, v)
    assert "asymvlm.attend_slots.default" in seen


def test_nobody_watches_an_ordinary_call(monkeypatch):
    assert not straight._is_watched()
    op = torch.ops.asymvlm.attend_slots.default
    monkeypatch.setattr(type(op), "__call__", lambda *args: pytest.fail("through the dispatcher"))
    attend.attend_slots(*inputs(), None, None, None, None, 0.25, -1, -1, 0.0, 0, True, 1)
