"""Command A Vision: Aya Vision's tiles."""

from __future__ import annotations

import dataclasses

from asymvlm.models import aya_vision

ADAPTER = dataclasses.replace(aya_vision.ADAPTER, model_type="cohere2_vision")
