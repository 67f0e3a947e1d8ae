"""Modules that moved when the package was sorted into rooms are found by the names they had."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from asymvlm.old_names import MOVED


@pytest.mark.parametrize("old, new", MOVED.items())
def test_an_old_module_hands_on_what_the_new_one_has(old, new):
    there = importlib.import_module(f"asymvlm.{new}")
    public = [name for name in vars(there) if not name.startswith("_")]
    with pytest.warns(DeprecationWarning, match=f"moved to asymvlm.{new}"):
        found = getattr(importlib.import_module(f"asymvlm.{old}"), public[0])
    assert found is getattr(there, public[0])


def test_names_of_a_module_that_was_divided_are_found_where_each_is():
    with pytest.warns(DeprecationWarning, match="moved to") as told:
        from asymvlm.policies import TextEviction, VisionPruning
    assert (TextEviction.__module__, VisionPruning.__module__) == (
        "asymvlm.settings.eviction",
        "asymvlm.settings.policies",
    )
    assert {str(one.message).rpartition(" ")[2] for one in told} >= {
        "asymvlm.settings.eviction.TextEviction",
        "asymvlm.settings.policies.VisionPruning",
    }


@pytest.mark.parametrize("name", ["cache.CacheStats", "prompt.prune_inputs", "report.PruningReport"])
def test_names_of_a_module_that_became_a_folder_are_found_in_it(name):
    module, _, name = name.partition(".")
    with pytest.warns(DeprecationWarning, match="moved to"):
        assert getattr(importlib.import_module(f"asymvlm.{module}"), name).__name__ == name


def test_a_module_of_the_folder_is_not_taken_for_a_name_in_it():
    code = "from asymvlm.prompt import shorten; assert shorten.__name__ == 'asymvlm.prompt.shorten'"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code], check=True)


def test_what_nobody_has_is_an_error():
    with pytest.raises(ImportError, match=r"asymvlm\.policies"):
        from asymvlm.policies import Nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"asymvlm\.nothing"):
        importlib.import_module("asymvlm.nothing")
