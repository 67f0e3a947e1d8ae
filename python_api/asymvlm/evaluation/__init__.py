"""What pruning and eviction cost on one's own data: `evaluate`, its metrics and its statistics."""

from __future__ import annotations

from asymvlm.evaluation.metrics import METRICS, Metric
from asymvlm.evaluation.page import write_report
from asymvlm.evaluation.run import Evaluation, evaluate, read_results

__all__ = ["METRICS", "Evaluation", "Metric", "evaluate", "read_results", "write_report"]
