"""One tiny model of each family a session, for tests to copy."""

from __future__ import annotations

import functools

import tiny
from transformers import PreTrainedModel


@functools.cache
def build_once(family: str) -> PreTrainedModel:
    model = tiny.build(family)
    # transformers adds hooks of its own on first use; later snapshots must not see that
    model.generate(**tiny.make_batch(family, "single"), max_new_tokens=2)
    if tiny.family_of(model).video is not None:
        model.generate(**tiny.make_video(family), max_new_tokens=1)
    return model
