"""Start the demo. The first line comes before torch is imported, which takes seconds."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("loading torch and transformers", flush=True)
    from asymvlm.cli import console
    from bench.demo.command import app

    sys.exit(console.run_app(app, None, name="python -m bench.demo"))
