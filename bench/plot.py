"""Figures from ``bench/results/``: tables between markers in the documents, and a roofline picture beside each file.

``python bench/plot.py`` rewrites the text between ``<!-- bench:prefill-cpu -->`` (``generate-gpu``, ``quality-beyond``,
...) and ``<!-- /bench -->``, and nothing else; ``--check`` fails where that text is stale; ``--picture`` draws.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

from bench.harness import results, tables  # noqa: E402
from bench.ops.prefill.floors import OPS  # noqa: E402
from bench.peers import tables as peers  # noqa: E402
from bench.public import tables as public  # noqa: E402
from bench.quality import evaluated_table as evaluated  # noqa: E402
from bench.quality import tables as quality  # noqa: E402
from bench.quality import text_scores  # noqa: E402
from bench.real_lm import tables as real_lm  # noqa: E402

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "measurements.md", ROOT / "docs" / "evaluation.md")
MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
KINDS = {"prefill-cpu": "cpu", "prefill-gpu": "gpu"}
GENERATE = {"generate-cpu": "cpu", "generate-gpu": "gpu"}  # files named <date>-generate.json


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a table is stale")
    parser.add_argument("--picture", action="store_true", help="draw the roofline of each kind's newest results")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--document", type=Path, action="append", help="file with markers, repeatable; default: ours")
    options = parser.parse_args(args)
    stale = 0
    for document in options.document or DOCUMENTS:
        before = document.read_text()
        after = MARKED.sub(lambda match: match[1] + table(match[2], options.results) + "\n" + match[4], before)
        if after != before and options.check:
            print(f"{document}: tables are stale, run python bench/plot.py", file=sys.stderr)
            stale = 1
        elif after != before:
            document.write_text(after)
    if options.check:
        return stale
    for kind in KINDS.values() if options.picture else ():
        file = results.newest(options.results, kind)
        if file is not None:
            print(roofline(results.load(file), file.with_suffix(".png")))
    return 0


def table(name: str, folder: Path) -> str:
    """The text of a marker.

    Raises:
        SystemExit: on a marker that this script does not know.
    """
    if name in GENERATE:
        file = results.newest(folder, GENERATE[name], "*-generate.json")
        return "Nothing measured yet." if file is None else tables.generate_blocks(results.load(file))
    for blocks, place in (
        (quality, "quality"),
        (evaluated, "quality"),
        (text_scores, "quality"),
        (peers, "peers"),
        (real_lm, "real_lm"),
        (public, "public"),
    ):
        if name in blocks.BLOCKS:
            return blocks.block(name, folder / place)
    if name not in KINDS:
        others = (*evaluated.BLOCKS, *text_scores.BLOCKS, *peers.BLOCKS, *real_lm.BLOCKS, *public.BLOCKS)
        known = ", ".join((*KINDS, *GENERATE, *quality.BLOCKS, *others))
        sys.exit(f"marker bench:{name} is unknown, wanted one of {known}")
    file = results.newest(folder, KINDS[name])
    return "Nothing measured yet." if file is None else tables.blocks(results.load(file))


def roofline(content: dict[str, Any], path: Path) -> Path:
    """Time against the fewest bytes an op can move, with the copy ceiling of the same run. Writes ``path``."""
    import matplotlib.pyplot as plt

    run = content["runs"][-1]
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for key, case in content["cases"].items():
        for name in ("ours", "literal eager"):
            time = results.time_us(case["variants"].get(name, {})) if "error" not in case else None
            if time is not None:
                points.setdefault((key.split("/")[0], name), []).append((case["bytes"] / 1e6, time))
    colours = {op: f"C{place}" for place, op in enumerate(OPS)}
    for (op, name), pairs in sorted(points.items()):
        marker = "o" if name == "ours" else "x"
        axes.plot(*zip(*sorted(pairs)), marker, color=colours[op], label=f"{op}, {name}")
    sizes = [case["bytes"] / 1e6 for case in content["cases"].values() if "bytes" in case]
    ends = [min(sizes), max(sizes)]
    axes.plot(ends, [size * 1e3 / run["ceiling"]["copy_gbs"] for size in ends], "k-", label="large copy, measured")
    axes.set(xscale="log", yscale="log", xlabel="fewest bytes (MB)", ylabel="time (us)")
    axes.set_title(f"{run['environment']['device']}, {run['environment']['time'][:10]}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
