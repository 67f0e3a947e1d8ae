"""ViP-LLaVA: LLaVA 1.5 with features of several tower layers side by side."""

from __future__ import annotations

import dataclasses

from asymvlm.models import llava

ADAPTER = dataclasses.replace(llava.ADAPTER, model_type="vipllava", tower_attention=None, projector=None)
