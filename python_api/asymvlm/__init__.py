"""Vision pruning for Hugging Face vision-language models, on the kernels of `asymvlm_kernels`.

handle = asymvlm.patch(model, vision=VisionPruning(budget=UniformBudget(0.5)))
model.generate(**inputs)          # prefills half the vision tokens
handle.last                       # what it did
handle.remove()                   # as if nothing had been
"""

from __future__ import annotations

from asymvlm.cache.eviction_cache import CacheStats, EvictionCache
from asymvlm.cache.report import EvictionReport
from asymvlm.calibration import Calibration, calibrate_budget
from asymvlm.evaluation import Evaluation, evaluate
from asymvlm.hf.versions import UntestedVersionWarning
from asymvlm.models import supported_models
from asymvlm.old_names import install as _install_old_names
from asymvlm.patch import PatchHandle, patch
from asymvlm.patched.conversation import Conversation, Reply
from asymvlm.prompt.shorten import prune_inputs
from asymvlm.report.pruning import PruningReport
from asymvlm.report.recall import RecallReport
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.eviction import TextEviction, TurnEviction
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.recall import Recall
from asymvlm.settings.scorer import Scorer
from asymvlm.settings.strategy import AutoStrategy, Choice
from asymvlm.tokens.user_turns import UserTurns
from asymvlm.training import TrainingSettings, train_scorer
from asymvlm.verification import Verification, verify
from asymvlm_kernels import (
    AtLeastRelevant,
    LinearBudget,
    RelativeThresholdBudget,
    Spread,
    ThresholdBudget,
    UniformBudget,
    __version__,
)

_install_old_names()

__all__ = [
    "AtLeastRelevant",
    "AutoStrategy",
    "CacheLimit",
    "CacheStats",
    "Choice",
    "Conversation",
    "Calibration",
    "Evaluation",
    "EvictionCache",
    "EvictionReport",
    "LinearBudget",
    "PatchHandle",
    "PruningReport",
    "Recall",
    "RecallReport",
    "RelativeThresholdBudget",
    "Reply",
    "Scorer",
    "Spread",
    "TextEviction",
    "ThresholdBudget",
    "TrainingSettings",
    "TurnEviction",
    "UniformBudget",
    "UntestedVersionWarning",
    "UserTurns",
    "Verification",
    "VisionPruning",
    "__version__",
    "calibrate_budget",
    "evaluate",
    "patch",
    "prune_inputs",
    "supported_models",
    "train_scorer",
    "verify",
]
