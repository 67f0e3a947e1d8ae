"""`patch`: the one call that most people need. What it returns is in `handle`."""

from __future__ import annotations

from torch import nn

from asymvlm.hf.peft import unwrapped
from asymvlm.hf.versions import warn_if_untested
from asymvlm.patched.handle import HANDLE, PatchHandle
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.eviction import TextEviction, TurnEviction
from asymvlm.settings.policies import VisionPruning, as_vision
from asymvlm.settings.strategy import AutoStrategy
from asymvlm_kernels import UniformBudget

LOGITS = ("kept", "original")


def patch(
    model: nn.Module,
    vision: VisionPruning | float | None = None,
    text: TextEviction | None = None,
    turns: TurnEviction | None = None,
    *,
    cache: CacheLimit | None = None,
    keep: float | None = None,
    strategy: str | None = None,
    logits: str = "kept",
) -> PatchHandle:
    """Prune the vision tokens, and evict generated ones, in every later call of this model instance.

    ``generate``, ``model(**inputs)`` and pipelines then work on the shortened sequence. Returned sequences start with
    the original prompt; logits, attentions and hidden states have S' columns, which ``handle.last.index`` maps back,
    and behind a row's last vision token columns keep their distance from the end. Outputs that are no plain tensors and
    tuples carry their call's report as ``output.pruning_report``. Labelled tokens do not score (``text="all"`` and
    ``"user"``). Gradients into the vision tower and the embeddings are not supported through a patched model.

    Args:
        model: a supported Hugging Face vision-language model (see `supported_models`), or a PEFT model around one,
            which is then patched itself. With ``text`` or ``cache`` alone, a causal language model of transformers too.
        vision: settings, or a keep ratio in (0, 1], the share of vision tokens to keep. None means ``VisionPruning()``,
            half of them by cosine similarity, where nothing else is asked for, and no pruning beside eviction.
        text: evict generated tokens while decoding; None leaves them.
        turns: evict whole earlier answers when a turn of a dialogue begins; None leaves them.
        cache: hold at most so many tokens of a row in the K/V cache, its prompt included; not beside ``text``,
            ``turns`` or ``strategy``.
        keep: a keep ratio, in other words ``vision=keep``.
        strategy: ``"auto"`` prunes vision in calls where vision tokens dominate and evicts text in the others, as
            `AutoStrategy` says; settings that are None are its own. ``handle.last.strategy`` explains the choice.
        logits: ``"original"`` spreads the logits of a forward over the S columns of the prompt, for code that compares
            them with labels of that length (evaluation, label smoothing, token accuracy, preference losses): a removed
            column gets the logits of the nearest kept token in front of it. It takes memory for (B, S, vocabulary).
    Returns:
        `PatchHandle`, also a context manager that removes the patch on exit.
    Raises:
        ValueError: if the family is unknown, and the message lists the known ones; for another strategy; for
            ``vision``, ``turns`` or ``strategy`` of a model without vision.
        TypeError: for settings of another type.
        RuntimeError: if the model is patched already, or shares its decoder with one that is.
    """
    warn_if_untested()
    vision = as_vision(vision, keep)
    for name, found, wanted in (
        ("text", text, TextEviction),
        ("turns", turns, TurnEviction),
        ("cache", cache, CacheLimit),
    ):
        if found is not None and not isinstance(found, wanted):
            raise TypeError(f"{name} must be {wanted.__name__}(...) or None, got {found!r}")
    if strategy not in (None, "auto"):
        raise ValueError(f"strategy must be None or 'auto', got {strategy!r}")
    beside = {"text": text, "turns": turns, "strategy": strategy}
    if cache is not None and (others := [name for name, found in beside.items() if found is not None]):
        raise ValueError(f"cache limits the whole cache: pass it without {', '.join(others)}, got both")
    if logits not in LOGITS:
        raise ValueError(f"logits must be 'kept' or 'original', got {logits!r}")
    if strategy is not None:
        given = {"vision": vision, "text": text, "turns": turns}
        auto = AutoStrategy(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return PatchHandle(unwrapped(model), auto.vision, auto.text, auto.turns, auto, logits)
    if vision is None:
        evicts = text is not None or turns is not None or cache is not None
        vision = VisionPruning(budget=UniformBudget(1.0)) if evicts else VisionPruning()
    return PatchHandle(unwrapped(model), vision, text, turns, logits=logits, cache=cache)


__all__ = ["HANDLE", "PatchHandle", "patch"]
