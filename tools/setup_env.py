"""Create or update a virtual environment for this repository.

    python3 tools/setup_env.py .venv                           # the recorded versions
    python3 tools/setup_env.py .venv-5.17 5.17                 # those of .venv, and an older transformers on top
    python3 tools/setup_env.py .venv-peer-kvpress peer-kvpress   # those of .venv, and another implementation on top
    python3 tools/setup_env.py .venv-next newest               # the newest of everything
    python3 tools/setup_env.py .venv-record newest torch==2.13.0   # the same, beside a given torch
    python3 tools/setup_env.py .venv-docs docs                 # what builds the documentation, without torch
    python3 tools/setup_env.py .venv-record-docs newest-docs   # the newest of that

The record is `tools/constraints.txt`, see `recorded.py`. On most machines torch goes in first and by itself, so that
the build pip is configured to find (a CPU build, say) stays; then the package, editable, with its dev and plot extras.
Where python3 already has a torch that sees a CUDA device, the environment shows through to that python's packages, and
its torch, triton and transformers stay as they are. ``--has-cuda`` installs nothing and answers the question by exit
code.
"""

import re
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import recorded
import uv_pip

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / ".venv"
MACHINE_PACKAGES = ("torch", "triton", "transformers")
UPGRADE = ("--upgrade", "--upgrade-strategy", "eager")


def main(args):
    if sys.version_info < (3, 11):  # noqa: UP036, an older python3 is what this line is for
        sys.exit(f"setup_env: Python 3.11 or newer is needed, found {sys.version.split()[0]} ({sys.executable})")
    if args == ["--has-cuda"]:
        sys.exit(0 if has_cuda_torch() else 1)
    if not args:
        sys.exit("setup_env: name the environment to create, for example .venv")
    env, versions, requirements = ROOT / args[0], args[1] if args[1:] else "recorded", args[2:]
    try:
        if versions == "recorded":
            install_recorded(env)
        elif versions == "newest":
            install_newest(env, requirements or ["torch"])
        elif versions in ("docs", "newest-docs"):
            install_docs(env, recorded.read(recorded.DOCS) if versions == "docs" else None)
        elif versions.startswith("peer-"):
            # complete, so nothing is looked for; and what a peer requires and does not need stays out
            install_over_base(env, recorded.peer_file(versions.removeprefix("peer-")), "--no-deps")
        else:
            install_over_base(env, recorded.older_file(versions))
    except recorded.UnreadableRecordError as error:
        sys.exit(f"setup_env: {error}")


def install_recorded(env):
    versions = recorded.read(recorded.CONSTRAINTS)
    if make(env):
        install_over_machine(env, versions, MACHINE_PACKAGES)
        return
    without_triton = {name: version for name, version in versions.items() if name != "triton"}
    # setuptools builds the package below: outside of pip's isolation, which would fetch the newest
    pip(env, *constraints(env, without_triton), "torch", "setuptools")
    brings_triton = subprocess.run([env / "bin" / "python", "-c", BRINGS_TRITON], cwd=ROOT).returncode == 0
    held = constraints(env, without_triton if brings_triton else versions)
    pip(env, *held, "--no-build-isolation", "--editable", ".[dev,plot]")


# a CUDA torch requires one version of triton, a CPU torch none
BRINGS_TRITON = """\
from importlib import metadata
raise SystemExit(not any(requirement.startswith("triton") for requirement in metadata.requires("torch") or ()))
"""


def install_newest(env, torch):
    if make(env):
        install_over_machine(env, {}, ("torch", "triton"), *UPGRADE)
        return
    pip(env, *UPGRADE, *torch)
    # again beside the rest, whose upgrades would otherwise take along a torch that was asked for by version
    pip(env, *UPGRADE, "--editable", ".[dev,plot]", *torch)


def install_docs(env, versions):
    """What builds the documentation, and nothing else: the package is read as text, so it is not installed."""
    import tomllib

    if not works(env):
        create(env, over_machine=False)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    held = UPGRADE if versions is None else constraints(env, versions)
    pip(env, *held, *project["optional-dependencies"]["docs"])


def install_over_base(env, file, *flags):
    """Another transformers, a peer, over the packages of .venv: everything else shows through."""
    recorded.read(file)
    base = BASE / "bin" / "python"
    if not works(env):
        step(f"new environment over {BASE.name}", env)
        run([base, "-m", "venv", "--clear", "--without-pip", env], "python -m venv failed")
        command = [base, "-c", "import site; print(*site.getsitepackages(), sep='\\n')"]
        folders = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        # addsitedir reads the .pth files there too: those of the machine and of the editable package
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (packages(env) / "base.pth").write_text("".join(lines))
    pip(env, *flags, "--requirement", str(file.relative_to(ROOT)))


def has_cuda_torch():
    """Whether this python, unless it is one of our own environments, imports a torch that sees a CUDA device."""
    if Path(sys.prefix).is_relative_to(ROOT):
        return False
    probe = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def works(env):
    """Whether the environment is there and its python still runs; a half-made or outdated one is made afresh."""
    python = env / "bin" / "python"
    return python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make(env):
    """Make the environment if it is not there; whether it shows through to the packages of a CUDA machine."""
    if not works(env):
        create(env, over_machine=has_cuda_torch())
    return "include-system-site-packages = true" in (env / "pyvenv.cfg").read_text()


def create(env, over_machine):
    flags = ["--system-site-packages"] if over_machine else []
    step(f"new environment{' over the CUDA torch of ' + sys.executable if over_machine else ''}", env)
    command = [sys.executable, "-m", "venv", "--clear", *flags, env]
    run(command, "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)")
    if over_machine and sys.prefix != sys.base_prefix:
        # python3 is itself a virtual environment, and a second one would show through to the base python only
        (packages(env) / "machine.pth").write_text("\n".join(site.getsitepackages()))


def packages(env):
    return next(env.glob("lib/python3*/site-packages"))


def install_over_machine(env, versions, held, *flags):
    """Install what the project needs beside a CUDA torch: ``held`` stay as they are, what is not there comes as in
    ``versions``."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    machine = machine_packages()
    for package in set(held) - set(machine):
        print(f"setup_env: {package} is not installed beside this machine's torch and is left out", file=sys.stderr)
    wanted = [r for r in project["dependencies"] + extras["dev"] + extras["plot"] if name_of(r) not in held]
    new = {name: version for name, version in versions.items() if name not in (*machine, *held)}
    found = {name: version for name, version in machine.items() if name in held}
    pip(env, *constraints(env, new | found), *flags, *wanted)
    pip(env, "--no-deps", "--editable", ".")


def machine_packages():
    """Versions of what this python has, by canonical name."""
    return {recorded.canonical(found.name): found.version for found in metadata.distributions()}


def name_of(requirement):
    return recorded.canonical(re.match(r"[A-Za-z0-9._-]+", requirement)[0])


def constraints(env, versions):
    """Options that make pip install these versions and no others of these packages."""
    file = env / "constraints.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    return "--constraint", str(file.relative_to(ROOT))


def pip(env, *args):
    """Install. Recorded versions come by uv where it can be had; whatever it fails at, pip does again."""
    faster = uv_pip.command(env) if "--constraint" in args else None
    if faster is not None:
        step("uv pip install " + " ".join(args), env)
        if subprocess.run([*faster, *args], cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0:
            return
    step("pip install " + " ".join(args), env)
    run(
        [env / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *args],
        "pip failed, for the reason above",
    )


def step(text, env):
    print(f"{env.name}: {text}", flush=True)


def run(command, failure):
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"setup_env: {failure}")


if __name__ == "__main__":
    main(sys.argv[1:])
