"""The recorded versions: what a set-up installs today and in a year. `make record` writes them, setup_env.py reads.

tools/constraints.txt holds every package of one environment, tools/transformers-<minor>.txt what differs for an older
transformers, and tools/docs.txt the environment that builds the documentation. All are in pip's own format, one exact
version a line. tools/peers-<name>.txt, what other people's implementations need beside .venv, are written by
`make record-peers`, apart from the rest: another version of a peer is another result.

    python tools/recorded.py write .venv-record    # take the versions of this environment as the record
    python tools/recorded.py write-peers .venv     # what `PEERS` need beside it
    python tools/recorded.py write-docs .venv-record-docs
    python tools/recorded.py compare .venv-next    # which versions it has, and which differ from the record
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
CONSTRAINTS = TOOLS / "constraints.txt"
DOCS = TOOLS / "docs.txt"
PEERS = {
    "kvpress": ("kvpress==0.5.5", "transformers==5.2.*"),
    # optimum-intel exports Qwen2-VL with transformers up to 5.0
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "transformers==5.0.*"),
}
# What runs here of lmms-eval, which requires 51 packages by name and what these require: nothing else is looked for.
# Of filelock it needs an older one than the record.
ALONE = {
    "lmms-eval": (
        *("lmms-eval==0.7.3", "filelock<4", "datasets<6", "evaluate", "decord", "loguru", "tenacity", "sacrebleu"),
        *("scikit-learn", "joblib", "threadpoolctl", "scipy", "jsonlines", "pytablewriter", "attrs", "aiohttp"),
        *("aiohappyeyeballs", "aiosignal", "frozenlist", "multidict", "propcache", "yarl", "pyarrow", "dill<0.5"),
        *("multiprocess<0.70.20", "xxhash", "pandas<3", "pytz", "six", "requests", "charset-normalizer", "urllib3"),
        *("certifi", "portalocker", "tabulate", "colorama", "lxml"),
        *("dataproperty", "mbstrdecoder", "pathvalidate", "tabledata", "tcolorpy", "typepy", "chardet"),
    ),
}
# required and not needed, and package indexes have builds for a CUDA torch alone, which fail beside another
LEFT_OUT = ("torchvision",)
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.!]*)")
# pip comes with Python, the project is what is installed, and a CUDA torch pins the packages of its CUDA itself
NOT_RECORDED = re.compile(r"pip|asymvlm-kernels|(nvidia|cuda)-.*")
HEADER = """\
# {what}
# Recorded on {date}, Python {python}, {system}, by `make {target}`: not edited by hand.
"""


class UnreadableRecordError(Exception):
    """A record that cannot be read says where and why."""


def canonical(name):
    """One spelling of a package's name, as package indexes compare them: ``Jinja2`` and ``jinja2`` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def older_file(minor):
    """The file of what differs for an older transformers, ``"5.17"``."""
    return TOOLS / f"transformers-{minor}.txt"


def peer_file(name):
    """The file of what another implementation needs beside .venv, ``"kvpress"``."""
    return TOOLS / f"peers-{name}.txt"


def older_minors():
    """The older transformers that are recorded, oldest first."""
    minors = [file.stem.removeprefix("transformers-") for file in TOOLS.glob("transformers-*.txt")]
    return sorted(minors, key=lambda minor: [int(part) for part in minor.split(".")])


