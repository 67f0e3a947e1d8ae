"""``python -m asymvlm``: the command ``asymvlm``."""

import sys

from asymvlm_cli import main

sys.exit(main())
