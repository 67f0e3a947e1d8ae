"""One room knows transformers: nobody else imports it or spells the names that its releases may change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asymvlm
from asymvlm.hf import arguments

ROOT = Path(asymvlm.__file__).parent
# the room itself, the families, the applications on top, and the checks that must not lean on what they check
FREE = ("hf", "models", "cli", "verification", "app")
NAMES = {*arguments.PROMPT, *arguments.CACHE_NAMES, arguments.USE_CACHE, "cache_position"} - {arguments.CACHE}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in FREE]


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "transformers" for name in node.names):
            yield f"line {node.lineno} imports transformers"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            yield f"line {node.lineno} imports from {node.module}"
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            yield f"line {node.lineno} spells {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in arguments.CACHE_NAMES[1:]:
            yield f"line {node.lineno} reads .{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in arguments.CACHE_NAMES[1:]:
            yield f"line {node.value.lineno} passes {node.arg}="


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outside_the_room_knows_transformers(path: Path) -> None:
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import transformers.cache_utils",
        "from transformers import Cache",
        "kwargs.get('attention_mask')",
        "output.past_key_values",
        "model(past_key_values=cache)",
    ],
)
def test_an_offence_is_found(source: str) -> None:
    assert len(list(offences(source))) == 1


def test_files_are_looked_at() -> None:
    assert {"patch.py", "forward.py", "shorten.py"} <= {path.name for path in FILES}
