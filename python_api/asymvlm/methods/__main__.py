"""``python -m asymvlm.methods`` prints the tables of methods in Markdown, as the documents have them."""

from __future__ import annotations

import sys

from asymvlm.methods.table import markdown

sys.stdout.write(markdown() + "\n")
