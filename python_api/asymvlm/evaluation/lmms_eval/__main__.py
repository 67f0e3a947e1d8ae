"""Where the files for lmms-eval lie: ``--include_path "$(python -m asymvlm.evaluation.lmms_eval tasks)"``."""

from __future__ import annotations

import sys

from asymvlm.evaluation.lmms_eval import PAPER, TASKS

PATHS = {"tasks": TASKS, "paper": PAPER}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PATHS:
        sys.exit(f"usage: python -m asymvlm.evaluation.lmms_eval {{{','.join(PATHS)}}}")
    sys.stdout.write(f"{PATHS[sys.argv[1]]}\n")
