"""What the test modules share: settings, comparisons and the greedy options that return per-step logits."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from masked_reference import Selection
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from asymvlm import VisionPruning
from asymvlm_kernels import ThresholdBudget, UniformBudget

GREEDY = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)
GENERATED = ["single", "two_images", "left_padded", "image_free_row"]  # generate pads on the left
FORWARDED = [*GENERATED, "right_padded"]


def uniform(ratio: float = 0.5, **settings: object) -> VisionPruning:
    return VisionPruning(budget=UniformBudget(ratio), **settings)


def one_tier_each(gaps: list[float]) -> ThresholdBudget:
    """Thresholds halfway between three samples' gaps, so that each sample takes a tier of its own."""
    low, middle, high = sorted(gaps)
    return ThresholdBudget((low + middle) / 2, (middle + high) / 2, conservative=0.75, moderate=0.625, aggressive=0.5)


_atol: ContextVar[float] = ContextVar("atol")


def set_tolerance(atol: float = 2e-5) -> None:
    """The absolute tolerance of `assert_close` from here on: a fact of the family under test."""
    _atol.set(atol)


def assert_close(found: Tensor, expected: Tensor, atol: float | None = None) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=_atol.get() if atol is None else atol)


def assert_kept_logits(found: Tensor, reference: Tensor, selection: Selection) -> None:
    """``found`` (B, S', V) equals the full-length ``reference`` (B, S, V) at the kept tokens, slot by slot."""
    rows, slots = (selection.index >= 0).nonzero(as_tuple=True)
    assert found.shape[:2] == selection.index.shape
    assert_close(found[rows, slots], reference[rows, selection.index[rows, slots]])


def attention_layers(cache: Cache) -> list[CacheLayerMixin]:
    """The layers of a cache that hold K and V; recurrent ones hold a state of fixed size."""
    layers = [layer for layer in cache.layers if hasattr(layer, "keys")]
    assert layers
    return layers
