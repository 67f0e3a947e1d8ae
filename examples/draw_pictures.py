"""Draw the picture of the README and of docs/: `asymvlm heatmap` on the page of the quick start, made small.

python examples/draw_pictures.py     # writes docs/pictures/heatmap.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "heatmap.png"
WIDTH, COLOURS = 1400, 96
COMMAND = [
    *("heatmap", "--model", "bench/tinyvlm/checkpoint", "--scorer", "bench/quality/scorers/default-0"),
    *("--image", "examples/page.png", "--question", "what is the value of Q", "--keep", "0.5"),
]

with tempfile.TemporaryDirectory() as folder:
    large = Path(folder) / "heatmap.png"
    subprocess.run([sys.executable, "-m", "asymvlm", *COMMAND, "--output", large], cwd=ROOT, check=True)
    with Image.open(large) as image:
        small = image.convert("RGB").resize(
            (WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS
        )
PICTURE.parent.mkdir(parents=True, exist_ok=True)
small.quantize(COLOURS).save(PICTURE, optimize=True)
print(f"wrote {PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size:,} bytes")
