"""Qwen3.5 with experts: the same inputs."""

from __future__ import annotations

import dataclasses

from asymvlm.models import qwen3_5

ADAPTER = dataclasses.replace(qwen3_5.ADAPTER, model_type="qwen3_5_moe")
