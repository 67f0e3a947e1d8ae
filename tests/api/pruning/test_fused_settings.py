"""The settings recommended below half of the tokens take the two ops that a plain ratio takes, one launch each."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import asymvlm
from asymvlm import RelativeThresholdBudget, Spread, UniformBudget, VisionPruning

FEW, THRESHOLD = UniformBudget(0.3), RelativeThresholdBudget(0.4)
SETTINGS: dict[str, dict[str, Any]] = {
    "spread": {"budget": FEW, "spread": Spread()},
    "threshold": {"budget": THRESHOLD},
    "both": {"budget": THRESHOLD, "spread": Spread()},
    "both with a floor": {"budget": THRESHOLD, "spread": Spread(), "at_least_relevant": True},
    "given scores": {"budget": THRESHOLD, "spread": Spread(), "method": "spiral"},
}


class Ours(TorchDispatchMode):
    """Writes down the ops of the kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "asymvlm":
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_one_image_a_row_takes_two_ops(settings):
    model, inputs = tiny.build("llava"), tiny.make_batch("llava", "single")
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(**settings)) as handle, Ours() as ours:
        model(**inputs)
        assert [name for name in ours.called if name != "relative_counts"] == ["score_select", "gather_sequence"]
        own, scores = handle.last.own, handle.last.scores
    assert torch.equal(own, scores) == ("spread" not in settings)  # reports count what had not spread
