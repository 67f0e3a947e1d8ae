"""What the tests of `asymvlm.verify` share: fewer steps, and how a result is read."""

from __future__ import annotations

import copy

import pytest
from shared_models import build_once
from transformers import PreTrainedModel

import asymvlm
from asymvlm.verification import evicting, subject
from asymvlm.verification.report import FAIL


@pytest.fixture(autouse=True)
def fewer_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evictions instead of five; the shipped checkpoint is verified as it comes."""
    if "shipped" not in request.node.name:
        monkeypatch.setattr(subject, "EVICTION_STEPS", 12)
        monkeypatch.setattr(evicting, "EVICTION_STEPS", 12)


@pytest.fixture
def llava() -> PreTrainedModel:
    return copy.deepcopy(build_once("llava"))


def verdicts(result: asymvlm.Verification) -> dict[str, str]:
    return {row.check: row.verdict for row in result.rows}


def failed(result: asymvlm.Verification) -> list[str]:
    assert not result.passed
    return [row.check for row in result.rows if row.verdict == FAIL]
