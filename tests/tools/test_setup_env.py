"""Set-ups without a network: what is refused before anything is installed, and what pip is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import recorded
import setup_env
import uv_pip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What `setup_env.pip` is asked for: arguments, and the constraints in force."""
    calls = []

    def pip(env: Path, *args: str) -> None:
        limits = env / "constraints.txt" if "--constraint" in args else None
        calls.append(([*args], recorded.read(limits) if limits else {}))

    monkeypatch.setattr(setup_env, "pip", pip)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return calls


def environment(folder: Path, over_machine: bool) -> Path:
    """An environment that works, as far as its own files tell."""
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(over_machine).lower()}\n")
    return folder / "env"


@pytest.mark.parametrize("brings_triton", [True, False])
def test_torch_goes_in_first_and_its_triton_stays(asked, monkeypatch, tmp_path, brings_triton):
    env = environment(tmp_path, over_machine=False)
    (env / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(setup_env, "works", lambda env: True)
    monkeypatch.setattr(setup_env, "BRINGS_TRITON", f"raise SystemExit({not brings_triton})")
    setup_env.install_recorded(env)
    (first, limits), (second, final) = asked
    record = recorded.read(recorded.CONSTRAINTS)
    assert first[-2:] == ["torch", "setuptools"]
    assert limits == {name: version for name, version in record.items() if name != "triton"}
    assert second[-3:] == ["--no-build-isolation", "--editable", ".[dev,plot]"]
    assert final == (limits if brings_triton else record)


def test_packages_of_a_cuda_machine_stay_and_others_come_as_recorded(asked, monkeypatch, tmp_path):
    env = environment(tmp_path, over_machine=True)
    machine = {"torch": "2.11.0+cu130", "transformers": "5.19.0", "pillow": "12.0.0"}
    monkeypatch.setattr(setup_env, "works", lambda env: True)
    monkeypatch.setattr(setup_env, "machine_packages", lambda: machine)
    monkeypatch.setattr(recorded, "PIN", setup_env.re.compile(r"([\w.-]+)==(\S+)"))  # the machine's torch has a label
    setup_env.install_recorded(env)
    (wanted, limits), (own, _) = asked
    assert not {"torch", "triton", "transformers"} & {setup_env.name_of(r) for r in wanted if r[0] != "-"}
    assert (limits["torch"], limits["transformers"]) == ("2.11.0+cu130", "5.19.0")
    assert not {"pillow", "triton"} & limits.keys()  # an old pillow does, and no triton is forced on this torch
    assert limits["hypothesis"] == recorded.read(recorded.CONSTRAINTS)["hypothesis"]
    assert own == ["--no-deps", "--editable", "."]


@pytest.mark.parametrize(
    "text, sign", [("transformers>=5\n", "line 1: found `transformers>=5`"), (None, "No such file")]
)
def test_an_unreadable_record_ends_with_one_line_before_anything_is_made(monkeypatch, tmp_path, text, sign):
    monkeypatch.setattr(recorded, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(setup_env, "run", lambda *args: pytest.fail("something was started"))
    if text is not None:
        recorded.CONSTRAINTS.write_text(text)
    with pytest.raises(SystemExit, match=sign) as ended:
        setup_env.main([str(tmp_path / "env")])
    assert str(ended.value).startswith("setup_env: constraints.txt")
    assert not (tmp_path / "env").exists()


def test_a_peer_comes_as_recorded_and_brings_nothing_else(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, "works", lambda env: True)
    monkeypatch.setattr(recorded, "TOOLS", tmp_path / "tools")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "peers-kvpress.txt").write_text("kvpress==0.5.5\n")
    setup_env.main([".venv-peer-kvpress", "peer-kvpress"])
    assert asked == [(["--no-deps", "--requirement", "tools/peers-kvpress.txt"], {})]
    with pytest.raises(SystemExit, match=r"setup_env: peers-other\.txt: .*No such file"):
        setup_env.main([".venv-peer-other", "peer-other"])


def test_an_older_transformers_that_is_not_recorded_is_refused():
    command = [sys.executable, str(ROOT / "tools" / "setup_env.py"), ".venv-4.0", "4.0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "transformers-4.0.txt" in done.stderr
    assert not (ROOT / ".venv-4.0").exists()


@pytest.mark.parametrize(
    "listed, options",
    [
        ("", []),
        (
            "global.find-links='/a'\n:env:.find-links='/b /c'\n:env:.cert='x'",
            ["--find-links", "/b", "--find-links", "/c"],
        ),
        ("user.index-url='https://host/simple'", ["--index-url", "https://host/simple"]),
        ("global.no-binary=':all:'", None),
    ],
    ids=["nothing", "environment first and two of one", "index", "no word of uv"],
)
def test_uv_is_told_what_pip_is_configured_with_or_pip_is_used(listed, options):
    assert uv_pip.options_of(listed) == options


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_pip_does_again_what_uv_fails_at(monkeypatch, tmp_path, fails):
    started = []
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "run", lambda command, failure: started.append(command[1:4]))
    monkeypatch.setattr(uv_pip, "command", lambda env: [sys.executable, "-c", f"raise SystemExit({fails:d})"])
    setup_env.pip(tmp_path / "env", "--constraint", "constraints.txt", "torch")
    assert started == ([["-m", "pip", "install"]] if fails else [])
    started.clear()
    setup_env.pip(tmp_path / "env", "--editable", ".")  # the newest of everything, or over a machine's packages
    assert started == [["-m", "pip", "install"]]
