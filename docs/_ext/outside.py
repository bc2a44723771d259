"""Links of pages to files outside of docs/: to the repository, or to the page that shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What has a page here, by its place in the repository.
PAGES = {"CONTRIBUTING.md": "/contributing.md", "README.md": "/index.md"}
# A page that is a file outside.
SHOWN = {"contributing": ROOT / "CONTRIBUTING.md"}
LINK = re.compile(r"(?<!!)(\[[^\]]*\])\((?P<path>[^)#\s:]*[./][^)#\s:]*)(?P<anchor>#[^)]*)?\)")
CODE = re.compile(r"(^```.*?^```)", re.M | re.S)


def rewritten(text: str, folder: Path, repository: str) -> str:
    """Returns a page's text whose links to files of the repository lead there.

    Raises:
      FileNotFoundError: for a link to a file that is not there.
    """

    def link(match: re.Match[str]) -> str:
        path = (folder / match["path"]).resolve()
        if not path.is_relative_to(ROOT) or match["path"].startswith("/"):
            return match[0]
        where = path.relative_to(ROOT).as_posix()
        if not path.exists():
            raise FileNotFoundError(f"a page in {folder} links to {where}, which is not there")
        if path.is_relative_to(ROOT / "docs"):
            return match[0] if folder != ROOT else f"{match[1]}(/{where.removeprefix('docs/')})"
        if where in PAGES:
            return f"{match[1]}({PAGES[where]})"
        kind = "tree" if path.is_dir() else "blob"
        return f"{match[1]}({repository}/{kind}/main/{where})"

    parts = CODE.split(text)  # Every other one is code.
    return "".join(part if k % 2 else LINK.sub(link, part) for k, part in enumerate(parts))


def read(app: Any, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    if docname in SHOWN:
        page = SHOWN[docname]
        source[0] = page.read_text()
        app.env.note_dependency(str(page))
    repository = app.config.html_theme_options["source_repository"]
    source[0] = rewritten(source[0], page.parent, repository)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
