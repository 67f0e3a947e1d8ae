"""LightOnOCR: Mistral 3's images, a tower and a projector of other names."""

from __future__ import annotations

import dataclasses

from asymvlm.models import mistral3

ADAPTER = dataclasses.replace(mistral3.ADAPTER, model_type="lighton_ocr", tower="model.vision_encoder")
