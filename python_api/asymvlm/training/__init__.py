"""Training of the learned weight (section 3.2 of the paper) on a frozen model."""

from __future__ import annotations

from asymvlm.training.loop import train_scorer
from asymvlm.training.settings import TrainingSettings

__all__ = ["TrainingSettings", "train_scorer"]
