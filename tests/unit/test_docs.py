"""The code in docs/ runs, top to bottom, and prints what the page shows."""

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest

from jaxprune.rules import registry

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "adapters.md", "artefacts.md", "experts.md", "hugging_face.md", "quantization.md",
    "recover.md", "stream.md", "write_a_rule.md",
]  # fmt: skip
# Other pages need what tests need.
NEEDS = {"hugging_face.md": "transformers", "quantization.md": "qwix"}


@pytest.fixture(autouse=True)
def table():
    before = dict(registry.RULES)
    yield
    registry.RULES.clear()
    registry.RULES.update(before)


def blocks(page):
    """(line, code, what it prints or None); what needs torch is left out where that is not here."""
    text = (DOCS / page).read_text()
    if not importlib.util.find_spec("torchax"):
        text = text.replace("<!-- torch -->\n```python", "<!-- torch -->\n```")
    for found in re.finditer(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.S):
        yield text[: found.start()].count("\n") + 2, found[1], found[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # in qwix
@pytest.mark.parametrize("page", PAGES)
def test_code_prints_what_the_page_shows(page):
    if page in NEEDS:
        warnings.simplefilter("ignore")  # Flax models of transformers are deprecated.
        pytest.importorskip(NEEDS[page])
    names, seen = {}, 0
    for line, code, shown in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), names)
        if shown is not None:
            assert printed.getvalue() == shown
        seen += 1
    assert seen


@pytest.mark.slow
def test_readme_s_first_example_ends_small_and_accurate(tmp_path, monkeypatch, capsys):
    """It is run as it stands there."""
    pytest.importorskip("flax.nnx")
    monkeypatch.chdir(tmp_path)
    text = (DOCS.parent / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert (tmp_path / "small").exists()
    accuracy, small = names["accuracy"], names["module"]
    assert accuracy(small) > accuracy(names["net"]) - 0.05
    assert isinstance(small, names["Net"])
    assert names["tuned"].recovery.removed > 0.2
