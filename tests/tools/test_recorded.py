"""The recorded versions: what is read, what is refused, and that the files, pyproject.toml and the Makefile agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import recorded

ROOT = Path(__file__).parents[2]


def written(folder: Path, text: str) -> Path:
    file = folder / "constraints.txt"
    file.write_text(text)
    return file


def test_names_are_read_in_one_spelling(tmp_path):
    file = written(tmp_path, "# a header\n\nJinja2==3.1.6\ntyping_extensions==4.16.0\ncertifi==2026.10.19.post1\n")
    assert recorded.read(file) == {"jinja2": "3.1.6", "typing-extensions": "4.16.0", "certifi": "2026.10.19.post1"}


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.13.0+cpu",
        "numpy>=2",
        "numpy",
        "numpy==2.*",
        "numpy @ file:///tmp/numpy.whl",
        "--index-url https://x.org",
    ],
)
def test_a_line_that_is_not_one_public_version_is_refused(tmp_path, line):
    file = written(tmp_path, f"# a header\npillow==13.0.0\n{line}\n")
    with pytest.raises(recorded.UnreadableRecordError, match=re.escape(f"line 3: found `{line}`, wanted")):
        recorded.read(file)


def test_a_package_in_two_versions_is_refused(tmp_path):
    file = written(tmp_path, "Jinja2==3.1.6\njinja2==3.1.5\n")
    with pytest.raises(recorded.UnreadableRecordError, match="line 2: jinja2 for the second time"):
        recorded.read(file)


def test_a_missing_and_an_empty_record_are_refused(tmp_path):
    with pytest.raises(recorded.UnreadableRecordError, match="`make record` writes it"):
        recorded.read(tmp_path / "constraints.txt")
    with pytest.raises(recorded.UnreadableRecordError, match="no package in it"):
        recorded.read(written(tmp_path, "# a header\n"))


def test_what_is_written_is_read_again_without_local_labels(tmp_path):
    text = recorded.text_of({"torch": "2.13.0+cpu", "jinja2": "3.1.6"}, "Versions.")
    assert re.search(r"^# Recorded on \d{4}-\d\d-\d\d, Python 3\.\d+, ", text, re.MULTILINE)
    assert recorded.read(written(tmp_path, text)) == {"torch": "2.13.0", "jinja2": "3.1.6"}


def test_a_comparison_names_both_versions():
    found = {"torch": "2.13.0+cpu", "numpy": "2.5.0", "attrs": "26.1.0", "pillow": "13.0.0"}
    known = {"torch": "2.13.0", "numpy": "2.4.6", "pillow": "13.0.0"}
    met, count, *lines = recorded.compare(found, known)
    assert met == "versions met: attrs 26.1.0, numpy 2.5.0, pillow 13.0.0, torch 2.13.0+cpu"
    assert count == "2 of 4 differ from the record"
    assert lines == ["  attrs 26.1.0, recorded: not at all", "  numpy 2.5.0, recorded: 2.4.6"]


def test_an_environment_over_a_machine_is_not_recorded(tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    with pytest.raises(SystemExit, match="shows through to this machine's packages"):
        recorded.write(tmp_path, [])


def test_every_requirement_is_recorded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {
        recorded.canonical(re.match(r"[\w.-]+", requirement)[0])
        for requirement in project["dependencies"] + extras["dev"] + extras["plot"]
    }
    assert len(names) > 15
    assert names | {"setuptools"} <= recorded.read(recorded.CONSTRAINTS).keys()


def test_rows_of_transformers_are_those_of_the_makefile_and_the_oldest_is_the_floor():
    minors = recorded.older_minors()
    for minor in minors:
        assert recorded.read(recorded.older_file(minor))["transformers"].startswith(f"{minor}.")
    rows = re.search(r"^OLDER := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rows is not None
    assert rows[1].split() == minors
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers>={minors[0]},<6" in project["dependencies"]
    newest = recorded.read(recorded.CONSTRAINTS)["transformers"].rpartition(".")[0]
    versions = (ROOT / "python_api" / "asymvlm" / "hf" / "versions.py").read_text()
    tested = re.search(r"^TESTED = (.+)$", versions, re.MULTILINE)
    assert tested is not None
    assert re.findall(r'"(\d+\.\d+)"', tested[1]) == [*minors, newest]
