"""``python -m asymvlm.models`` prints the table of families in Markdown, as README has it."""

from __future__ import annotations

import sys

from asymvlm.models.table import markdown

sys.stdout.write(markdown() + "\n")
