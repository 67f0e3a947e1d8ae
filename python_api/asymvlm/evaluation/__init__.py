"""What pruning and eviction cost on one's own data: `evaluate`, its metrics and its statistics."""

from __future__ import annotations

from asymvlm.evaluation.metrics import METRICS, Metric
from asymvlm.evaluation.run import Evaluation, evaluate

__all__ = ["METRICS", "Evaluation", "Metric", "evaluate"]
