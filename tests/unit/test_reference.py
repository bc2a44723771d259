"""Every public name stands on a page of the reference, with a running example in its docstring."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import jaxprune as jp

PAGES = Path(__file__).parents[2] / "docs" / "reference"
LISTED = re.compile(r"^\.\. (?:autofunction|autoclass|py:data):: (\S+)$", re.M)
SPACES = (
    "budget", "distributions", "experts", "masks", "oneshot", "patterns", "plot", "recovery",
    "reduce", "runtimes", "sanity", "schedules", "scores", "scores.evidence", "training",
)  # fmt: skip
# These are made by functions that show them, or say all in one line.
WITHOUT_EXAMPLE = re.compile(
    r"^[A-Z_]|^(check_|left_out$|filled$|fits$|counts_of$|split$|watched$)"
)
INNER = {"check_batches", "examples", "split", "watched"}  # of evidence: steps of the others


def listed():
    return [
        name for page in sorted(PAGES.glob("*.md")) for name in LISTED.findall(page.read_text())
    ]


def resolved(name):
    """The object that a name of the reference means."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def ours(x):
    """Whether this package made an object, and not to help with names."""
    made = getattr(x, "__module__", "") or ""
    return made.startswith("jaxprune") and made != "jaxprune._renamed"


def public(space):
    """(name, object) of all that a namespace shows that is not a module."""
    module = importlib.import_module(f"jaxprune.{space}") if space else jp
    own = {
        name: x
        for name, x in vars(module).items()
        if not name.startswith("_") and callable(x) and ours(x)
    }
    if space in ("", "oneshot", "patterns", "plot", "runtimes", "scores", "training", "budget"):
        return own  # Packages export their names.
    return {n: x for n, x in own.items() if getattr(x, "__module__", "") == module.__name__}


def here(name):
    return not name.startswith("jaxprune.adapters.torch")


def test_each_name_of_the_reference_is_there_and_stands_once():
    names = listed()
    assert len(names) == len(set(names))
    for name in filter(here, names):
        assert resolved(name) is not None


@pytest.mark.parametrize("space", ["", *SPACES])
def test_every_public_name_is_in_the_reference(space):
    known = [resolved(name) for name in filter(here, listed())]
    missing = [
        name
        for name, x in public(space).items()
        if name not in INNER and not any(x is other for other in known)
    ]
    assert not missing, f"add them to a page in docs/reference: {space} {missing}"


@pytest.mark.parametrize("name", [n for n in listed() if here(n)])
def test_what_the_reference_shows_has_a_docstring_and_functions_an_example(name):
    found = resolved(name)
    if not callable(found):
        return
    doc = inspect.getdoc(found) or ""
    assert len(doc.partition("\n")[0]) > 10, f"{name}: {doc[:80]!r}"
    short = name.rsplit(".", 1)[1]
    if inspect.isfunction(found) and not WITHOUT_EXAMPLE.search(short):
        assert ">>>" in doc, f"{name} has no example"
