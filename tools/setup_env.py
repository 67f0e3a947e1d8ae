"""Create or update a virtual environment for this repository: ``python3 tools/setup_env.py .venv [requirement ...]``.

On most machines torch goes in first and by itself, so that the build pip is configured to find (a CPU build, say)
stays; then the package, editable, with its dev and plot extras. Where python3 already has a torch that sees a CUDA
device, the environment shows through to that python's packages, and its torch, triton and transformers stay as they
are. Extra requirements (``transformers==5.17.0``) win over both. ``--has-cuda`` installs nothing and answers the
question by exit code.
"""

import re
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
MACHINE_PACKAGES = ("torch", "triton", "transformers")


def main(args):
    if sys.version_info < (3, 11):  # noqa: UP036, an older python3 is what this line is for
        sys.exit(f"setup_env: Python 3.11 or newer is needed, found {sys.version.split()[0]} ({sys.executable})")
    if args == ["--has-cuda"]:
        sys.exit(0 if has_cuda_torch() else 1)
    if not args:
        sys.exit("setup_env: name the environment to create, for example .venv")
    env, pins = ROOT / args[0], args[1:]
    if not works(env):
        create(env, over_machine=has_cuda_torch())
    if "include-system-site-packages = true" in (env / "pyvenv.cfg").read_text():
        install_over_machine(env, pins)
    else:
        pip(env, TORCH)
        pip(env, "--editable", ".[dev,plot]", *pins)


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


def create(env, over_machine):
    flags = ["--system-site-packages"] if over_machine else []
    step(f"new environment{' over the CUDA torch of ' + sys.executable if over_machine else ''}", env)
    command = [sys.executable, "-m", "venv", "--clear", *flags, env]
    run(command, "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)")
    if over_machine and sys.prefix != sys.base_prefix:
        # python3 is itself a virtual environment, and a second one would show through to the base python only
        (next(env.glob("lib/python3*/site-packages")) / "machine.pth").write_text("\n".join(site.getsitepackages()))


def install_over_machine(env, pins):
    """Install what the project needs except the machine's packages, and hold those at the versions found."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [r for r in project["dependencies"] + extras["dev"] + extras["plot"] if name(r) not in MACHINE_PACKAGES]
    pinned = [name(pin) for pin in pins]
    held = env / "machine-constraints.txt"
    held.write_text("".join(f"{p}=={v}\n" for p, v in machine_versions().items() if p not in pinned))
    pip(env, "--constraint", str(held.relative_to(ROOT)), *wanted, *pins)
    pip(env, "--no-deps", "--editable", ".")


def machine_versions():
    versions = {}
    for package in MACHINE_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            print(f"setup_env: {package} is not installed beside this machine's torch and is left out", file=sys.stderr)
    return versions


def name(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower()


def pip(env, *args):
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
