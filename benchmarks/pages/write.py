"""Which file holds which table, and how it gets there."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import results
from benchmarks.pages import engines, facts, readme, study

ROOT = results.ROOT
RESULTS = ROOT / "docs" / "results"
APPLICATIONS = (
    "text", "images", "thresholds", "peers", "self_supervision", "effects", "effects_units",
    "whisper",
)  # fmt: skip
# file -> name of a part -> what writes it, from the folder that links start in
PARTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"tasks": readme.tasks, "example": readme.example},
    "docs/index.md": {"tasks": readme.tasks},
    "docs/applications.md": {name: functools.partial(study.newest, name) for name in APPLICATIONS},
    "docs/runtimes.md": {"engines": engines.fastest, "searched": engines.searched},
    "docs/results/index.md": {"studies": facts.index},
    "docs/reviewing.md": {
        "claims": facts.claims,
        "versions": facts.versions,
        "correctness": facts.correctness,
    },
}


def marks(name: str) -> tuple[str, str]:
    """Returns the two lines that a part stands between."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put(text: str, name: str, part: str) -> str:
    """Returns the text with a part anew.

    Raises:
      ValueError: for a text without the two marks, each of them once.
    """
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"wanted {begin} and {end} once each; add both lines to the page")
    pattern = re.escape(begin) + ".*" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n{part}\n{end}", text, flags=re.S)


def pages() -> dict[Path, str]:
    """Returns each file with the text that it should have, those of new studies among them."""
    found = {}
    for name, parts in PARTS.items():
        path = ROOT / name
        text = path.read_text()
        for part, written in parts.items():
            text = put(text, part, written(path.parent))
        found[path] = text
    for name in facts.STUDIES:
        path = RESULTS / f"{name}.md"
        text = path.read_text() if path.exists() else study.skeleton(name)
        found[path] = put(text, "measured", study.measured(name, path.parent))
    return found
