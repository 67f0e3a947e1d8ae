"""The ``asymvlm`` command: what can be said without loading torch is said at once, the work is in `asymvlm.cli`."""

from __future__ import annotations

from asymvlm_cli.app import main

__all__ = ["main"]
