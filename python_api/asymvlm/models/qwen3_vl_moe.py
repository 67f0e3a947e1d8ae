"""Qwen3-VL with experts: the same inputs and DeepStack."""

from __future__ import annotations

import dataclasses

from asymvlm.models import qwen3_vl

ADAPTER = dataclasses.replace(qwen3_vl.ADAPTER, model_type="qwen3_vl_moe")
