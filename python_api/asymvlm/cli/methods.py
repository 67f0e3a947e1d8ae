"""`asymvlm methods`: every method that the library has, when it decides, where it was published, what it needs."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from asymvlm.cli import console
from asymvlm.methods import available_methods
from asymvlm.methods.table import MOMENTS, Row, families_in_words, rows


def methods(*, as_json: bool) -> int:
    """Print the library's methods, and the names that installed packages add."""
    found = list(rows())
    others = [name for name in available_methods() if name not in {row.name for row in found}]
    if as_json:
        console.print_json({"methods": [row.to_dict() for row in found], "of_other_packages": others})
        return 0
    for moment, _ in MOMENTS.values():
        console.out.print(_table(moment, [row for row in found if row.moment == moment]))
    console.out.print("of other packages: " + (", ".join(others) or "none"), markup=False, soft_wrap=True)
    return 0


def _table(moment: str, found: list[Row]) -> Table:
    table = Table(title=moment, title_justify="left", title_style="bold")
    for name in ("method", "paper", "needs", "families", "what it does"):
        table.add_column(name, overflow="fold")
    for row in found:
        cells = (row.name, row.paper or "-", ", ".join(row.needs) or "-", families_in_words(row), row.does)
        table.add_row(*map(escape, cells))
    return table
