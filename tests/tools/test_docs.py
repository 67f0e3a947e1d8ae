"""The documents hold together: links, code that is quoted, figures that are repeated, names that are described."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import recorded
import setup_env

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^[ ]*```.*?^[ ]*```", re.DOTALL | re.MULTILINE)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def anchors(file: Path) -> set[str]:
    """Of headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", file.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_what_builds_the_documentation_is_recorded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {recorded.canonical(re.match(r"[\w.-]+", name)[0]) for name in project["optional-dependencies"]["docs"]}  # type: ignore[index]
    assert names <= recorded.read(recorded.DOCS).keys()


def test_the_environment_of_the_documentation_has_neither_the_package_nor_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(setup_env, "pip", lambda env, *args: asked.extend(args))
    monkeypatch.setattr(setup_env, "works", lambda env: True)
    monkeypatch.setattr(setup_env, "constraints", lambda env, versions: ("--constraint", str(len(versions))))
    setup_env.main([str(tmp_path / "env"), "docs"])
    assert asked[:2] == ["--constraint", str(len(recorded.read(recorded.DOCS)))]
    assert {setup_env.name_of(requirement) for requirement in asked[2:]} >= {"mkdocs-material", "mkdocstrings"}
    assert not [requirement for requirement in asked[2:] if requirement.startswith((".", "-", "torch"))]


def code_of(example: str) -> str:
    """An example without its docstring."""
    return (ROOT / "examples" / example).read_text(encoding="utf-8").split('"""', 2)[2].strip()


def test_the_quick_start_is_the_example() -> None:
    blocks = re.findall(r"```python\n(.*?)\n```", README, re.DOTALL)
    assert blocks[0] == code_of("quickstart.py")


@pytest.mark.slow
@pytest.mark.parametrize("example", ["quickstart.py", "dialogue.py", "methods.py"])
def test_examples_run_and_print_what_the_documents_say(example: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([".", "python_api"])}
    command = [sys.executable, f"examples/{example}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if example == "methods.py":
        assert done.stdout.count("evicted") == 5
        return
    told = README if example == "quickstart.py" else (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for line in done.stdout.splitlines():
        assert line in told


def test_the_kernels_page_runs() -> None:
    page = (ROOT / "docs" / "api" / "kernels.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    assert names["kept"].shape == (2, 72, 96)  # type: ignore[attr-defined]


def test_the_adapter_of_the_documents_is_the_one_that_is_tested() -> None:
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "docs/extending.md")]
    blocks = [re.search(r"```python\n(from asymvlm\.models\.adapter.*?)```", page, re.DOTALL) for page in pages]
    assert None not in blocks
    assert len({block[1] for block in blocks if block}) == 1


def rows(text: str) -> list[tuple[str, list[str]]]:
    """First cells and numbers of the rows of all tables."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return [(line[0], [cell for cell in line[1:] if re.match(r"[\d.]+( ± [\d.]+)?$", cell)]) for line in lines]


def test_results_that_the_readme_repeats_are_those_of_the_measurements() -> None:
    part = README[README.index("## Results") : README.index("## Limits")]
    repeated = [(name, cells) for name, cells in rows(part) if cells]
    assert len(repeated) == 19
    measured = rows((ROOT / "docs" / "measurements.md").read_text(encoding="utf-8"))
    for name, cells in repeated:
        name = name.replace("learned", "learned (default)")
        assert any(name == other and set(cells) <= set(found) for other, found in measured), (name, cells)


def described() -> set[str]:
    pages = [file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "api").glob("*.md")]
    return set(re.findall(r"^::: ([\w.]+)", "\n".join(pages), re.MULTILINE))


@pytest.mark.parametrize("package", ["asymvlm", "asymvlm.methods", "asymvlm_kernels"])
def test_every_public_name_is_described_and_no_other(package: str) -> None:
    public = {f"{package}.{name}" for name in importlib.import_module(package).__all__ if name[0] != "_"}
    if package == "asymvlm_kernels":
        shared = {f"{package}.{name}" for name in importlib.import_module("asymvlm").__all__}
        public -= shared  # budgets and Spread, which asymvlm exports too
    assert public - described() == set()
    assert {name for name in described() if name.rpartition(".")[0] == package} - public == set()


def test_options_of_the_command_line_are_those_of_the_page() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "options.py"))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert script["written"](page) == page, "run `python docs/options.py`"


def test_fields_of_a_report_are_described() -> None:
    from asymvlm import CacheStats, PruningReport

    fields = re.findall(r'^ +"(\w+)": ', inspect.getsource(PruningReport.to_dict), re.MULTILINE)
    assert len(fields) > 15
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert {name for name in [*fields, *CacheStats.__dataclass_fields__] if f"`{name}`" not in page} == set()


def test_decisions_say_what_was_chosen_because_of_what_and_what_was_rejected() -> None:
    for file in (ROOT / "docs" / "decisions").glob("*.md"):
        for entry in re.split(r"^### ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            fields = re.findall(r"^- \*\*(\w+):\*\* \S", entry, re.MULTILINE)
            assert fields == ["Chosen", "Because", "Rejected"], f"{file.name}: {entry.splitlines()[0]}"
