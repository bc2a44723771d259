"""Links of pages to files outside of docs/: to the repository, or to the page that shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What has a page here, by its place in the repository.
PAGES = {"CONTRIBUTING.md": "contributing", "README.md": "index"}
LINK = re.compile(r"(?<!!)\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def rewritten(text: str, folder: Path, repository: str) -> str:
    """Returns a page's text whose links to files of the repository lead there."""

    def link(match: re.Match[str]) -> str:
        path = (folder / match["path"]).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT):
            return match[0]
        if not path.exists():
            raise FileNotFoundError(f"a page in {folder} links to {match['path']}, not there")
        where = path.relative_to(ROOT).as_posix()
        if where in PAGES:
            up = "../" * len(folder.relative_to(ROOT / "docs").parts)
            return f"]({up}{PAGES[where]}.md)"
        kind = "tree" if path.is_dir() else "blob"
        return f"]({repository}/{kind}/main/{where})"

    return LINK.sub(link, text)


def read(app: Any, docname: str, source: list[str]) -> None:
    folder = Path(app.env.doc2path(docname)).parent
    repository = app.config.html_theme_options["source_repository"]
    source[0] = rewritten(source[0], folder, repository)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
