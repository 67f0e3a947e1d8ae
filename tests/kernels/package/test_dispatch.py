"""Choice of backend: nesting, restoring, the environment variable, refusals, the fallback of "auto"."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from asymvlm_kernels import BackendError, dispatch, importance_gap, use_backend
from asymvlm_kernels.unproven.cuda import library as cuda

CPU = torch.device("cpu")


def test_choices_nest_and_are_restored(monkeypatch):
    monkeypatch.delenv("ASYMVLM_BACKEND", raising=False)
    assert dispatch.requested_backend() == "auto"
    with use_backend("reference"):
        with use_backend("triton"):
            assert dispatch.requested_backend() == "triton"
        assert dispatch.requested_backend() == "reference"
        with pytest.raises(RuntimeError, match="inside"), use_backend("cuda"):
            raise RuntimeError("inside")
        assert dispatch.requested_backend() == "reference"
    assert dispatch.requested_backend() == "auto"


def test_a_choice_stays_in_its_thread(monkeypatch):
    monkeypatch.delenv("ASYMVLM_BACKEND", raising=False)
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment_variable_is_overridden_by_the_context(monkeypatch):
    monkeypatch.setenv("ASYMVLM_BACKEND", "triton")
    assert dispatch.requested_backend() == "triton"
    with use_backend("reference"):
        assert dispatch.requested_backend() == "reference"


def test_unknown_names_are_refused(monkeypatch):
    message = "backend must be one of auto, reference, triton, cuda, got 'tritn'"
    with pytest.raises(ValueError, match=message), use_backend("tritn"):
        pass
    monkeypatch.setenv("ASYMVLM_BACKEND", "tritn")
    with pytest.raises(ValueError, match=message):
        importance_gap(torch.zeros(1, 4))


def test_a_named_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(cuda, "find", lambda: None)
    with use_backend("cuda"), pytest.raises(BackendError, match=r"'cuda' was asked for .* is not built"):
        importance_gap(torch.zeros(1, 4))
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match=r"'triton' .* cpu: Triton kernels need a CUDA device"),
    ):
        importance_gap(torch.zeros(1, 4))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "TRITON_IMPORT_ERROR", "no module named triton")
    with use_backend("triton"), pytest.raises(BackendError, match="no module named triton"):
        importance_gap(torch.zeros(1, 4))


@pytest.mark.parametrize("capability,backend", [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_auto_on_a_gpu(capability, backend, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="asymvlm_kernels"), use_backend("auto"):
        assert [dispatch.resolve_backend(torch.device("cuda", 0)) for _ in range(3)] == [backend] * 3
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        ["asymvlm_kernels runs the PyTorch reference on cuda:0: compute capability 7.5 found, 8.0 or newer wanted"]
        if backend == "reference"
        else []
    )


def test_auto_on_a_cpu_is_the_reference():
    with use_backend("auto"):
        assert dispatch.resolve_backend(CPU) == "reference"


def test_each_backend_runs_its_own_code(monkeypatch):
    ran = []

    def implementation(name):
        return lambda x: ran.append(name) or x.clone()

    op = dispatch.define_op(
        "test_each_backend(Tensor x) -> Tensor",
        reference=implementation("reference"),
        triton=implementation("triton"),
        fake=torch.empty_like,
    )
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    for name in ("reference", "triton"):
        with use_backend(name):
            op(torch.zeros(2))
    assert ran == ["reference", "triton"]


def test_explanation_names_every_backend(monkeypatch):
    monkeypatch.setattr(cuda, "find", lambda: None)
    report = dispatch.explain_backend()
    assert report["backend"] in ("reference", "triton")
    assert set(report["available"]) == {"reference", "triton", "cuda"}
    assert report["available"]["reference"] == {"ok": True, "reason": "available"}
    assert not report["available"]["cuda"]["ok"]
    assert "python -m asymvlm_kernels.build" in report["available"]["cuda"]["reason"]
