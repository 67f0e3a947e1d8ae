"""Rows of a call in which more vision tokens look relevant than were kept: counted from their scores, and warned of.

On pages with much to read, or much that resembles it, a budget that suits other pages drops what an answer needs, and
nothing else shows it. On a CPU the warning comes with the call. On an accelerator counting would wait for the device,
so it comes when the report is first read for it (`above_threshold`, `notes`, `to_dict`).
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from asymvlm.report.pruning import PruningReport
    from asymvlm.settings.policies import VisionPruning

logger = logging.getLogger(__name__)
_warned: WeakSet[VisionPruning] = WeakSet()  # once for all calls under the same settings: their reports note the others


def count_relevant(report: PruningReport) -> list[int] | None:
    """How many tokens of each row look relevant; None where that cannot be told."""
    relevance = None if report.vision is None else report.vision.relevance
    if relevance is None or report.own is None:
        return None
    own = report.own.cpu()  # no kernel is launched for a report
    counts: list[int] = relevance.relevant(own, own.isnan() | (own > -math.inf)).tolist()
    return counts


def crowded_rows(report: PruningReport) -> dict[int, str]:
    """Rows in which more tokens look relevant than were kept, and more than usual, in words."""
    above, vision = report.above_threshold, report.vision
    relevance = None if vision is None else vision.relevance
    if above is None or relevance is None:
        return {}
    rows = enumerate(zip(above, report.kept, report.vision_tokens, strict=True))
    found = {
        row: f"{many} tokens look relevant and {kept} are kept"
        for row, (many, kept, n) in rows
        if many > kept and relevance.is_unusual(many, n)
    }
    if found and vision is not None and vision not in _warned:
        _warned.add(vision)
        row, words = next(iter(found.items()))
        more = f", likewise in {len(found) - 1} other rows" if len(found) > 1 else ""
        logger.warning(
            "row %d: %s%s; raise the budget or set at_least_relevant=True where answers suffer (said once for these "
            "settings, noted in every report)",
            row,
            words,
            more,
        )
    return found


def silence(vision: VisionPruning) -> None:
    """Do not warn under these settings: whoever made them measures what they cost."""
    _warned.add(vision)


def warn_if_crowded(report: PruningReport) -> None:
    """Warn of a call, the first time under its settings."""
    if report.vision is not None and report.vision not in _warned:
        crowded_rows(report)


__all__ = ["count_relevant", "crowded_rows", "silence", "warn_if_crowded"]
