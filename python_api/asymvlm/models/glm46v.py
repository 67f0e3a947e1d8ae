"""GLM-4.6V: the same inputs as GLM-4V."""

from __future__ import annotations

import dataclasses

from asymvlm.models import glm4v

ADAPTER = dataclasses.replace(glm4v.ADAPTER, model_type="glm46v")
