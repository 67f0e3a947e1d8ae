"""Compare the machine code of every kernel with the committed baseline of this Triton version, or write a new one.

python tests/static/baseline.py             # what differs; exit code 1 where something grew past its margin
python tests/static/baseline.py --update    # the same, then take the figures found as the baseline
"""

from __future__ import annotations

import argparse
import re
import sys

import builds
import gate
import triton


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[builds.options()]
    )
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    if args.update and (args.case or set(args.arch) != set(builds.ARCHITECTURES)):
        parser.error("--update needs every case and every architecture")
    found = list(builds.compile_all(builds.all_builds(tuple(args.arch), args.group, args.case), args.jobs, args.cache))
    complaints = [complaint for build in found for complaint in gate.broken_rules(build)]
    for group in args.group:
        file = gate.baseline_file(triton.__version__, group)
        part = [build for build in found if build["group"] == group]
        arches = tuple(f"sm_{arch}" for arch in args.arch)
        known = {name: row for name, row in gate.load(file).items() if name.endswith(arches)}
        known = {name: row for name, row in known.items() if re.search(args.case, name.split(" | ")[0])}
        grown = [complaint for build in part for complaint in gate.growth(build, known)]
        for line in gate.diff(part, known):
            print(line)
        print(f"{group}, Triton {triton.__version__}: {len(part)} builds, {len(grown)} complaints about growth")
        if args.update:
            gate.save(file, part)
            print(f"written: {file}")
        else:
            complaints += grown
            complaints += [
                f"{name}: no longer built" for name in known.keys() - {gate.name_of(build) for build in part}
            ]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
