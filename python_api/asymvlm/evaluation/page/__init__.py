"""The HTML report of an evaluation: `write_report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from asymvlm.app.session import InputError
from asymvlm.evaluation.page.document import document
from asymvlm.evaluation.page.lost import MOST, find_lost
from asymvlm.evaluation.page.pictures import draw

if TYPE_CHECKING:
    from asymvlm.evaluation.plan import Plan
    from asymvlm.evaluation.run import Evaluation


def write_report(result: Evaluation, file: str | Path, plan: Plan | None = None, *, most: int = MOST) -> None:
    """Write one HTML page that stands alone: plots, tables, and samples that pruning lost.

    The page needs no network and no script, and is read on a phone as on a screen. Lost samples are asked again, for
    one token under each setting, to draw which patches stay.

    Args:
        result: of `asymvlm.evaluate`.
        file: to write; an older one is replaced once the page is whole.
        plan: of the run, whose model draws; without it lost samples have no pictures.
        most: lost samples to show.
    Raises:
        InputError: if the file cannot be written.
    """
    file = Path(file)
    lost, number = find_lost(result.samples, result.answers, result.summary["metrics"][0], most)
    if plan is not None:
        draw(plan.session, plan.arms.arms, plan.samples, lost)
    page = document(result.summary, result.record, result.answers, lost, number)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")  # half of a pair, from JSON's \ud800
        part.replace(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}), wanted a file in a folder that is there"
        ) from error


def check_page(file: str | Path) -> Path:
    """A file to write a page to. Raises InputError if it is none, before anything is measured."""
    file = Path(file)
    if file.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"report: {str(file)!r} found, wanted the ending .html")
    if not file.parent.is_dir() or file.is_dir():
        raise InputError(f"report: {str(file)!r} found, wanted a file in a folder that is there")
    return file


__all__ = ["check_page", "write_report"]
