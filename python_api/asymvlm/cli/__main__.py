"""``python -m asymvlm.cli``: the command without its entry point, from a bare checkout."""

import sys

from asymvlm_cli import main

sys.exit(main())
