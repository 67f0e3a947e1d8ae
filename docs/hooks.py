"""What the site needs from outside docs/: the README is its first page, and links out of docs/ are followed.

A document is written for readers of the repository, so its links are paths in the repository. Here they become links of
the site where the target is on it; a link to any other file of the repository is an error of the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

logger = logging.getLogger("mkdocs.hooks.repository")
ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES["csrc/README.md"] = "csrc.md"
PICTURES = "bench/results/quality/*.png"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^[ ]*```.*?^[ ]*```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def _outside() -> dict[str, str]:
    """Paths in the repository -> paths on the site, of all that is not in docs/."""
    pictures = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(PICTURES)))
    return {**PAGES, **{path: path for path in pictures}}


def on_files(files: Files, config: Any) -> Files:
    for source, target in _outside().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    outside = _outside()
    here = page.file.src_uri
    source = next((path for path, target in outside.items() if target == here), f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith(("mailto:", "/")):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        on_site = outside.get(wanted, wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if on_site is None:
            logger.warning("%s links to %s, which is not on the site", source, wanted)
            return match[0]
        return f"{match[1]}{posixpath.relpath(on_site, posixpath.dirname(here) or '.')}{match[3]}"

    parts = FENCE.split(markdown)  # odd ones are code, where nothing is a link
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)
