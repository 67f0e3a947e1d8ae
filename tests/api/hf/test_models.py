"""Which families are known: one table for README, the adapters and these tests; adapters of third parties."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_kept_logits, uniform
from families import FAMILIES, NAMES
from masked_reference import masked_forward, select
from tiny import TEXT, build, make_batch

import asymvlm
from asymvlm import models
from asymvlm.models import table

ROOT = Path(__file__).parents[3]


def test_every_family_is_tested_and_in_the_table():
    known = [module.ADAPTER.model_type for module in models.FAMILIES]
    assert known == list(NAMES)
    assert list(table.FACTS) == known
    assert set(known) <= set(asymvlm.supported_models())
    tested = {name: family.config(dict(TEXT)).model_type for name, family in FAMILIES.items()}
    assert tested == {name: name for name in NAMES}


def test_what_is_skipped_as_broken_is_broken_without_a_patch():
    for name in (name for name, family in FAMILIES.items() if family.broken):
        with pytest.raises(AttributeError):
            build(name)(**make_batch(name, "single"))


def test_video_is_claimed_where_it_is_tested():
    claimed = {cells[1].strip("`") for cells in table.rows() if "video" in cells[2]}
    assert claimed == {name for name, family in FAMILIES.items() if family.video is not None}


def test_readme_has_the_table(capsys):
    runpy.run_module("asymvlm.models", run_name="__main__")
    assert capsys.readouterr().out == table.markdown() + "\n"
    readme = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    blocks = re.findall(r"<!-- models -->\n(.*?)\n<!-- /models -->", readme, re.DOTALL)
    assert blocks in ([], [table.markdown()]), "run `python -m asymvlm.models` and paste its output"


def test_every_adapter_has_a_docstring_and_says_what_is_per_token():
    for module in models.FAMILIES:
        assert module.__doc__, module.__name__
        assert module.ADAPTER.per_token["labels"] == -100


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(from asymvlm\.models\.adapter.*?)```", CONTRIBUTING, re.DOTALL)


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that ships the example of CONTRIBUTING.md and announces it."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert EXAMPLE is not None
    (package / "adapter.py").write_text(EXAMPLE[1])
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[asymvlm.adapters]\nmy_vlm = my_package.adapter:ADAPTER\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_package.adapter", "my_package"):
        sys.modules.pop(name, None)


def test_the_adapter_of_contributing_is_found_and_prunes(third_party, monkeypatch):
    assert "my_vlm" in asymvlm.supported_models()
    model = build("llava")
    inputs = make_batch("llava", "left_padded")
    selection = select(model, inputs, 0.5)
    expected = masked_forward(model, inputs, selection.keep)
    monkeypatch.setattr(type(model.config), "model_type", "my_vlm")
    with torch.no_grad(), asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model(**inputs).logits
    assert handle.adapter.model_type == "my_vlm"
    assert handle.last.image_grids == [[(4, 4)], [(4, 4)], [(4, 4), (4, 4)]]
    assert torch.equal(handle.last.index, selection.index)
    assert_kept_logits(found, expected, selection)


def test_without_the_package_it_is_unknown():
    assert "my_vlm" not in asymvlm.supported_models()
