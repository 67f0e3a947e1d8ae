"""uv in place of pip where a package index serves it: the same packages, in a seventh of the processor time.

It goes into a folder of its own in the environment, so that no record holds it. It is told what pip is configured with,
of which it reads nothing itself; a configuration that it has no word for, or no wheel of it, leaves the work to pip.
"""

import ast
import subprocess

VERSION = "uv==0.13.9"
OPTIONS = ("index-url", "extra-index-url", "find-links")  # several values of one, with spaces between
# they choose no package; where uv fails for want of one, pip does the work
NO_MATTER = ("cert", "default-timeout", "timeout", "disable-pip-version-check", "no-input", "cache-dir", "progress-bar")


def command(env):
    """The beginning of a command that installs into ``env`` as ``pip install`` does, or None: use pip."""
    options = options_of(pip(env, "config", "list").stdout)
    if options is None or is_set_over_packages(env):
        return None
    program = env / "uv" / "bin" / "uv"
    if not program.exists() and pip(env, "install", "--quiet", "--target", env / "uv", VERSION).returncode:
        return None
    # of all indexes the best version counts, as for pip, whichever is named first
    flags = ["--quiet", "--python", env / "bin" / "python", "--index-strategy", "unsafe-best-match"]
    return [program, "pip", "install", *flags, *options]


def options_of(listed):
    """What ``pip config list`` prints, a ``scope.option='value'`` a line, as options of uv; None where it has none."""
    configured = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):  # pip's environment wins
        name, _, value = line.partition("=")
        configured[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    if not configured.keys() <= {*OPTIONS, *NO_MATTER}:
        return None
    return [word for name in OPTIONS for value in configured.get(name, "").split() for word in (f"--{name}", value)]


def is_set_over_packages(env):
    """Whether the environment shows through to other packages, which uv would not see and install again."""
    return "include-system-site-packages = true" in (env / "pyvenv.cfg").read_text()


def pip(env, *args):
    arguments = [env / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL)
