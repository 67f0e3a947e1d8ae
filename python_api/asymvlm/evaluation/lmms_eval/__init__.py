"""lmms-eval runs its models pruned: ``--model asymvlm --model_args model=llava_hf,...,method=fastv,keep=0.5``.

lmms-eval finds the plug-in by the entry-point group ``lmms_eval.models``; nothing here imports it before
it asks. Written for lmms-eval 0.7.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"  # for --include_path: ocrvqa, mmdu, llava_bench_judged
PAPER = TASKS.parent / "paper.yaml"  # for --config: the grid of arXiv:2605.29535
MODEL = "asymvlm"


def manifest() -> Any:
    """What the entry point gives to lmms-eval: the name of the model and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = "asymvlm.evaluation.lmms_eval.plugin"
    return ModelManifest(MODEL, simple_class_path=f"{classes}.Simple", chat_class_path=f"{classes}.Chat")


__all__ = ["MODEL", "PAPER", "TASKS", "manifest"]
