"""Write pages with questions and answers as `asymvlm train` and `asymvlm calibrate` read them.

Run it in the root of a checkout:

python examples/make_pages.py FOLDER [NUMBER]     # FOLDER/scorer.jsonl, FOLDER/calibration.jsonl, FOLDER/*.png
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.tinyvlm.evaluate import make_samples


def main(folder: Path, number: int) -> None:
    """Pages of two splits that never overlap: one to train a scorer on, one to calibrate its budget."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("scorer", "calibration"):
        samples = make_samples(split, number, seed=0)
        lines = []
        for place, turn in enumerate(samples.turns):
            image = f"{split}-{place}.png"
            samples.pages.image(place, 8).save(folder / image)
            lines.append(json.dumps({"image": image, "question": turn.question, "answer": turn.answer}))
        file = folder / f"{split}.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {file}, {number} samples")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python examples/make_pages.py FOLDER [NUMBER]")
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 64)
