"""GLM-4V: Qwen2-VL's inputs; the frames of a video are runs of the image placeholder's own kind."""

from __future__ import annotations

import dataclasses

from asymvlm.models import qwen2_vl

ADAPTER = dataclasses.replace(qwen2_vl.ADAPTER, model_type="glm4v")
