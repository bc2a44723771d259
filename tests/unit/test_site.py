"""What the site is made by: links of pages, dead links, pictures, stars in docstrings."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded(path):
    """A module of the site, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


outside = loaded(ROOT / "docs" / "_ext" / "outside.py")
links = loaded(ROOT / ".ci" / "links.py")
gallery = loaded(ROOT / "docs" / "_ext" / "gallery.py")
pictures = loaded(ROOT / "docs" / "pictures.py")


@pytest.mark.parametrize(
    "folder, text, wanted",
    [
        ("docs", "[x](compaction.md#a)", "[x](compaction.md#a)"),
        ("docs", "[x](../LICENSE)", "[x](https://host/blob/main/LICENSE)"),
        ("docs/results", "[x](../../benchmarks)", "[x](https://host/tree/main/benchmarks)"),
        ("docs", "see [x](../CONTRIBUTING.md) and [y](../LICENSE)",
         "see [x](/contributing.md) and [y](https://host/blob/main/LICENSE)"),
        (".", "[x](docs/write_a_rule.md)", "[x](/write_a_rule.md)"),
        ("docs", "[x](https://example.org/a)", "[x](https://example.org/a)"),
        ("docs", "![x](../benchmarks/y.png)", "![x](../benchmarks/y.png)"),
        ("docs", "a[1](g)\n```\nb[0](g.h)\n```\n", "a[1](g)\n```\nb[0](g.h)\n```\n"),
    ],
)  # fmt: skip
def test_links_lead_to_the_repository_or_to_the_page_that_shows_a_file(folder, text, wanted):
    assert outside.rewritten(text, (ROOT / folder).resolve(), "https://host") == wanted


def test_a_link_to_a_file_that_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"links to nothing\.md, which is not there"):
        outside.rewritten("[x](../nothing.md)", ROOT / "docs", "https://host")


def test_dead_links_within_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="https://x.org">2</a>')
    (tmp_path / "b.html").write_text(
        '<p id="here"></p><a href="a.html#gone">3</a><img src="no.png"><a href="#here">4</a>'
    )
    found = [(path.name, link) for path, link in links.dead(tmp_path)]
    assert found == [("b.html", "a.html#gone"), ("b.html", "no.png")]


def test_the_picture_of_the_way_shows_the_committed_times():
    for path, drawn in pictures.draw().items():
        assert path.read_text() == drawn, "run python docs/pictures.py"


def test_a_thumbnail_is_the_last_picture_of_a_notebook(tmp_path):
    cells = [{"outputs": [{"data": {"image/png": ["QUFB\n"]}}]}, {"outputs": [{"data": {}}]}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "in" / "2.ipynb").write_text(json.dumps({"cells": [{}]}))
    gallery.write(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.glob("out/*.ipynb")} == {"1.ipynb", "2.ipynb"}
    (drawn,) = (tmp_path / "out" / "thumbnails").iterdir()
    assert drawn.name == "1.png" and drawn.read_bytes() == b"AAA"


def test_stars_before_arguments_are_no_emphasis():
    star = loaded(ROOT / "docs" / "_ext" / "names.py").STAR
    assert star.sub(r"\\*", "fn, params, *args: as for") == r"fn, params, \*args: as for"
    assert star.sub(r"\\*", "a * b, ``*args``, **options, *a* word") == (
        "a * b, ``*args``, **options, *a* word"
    )
