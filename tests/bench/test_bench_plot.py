"""Figures in the README are those of the results, and nothing outside the markers moves."""

from __future__ import annotations

import pytest

from bench import measure, plot
from bench.harness import results

README = "# Title\n<!-- bench:prefill-cpu -->\n{}<!-- /bench -->\nbench:prefill-cpu stays <!-- a comment -->\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of a real, tiny run."""
    folder = tmp_path_factory.mktemp("results")
    file = folder / "cpu-x" / "2026-01-02.json"
    ops = ["score_tokens", "gather_rows", "select_tokens", "prune_sequence"]
    args = ["--device", "cpu", "--smoke", "--shape", "odd", "--dtype", "float32", "--file", str(file)]
    assert measure.main([*args, "--op", *ops]) == 0
    return folder


@pytest.mark.slow
def test_tables_are_put_between_the_markers_and_check_notices_stale_ones(folder, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README.format("STALE\n"))
    args = ["--results", str(folder), "--document", str(readme)]
    assert plot.main([*args, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert plot.main(args) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n<!-- bench:prefill-cpu -->\n")
    assert text.endswith("<!-- /bench -->\nbench:prefill-cpu stays <!-- a comment -->\n")
    assert "STALE" not in text
    ours = results.load(folder / "cpu-x" / "2026-01-02.json")["cases"]
    score = next(case for key, case in ours.items() if key.startswith("score_tokens"))
    assert f"| odd | float32 | {plot.tables.digits(results.time_us(score['variants']['ours']) / 1e3)} |" in text
    assert plot.main([*args, "--check"]) == 0


def test_the_newest_day_of_a_kind_wins(folder, tmp_path):
    for name in ("cpu-a/2026-03-01.json", "cpu-b/2026-03-02.json", "gpu-a/2026-02-01.json"):
        results.save(tmp_path / name, results.EMPTY)
    assert results.newest(tmp_path, "cpu") == tmp_path / "cpu-b/2026-03-02.json"
    assert results.newest(tmp_path, "gpu") == tmp_path / "gpu-a/2026-02-01.json"
    assert results.newest(folder, "gpu") is None


def test_an_unknown_marker_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bench:speed is unknown"):
        plot.table("speed", tmp_path)


def test_roofline_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    content = results.load(folder / "cpu-x" / "2026-01-02.json")
    assert plot.roofline(content, tmp_path / "roofline.png").stat().st_size > 10_000


def test_a_case_that_failed_has_no_row():
    content = {"runs": [], "parts": {}, "cases": {"score_tokens/odd/float32@1": {"error": "WrongAnswer", "run": 0}}}
    assert plot.tables.blocks(content) == "Nothing measured yet."
