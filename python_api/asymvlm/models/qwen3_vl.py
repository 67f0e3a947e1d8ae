"""Qwen3-VL: M-RoPE positions, features of several tower layers added to the first decoder layers (DeepStack)."""

from __future__ import annotations

import dataclasses

from asymvlm.models import qwen2_vl

ADAPTER = dataclasses.replace(qwen2_vl.ADAPTER, model_type="qwen3_vl", deepstack=True)
