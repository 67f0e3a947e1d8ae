"""Qwen3.5: Qwen3-VL's inputs without DeepStack; most layers are recurrent.

A recurrent layer sees the kept tokens as if the others had never been there. Its full-attention layers keep the
original positions, as everywhere.
"""

from __future__ import annotations

import dataclasses

from asymvlm.models import qwen2_vl

ADAPTER = dataclasses.replace(qwen2_vl.ADAPTER, model_type="qwen3_5", recurrent=True)
