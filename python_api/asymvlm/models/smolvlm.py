"""SmolVLM: Idefics 3 with a smaller decoder; video frames are tiles under the same placeholder."""

from __future__ import annotations

import dataclasses

from asymvlm.models import idefics3

ADAPTER = dataclasses.replace(idefics3.ADAPTER, model_type="smolvlm")
