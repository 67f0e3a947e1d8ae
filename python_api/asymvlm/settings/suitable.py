"""Which settings of vision pruning suit each other: a method, a budget, a calibration."""

from __future__ import annotations

import logging

from asymvlm.methods import BeforeMethod, InsideMethod, SelectingMethod
from asymvlm.settings.scorer import Scorer
from asymvlm_kernels import AtLeastRelevant, Spread, UniformBudget

logger = logging.getLogger(__name__)
USUAL = "usual_relevant"  # in the record of a calibration


def check_inside(method: InsideMethod, budget: object, spread: object) -> None:
    """Refuse settings that a method between layers would not read."""
    if spread is not None:
        raise ValueError(f"spread is for methods before the decoder, got {spread!r} beside {method!r}")
    if method.budget is not None and budget not in (None, method.budget, UniformBudget(1.0)):
        raise ValueError(f"{method!r} decides itself how many tokens stay: pass no budget, got {budget!r}")


def check_scored(method: BeforeMethod | InsideMethod, spread: object, per_image: bool, floor: object) -> None:
    """Refuse settings that act on scores beside a method that has none, or none that tell of the question."""
    if not isinstance(floor, (bool, AtLeastRelevant)):
        raise ValueError(f"at_least_relevant must be True, False or AtLeastRelevant(), got {floor!r}")
    if isinstance(method, SelectingMethod) and (spread is not None or per_image):
        asked = f"spread={spread!r}" if spread is not None else f"per_image={per_image!r}"
        raise ValueError(
            f"{asked.partition('=')[0]} acts on scores, and the method {method.name!r} chooses a set without any: pass "
            f"a method that scores, got {asked}"
        )
    before = isinstance(method, BeforeMethod) and not isinstance(method, SelectingMethod)
    if floor is not False and not (before and method.needs_text):
        raise ValueError(
            f"at_least_relevant needs a method that scores tokens against the question before the decoder, got "
            f"method {method.name!r}"
        )


def check_background(method: BeforeMethod | InsideMethod, background: int) -> None:
    """Refuse to keep the lowest scored tokens beside a method that scores none before the decoder."""
    if background and (not isinstance(method, BeforeMethod) or isinstance(method, SelectingMethod)):
        raise ValueError(
            f"background needs a method that scores tokens before the decoder, got background={background} with method "
            f"{method.name!r}"
        )


def calibrated_with(scorer: object) -> tuple[Spread | None, int]:
    """``spread`` and ``background`` that a scorer's budget was calibrated with; None and 0 where it was not."""
    calibration = scorer.calibration if isinstance(scorer, Scorer) else {}
    spread = calibration.get("spread")
    return Spread(**spread) if spread else None, int(calibration.get("background", 0))


def spread_of(asked: Spread | bool | None, calibrated: Spread | None) -> Spread | None:
    """What a caller asks for: settings, True for those of the calibration, else the usual ones, False for none.

    None means as calibrated.
    """
    if isinstance(asked, Spread):
        return asked
    if asked is False:
        return None
    return calibrated or (Spread() if asked else None)


def check_calibrated(scorer: object, budget: object, spread: Spread | None, background: int) -> None:
    """Warn where a budget that a calibration fitted is used on other scores than it was fitted to."""
    if not isinstance(scorer, Scorer) or "spread" not in scorer.calibration or budget != scorer.budget:
        return
    fitted, wanted = calibrated_with(scorer)
    if fitted != spread:
        logger.warning(
            "the scorer's budget was calibrated with spread=%r and is used with spread=%r: it keeps another share",
            fitted,
            spread,
        )
    if wanted != background:
        logger.warning(
            "the scorer's budget was calibrated with background=%d and is used with background=%d: it keeps another "
            "share",
            wanted,
            background,
        )


def usual_share(scorer: object, budget: object) -> float:
    """Share of the tokens that look relevant on nearly all samples that ``budget`` was calibrated on; 0 if unknown."""
    if not isinstance(scorer, Scorer) or budget != scorer.budget:
        return 0.0
    return float(scorer.calibration.get(USUAL, 0.0))
