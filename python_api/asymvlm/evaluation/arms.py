"""What is compared: the whole model, and each method at each keep ratio, as settings that `asymvlm.patch` takes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asymvlm.app.session import InputError
from asymvlm.evaluation.metrics import code_of
from asymvlm.hf.peft import unwrapped
from asymvlm.methods import AsymVLM, BeforeMethod, CachedMethod, InsideMethod, find_method
from asymvlm.methods.table import why_not
from asymvlm.models import adapter_for
from asymvlm.report.crowded import silence
from asymvlm.settings.budget_file import budget_to_dict
from asymvlm.settings.cache_limit import CacheLimit
from asymvlm.settings.policies import VisionPruning
from asymvlm.settings.scorer import Scorer
from asymvlm.settings.suitable import calibrated_with, spread_of
from asymvlm_kernels import Spread, UniformBudget

FULL, OWN, COSINE = "full", "own", "cosine"
CACHE = "cache:"  # in front of the names of methods of the cache
PACKAGE = __name__.split(".")[0]
Keep = float | str
WHOLE = VisionPruning(budget=UniformBudget(1.0))


@dataclass(frozen=True)
class Arm:
    """One method at one keep ratio. ``keep`` is a ratio in (0, 1], or `OWN`."""

    method: str
    keep: Keep
    vision: VisionPruning = field(compare=False)
    cache: CacheLimit | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        return self.method if self.method == FULL else f"{self.method} {keep_in_words(self.keep)}"

    def to_dict(self) -> dict[str, Any]:
        """For the record of a run."""
        whole = self.method == FULL or self.cache is not None
        made_by = self.cache.scored_by if self.cache is not None else self.vision.scored_by
        about, budget = "" if self.method == FULL else _about(made_by), None if whole else _budget(self.vision)
        if self.vision.spread is not None:
            about += f", {self.vision.spread}"
        if self.vision.background:
            about += f", background={self.vision.background}"
        if self.vision.at_least_relevant:
            about += ", at least relevant"
        return {"method": self.method, "keep": self.keep, "budget": budget, "about": about}


@dataclass(frozen=True)
class Arms:
    """All settings in order, and those that a method cannot hold, each with ``method``, ``keep`` and ``reason``."""

    arms: list[Arm]
    skipped: list[dict[str, Any]]


@dataclass(frozen=True)
class Choices:
    """What is asked for.

    Args:
        methods: names of methods before or inside the decoder, `COSINE`, or objects by a name of their own.
        keep: ratios in (0, 1], or `OWN`.
        cache: names or objects of methods of the cache.
        scorer: of the method ``asymvlm``.
        spread: of it and of `COSINE`: settings, True for the usual ones, False for none. None means what the scorer's
            own budget was calibrated with, where `OWN` is asked for, and elsewhere none.
        at_least_relevant: of both too, as in `VisionPruning`.
        text: what vision is scored against, as in `VisionPruning`.
        seed: of methods that draw.
    """

    methods: Mapping[str, Any]
    keep: Sequence[Keep]
    cache: Mapping[str, Any] = field(default_factory=dict)
    scorer: Scorer | None = None
    spread: Spread | bool | None = None
    at_least_relevant: bool = False
    text: str = "all"
    seed: int = 0


def check_choices(choices: Choices) -> list[Keep]:
    """The ratios that are asked for, once they and all names are known to be right; no model is needed.

    Raises:
        InputError: for a method that nobody has, and for a wrong ratio.
    """
    ratios = [_ratio(keep) for keep in choices.keep]
    check_names(choices)
    if not isinstance(choices.spread, (Spread, bool, type(None))):
        raise InputError(f"spread: {choices.spread!r} found, wanted Spread(...), True, False or None")
    if not ratios:
        raise InputError("keep: no ratio found, wanted one or more in (0, 1]")
    if len(set(ratios)) < len(ratios):
        raise InputError(f"keep: {', '.join(map(str, choices.keep))} found, wanted each ratio once")
    try:
        for given in choices.methods.values():
            _found(given, choices)
        for given in choices.cache.values():
            find_method(given, CachedMethod)
    except (TypeError, ValueError) as error:
        raise InputError(f"methods: {error}") from error
    return ratios


def check_names(choices: Choices) -> None:
    """Raise InputError for names under which a setting could be taken for another one."""
    for kind, names in {"methods": choices.methods, "cache": choices.cache}.items():
        for name in names:
            if not isinstance(name, str) or not name or name == FULL or name.startswith(CACHE):
                raise InputError(
                    f"{kind}: the name {name!r} found, wanted text, not {FULL!r} and not beginning with {CACHE!r}"
                )


def make_arms(model: Any, processor: Any, choices: Choices) -> Arms:
    """The settings for a model, `FULL` first.

    Raises:
        InputError: for a method that is unknown or that the model cannot serve at any ratio, and for a wrong ratio.
    """
    model, ratios = unwrapped(model), check_choices(choices)
    arms, skipped = [Arm(FULL, 1.0, WHOLE)], list[dict[str, Any]]()
    smaller = [keep for keep in ratios if keep != 1]
    for name, given in choices.methods.items():
        made, reasons = [], []
        for keep in smaller:
            try:
                made.append(Arm(name, keep, _vision(name, given, keep, model, processor, choices)))
            except (ValueError, TypeError, NotImplementedError) as error:
                reasons.append({"method": name, "keep": keep, "reason": " ".join(str(error).split())})
        if reasons and not made:
            raise InputError(f"method {name!r} cannot be measured at any ratio: {reasons[0]['reason']}")
        arms, skipped = arms + made, skipped + reasons
    for name, given in choices.cache.items():
        for keep in smaller:
            try:
                limit = CacheLimit(method=_seeded(find_method(given, CachedMethod), choices.seed), share=_share(keep))
                _check_family(limit.method, model)
            except (ValueError, TypeError) as error:
                raise InputError(f"method {CACHE}{name} at {keep}: {error}") from error
            arms.append(Arm(f"{CACHE}{name}", keep, WHOLE, limit))
    return Arms(arms, skipped)


def keep_in_words(keep: Keep) -> str:
    return keep if isinstance(keep, str) else f"{keep:g}"


def _vision(name: str, given: Any, keep: Keep, model: Any, processor: Any, choices: Choices) -> VisionPruning:
    method = _found(given, choices)
    scored = isinstance(method, AsymVLM)
    options: dict[str, Any] = {"text": choices.text, "processor": processor}
    if isinstance(method, AsymVLM):
        calibrated, background = calibrated_with(method.scorer if keep == OWN else None)
        options |= {"spread": spread_of(choices.spread, calibrated), "background": background}
        options["at_least_relevant"] = choices.at_least_relevant
    _check_family(method, model)
    if isinstance(method, InsideMethod):
        if keep != OWN:
            method = _at(method, float(keep), int(model.config.get_text_config().num_hidden_layers))
        return VisionPruning(method=method, budget=None if method.budget is not None else _uniform(keep), **options)  # type: ignore[arg-type]
    if keep == OWN and getattr(method, "budget", None) is None and getattr(method, "scorer", None) is None:
        raise ValueError(f"method {name!r} brings no budget of its own, wanted a ratio")
    if keep != OWN and isinstance(method, AsymVLM) and isinstance(method.scorer, Scorer):
        method = AsymVLM(method.scorer.replace(budget=None, calibration={}))  # of another budget than is measured
    vision = VisionPruning(method=method, budget=_uniform(keep), **options)  # type: ignore[arg-type]
    silence(vision)  # what few tokens cost is about to be measured
    if keep == OWN and scored and not (isinstance(vision.scorer, Scorer) and vision.scorer.budget is not None):
        raise ValueError("the scorer brings no budget of its own, wanted a ratio")
    vision.check_model(model)
    return vision


def _found(given: Any, choices: Choices) -> BeforeMethod | InsideMethod:
    """The method itself, with the scorer and the seed that were asked for."""
    if given == COSINE:
        return AsymVLM()
    method: BeforeMethod | InsideMethod = find_method(given, BeforeMethod, InsideMethod)
    if isinstance(method, AsymVLM) and method.scorer is None and isinstance(given, str):
        return AsymVLM(choices.scorer)
    return _seeded(method, choices.seed) if isinstance(given, str) else method


def _seeded(method: Any, seed: int) -> Any:
    """A method that draws, with this seed."""
    drawn = dataclasses.is_dataclass(method) and any(entry.name == "seed" for entry in dataclasses.fields(method))
    return dataclasses.replace(method, seed=seed) if drawn and not isinstance(method, type) else method


def _at(method: InsideMethod, keep: float, layers: int) -> InsideMethod:
    """A method inside the decoder that holds ``keep`` on average over its layers."""
    kind: Any = type(method)
    if not hasattr(kind, "for_average"):
        raise ValueError(f"method {kind.name!r} cannot be set to an average (no for_average), wanted --keep own")
    found: InsideMethod = kind.for_average(keep, layers)
    return found


def _check_family(method: Any, model: Any) -> None:
    if reason := why_not(type(method), adapter_for(model)):
        raise ValueError(f"{model.config.model_type} cannot serve it: {reason}")


def _uniform(keep: Keep) -> UniformBudget | None:
    return None if keep == OWN else UniformBudget(float(keep))


def _share(keep: Keep) -> float:
    if keep == OWN:
        raise ValueError("a method of the cache brings no share of its own, wanted a ratio")
    return float(keep)


def _ratio(keep: Any) -> Keep:
    if keep == OWN:
        return OWN
    try:
        ratio = float(keep)
    except (TypeError, ValueError):
        ratio = 0.0
    if isinstance(keep, bool) or not 0 < ratio <= 1:
        raise InputError(f"keep: {keep} found, wanted ratios in (0, 1], or {OWN!r}")
    return ratio


def _about(method: Any) -> str:
    """A method with its settings, the same in every process; a learned weight and code of the caller's by digest."""
    if isinstance(method, AsymVLM):
        if method.weight is None:
            return "cosine similarity"
        values = method.weight.detach().float().cpu().contiguous().numpy().tobytes()
        return f"weight {hashlib.sha256(values).hexdigest()[:16]}"
    kind = type(method)
    told = repr(method) if dataclasses.is_dataclass(method) else f"{kind.__qualname__}({_plain(method)})"
    return told if kind.__module__.split(".")[0] == PACKAGE else f"{told}, code {code_of(kind)}"


def _plain(method: Any) -> str:
    """Attributes of an object that read the same in every process."""
    found = sorted(getattr(method, "__dict__", {}).items())
    return ", ".join(f"{name}={value!r}" for name, value in found if isinstance(value, (str, int, float, type(None))))


def _budget(vision: VisionPruning) -> dict[str, Any] | str:
    try:
        return budget_to_dict(vision.budget)  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError):  # one of somebody else's
        return repr(vision.budget)


__all__ = ["CACHE", "COSINE", "FULL", "OWN", "Arm", "Arms", "Choices", "Keep", "check_choices", "make_arms"]
