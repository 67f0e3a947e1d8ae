"""GLM-4.5V: GLM-4V with experts."""

from __future__ import annotations

import dataclasses

from asymvlm.models import glm4v

ADAPTER = dataclasses.replace(glm4v.ADAPTER, model_type="glm4v_moe")
