"""The tables of methods: what the documents show, and that families are served, or refused, as the tables say."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import make_batch

import asymvlm
from asymvlm import CacheLimit, TextEviction, UniformBudget, VisionPruning
from asymvlm.hf.windows import sliding_window
from asymvlm.methods import (
    BeforeMethod,
    CachedMethod,
    DuoAttention,
    InsideMethod,
    StageBudget,
    available_methods,
    find_method,
)
from asymvlm.methods.registry import OURS
from asymvlm.methods.table import markdown, rows, why_not
from asymvlm.models import adapter_for
from asymvlm_cli import main

# one method for each thing that a family may lack
NEEDS = ("vispruner", "dedup", "fastv", "sparsevlm", "attention", "h2o")


def use(model, inputs, name: str) -> None:
    """One call that the method decides in."""
    kind = next(kind for kind in OURS if kind.name == name)
    if issubclass(kind, CachedMethod):
        settings = (
            {"text": TextEviction(1, 1.0, method=name)}
            if name == "attention"
            else {"cache": CacheLimit(name, tokens=24)}
        )
        with asymvlm.patch(model, **settings):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        return
    one_stage = StageBudget.shares((1,), (0.5,))
    method = kind(one_stage) if name == "sparsevlm" else kind(1, 0.5) if name == "fastv" else name
    budget = {} if issubclass(kind, InsideMethod) else {"budget": UniformBudget(0.5)}
    with torch.no_grad(), asymvlm.patch(model, vision=VisionPruning(method=method, **budget)):
        model(**inputs)


@pytest.mark.every_family
def test_families_are_served_as_the_table_says(family, model):
    inputs = make_batch(family, "single")
    for name in NEEDS:
        if not why_not(next(kind for kind in OURS if kind.name == name), adapter_for(model)):
            windows = name == "sparsevlm" and sliding_window(model.config.get_text_config())  # of a checkpoint
            with pytest.raises(NotImplementedError, match="windows") if windows else contextlib.nullcontext():
                use(model, inputs, name)
            continue
        with pytest.raises(NotImplementedError):
            use(model, inputs, name)


def test_every_method_is_in_the_table_with_its_paper():
    found = {row.name: row for row in rows()}
    assert list(found) == [kind.name for kind in OURS]
    assert set(found) <= set(available_methods(BeforeMethod, InsideMethod, CachedMethod))
    assert found["h2o"].paper == "arXiv:2306.14048"
    assert found["h2o"].settings == "CacheLimit" or "TextEviction" in found["h2o"].settings
    assert "a question" in found["cdpruner"].needs
    assert "llava" in found["vispruner"].families
    assert "llama4" not in found["tova"].families
    for kind in OURS:
        made = DuoAttention(retrieval=((True,),)) if kind is DuoAttention else kind()
        assert find_method(made, BeforeMethod, InsideMethod, CachedMethod).name == kind.name


def test_the_page_has_the_tables():
    root = Path(__file__).parents[3]
    assert f"[{len(OURS)} of them](docs/methods.md)" in (root / "README.md").read_text(encoding="utf-8")
    page = (root / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == markdown(), "run `python -m asymvlm.methods` and paste its output"


def test_the_command_prints_them(capsys):
    assert main(["methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["methods"]] == [kind.name for kind in OURS]
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert "vispruner" in text.replace("\n", "")
    assert "of other packages: none" in text