def read(file):
    """Versions by canonical name.

    Raises UnreadableRecordError: no such file, no package in it, or a line that is neither a comment nor one exact
    public version; ``2.13.0+cpu`` names a build that other machines do not find.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableRecordError(f"{file.name}: {error}; `make record` writes it") from error
    versions = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        pin = PIN.fullmatch(text)
        if pin is None:
            wanted = "one exact public version, as in `numpy==2.4.6`"
            raise UnreadableRecordError(f"{file.name}, line {number}: found `{text}`, wanted {wanted}")
        name = canonical(pin[1])
        if name in versions:
            raise UnreadableRecordError(f"{file.name}, line {number}: {name} for the second time")
        versions[name] = pin[2]
    if not versions:
        raise UnreadableRecordError(f"{file.name}: no package in it; `make record` writes it")
    return versions


def text_of(versions, what, target="record"):
    """The text of a record: header and one version a line, without the label of a local build (``+cpu``)."""
    system = f"{platform.system()} {platform.machine()}"
    python = ".".join(platform.python_version_tuple()[:2])
    header = HEADER.format(
        what=what, date=datetime.date.today().isoformat(), python=python, system=system, target=target
    )
    return header + "".join(f"{name}=={public(version)}\n" for name, version in sorted(versions.items()))


def public(version):
    return version.partition("+")[0]


def installed(python):
    """What an environment holds and a record would, by canonical name."""
    listed = json.loads(pip(python, "list", "--format=json"))
    versions = {canonical(package["name"]): package["version"] for package in listed}
    return {name: version for name, version in versions.items() if not NOT_RECORDED.fullmatch(name)}


def differing(python, requirements, versions, *flags):
    """What pip would change in an environment for these requirements; ``flags`` go to pip."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip(python, "install", "--dry-run", "--quiet", "--report", str(report), *flags, *requirements)
        changed = {
            canonical(item["metadata"]["name"]): item["metadata"]["version"]
            for item in json.loads(report.read_text())["install"]
        }
    return {name: version for name, version in changed.items() if versions.get(name) != version}


def pip(python, *args):
    command = [python, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    if done.returncode:
        sys.exit(f"recorded: pip {args[0]} failed in {python}, for the reason above")
    return done.stdout


def write(environment, minors):
    python = environment / "bin" / "python"
    if "include-system-site-packages = true" in (environment / "pyvenv.cfg").read_text():
        sys.exit(f"recorded: {environment} shows through to this machine's packages; record where no torch sees a GPU")
    versions = installed(python)
    files = {CONSTRAINTS: text_of(versions, "The versions that every set-up installs: constraints for pip.")}
    for minor in minors:
        what = f"What transformers {minor} needs besides constraints.txt, for `make test-{minor}`."
        files[older_file(minor)] = text_of(differing(python, [f"transformers=={minor}.*"], versions), what)
    for file, text in files.items():  # all of them, or none where pip failed
        file.write_text(text)
        print(f"written: {file.relative_to(TOOLS.parent)}")


def write_docs(environment):
    DOCS.write_text(
        text_of(installed(environment / "bin" / "python"), "What `make docs` installs: constraints for pip.")
    )
    print(f"written: {DOCS.relative_to(TOOLS.parent)}")


def write_peers(environment):
    python = environment / "bin" / "python"
    versions = installed(python)
    for name, requirements in PEERS.items():
        changed = differing(python, [*requirements, f"torch=={versions['torch']}"], versions)
        changed = {package: version for package, version in changed.items() if package not in LEFT_OUT}
        write_peer(name, changed, requirements, "make peers")
    for name, requirements in ALONE.items():
        write_peer(name, differing(python, requirements, versions, "--no-deps"), requirements, "make test-lmms")


def write_peer(name, versions, requirements, command):
    what = f"What {requirements[0].partition('==')[0]} needs besides constraints.txt, for `{command}`."
    peer_file(name).write_text(text_of(versions, what, "record-peers"))
    print(f"written: {peer_file(name).relative_to(TOOLS.parent)}")


def compare(found, known):
    """Lines that say which versions were met, and which of them are not those of the record."""
    met = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    new = {name: version for name, version in sorted(found.items()) if public(version) != known.get(name)}
    lines = [f"  {name} {version}, recorded: {known.get(name, 'not at all')}" for name, version in new.items()]
    return [f"versions met: {met}", f"{len(new)} of {len(found)} differ from the record", *lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "write-docs", "write-peers", "compare"))
    parser.add_argument("environment", type=Path)
    args = parser.parse_args()
    try:
        if args.action == "write":
            write(args.environment, older_minors())
        elif args.action == "write-docs":
            write_docs(args.environment)
        elif args.action == "write-peers":
            write_peers(args.environment)
        else:
            print("\n".join(compare(installed(args.environment / "bin" / "python"), read(CONSTRAINTS))))
    except UnreadableRecordError as error:
        sys.exit(f"recorded: {error}")


if __name__ == "__main__":
    main()
