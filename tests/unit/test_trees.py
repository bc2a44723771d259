"""How two trees differ: errors name a few leaves or one node, and never print a whole tree."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxprune._trees import WIDEST, difference
from jaxprune.typing import path_str


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    width: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_pytree_with_keys_class
class Plain:
    """A node that shows its static data nowhere."""

    __slots__ = ("inside", "told")

    def __init__(self, inside, told):
        self.inside, self.told = inside, told

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("inside"), self.inside),), self.told

    @classmethod
    def tree_unflatten(cls, told, children):
        return cls(*children, told)


KEYS = st.one_of(st.sampled_from("abcd"), st.text("xy/'", min_size=1, max_size=120))
TREES = st.recursive(
    st.sampled_from([0, None]),
    lambda kids: st.one_of(
        st.dictionaries(KEYS, kids, max_size=6),
        st.dictionaries(KEYS, kids, max_size=4).map(OrderedDict),
        st.lists(kids, max_size=5),
        st.lists(kids, max_size=5).map(tuple),
        st.builds(Pair, kids, kids),
        st.builds(Layer, kids, st.integers(0, 3)),
        st.builds(Plain, kids, KEYS),
    ),
    max_leaves=12,
)


@given(TREES, TREES)
def test_any_difference_is_told_in_few_words(got, wanted):
    text = difference(got, wanted)
    assert difference(jax.tree.structure(got), jax.tree.structure(wanted)) == text
    if jax.tree.structure(got) == jax.tree.structure(wanted):
        assert text == ""
        return
    assert text.startswith("has ") and len(text) < 600 and "PyTreeDef" not in text
    assert any(shown(path) in text for path in odd_paths(got, wanted)) or "at its root" in text


def odd_paths(got: Any, wanted: Any) -> list[str]:
    """The paths of all subtrees that only one has, or whose structures differ: the slow way."""
    mine, theirs = dict(subtrees((), got)), dict(subtrees((), wanted))
    structure = jax.tree.structure
    both = mine.keys() & theirs.keys()
    odd = [p for p in both if structure(mine[p]) != structure(theirs[p])]
    return [path_str(p) for p in [*odd, *(mine.keys() ^ theirs.keys())]]


def subtrees(path, node):
    yield path, node
    for key, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node):
        if key:
            yield from subtrees((*path, *key), child)


def shown(path: str) -> str:
    return repr(path if len(path) <= WIDEST else "..." + path[3 - WIDEST :])


@pytest.mark.parametrize(
    "got, wanted, text",
    [
        ({"a": 0}, {"a": 0, "b": 0}, "has no leaf 'b'"),
        ({}, dict.fromkeys("abcdef", 0), "has no leaf 'a' (nor 'b', 'c' and 3 more)"),
        ({"a": [0, 0]}, {"a": [0]}, "has an unknown leaf 'a/1'"),
        ({"b": 0}, {"a": 0}, "has no leaf 'a', and an unknown leaf 'b'"),
        ({"a": (0,)}, {"a": [0]}, "has a tuple at 'a' where a list is wanted"),
        (0, [0], "has a leaf at its root where a list is wanted"),
        ({"a": None}, {"a": {}}, "has None at 'a' where a dict is wanted"),
        ({"a": None, "b": 0}, {"b": 0}, "has an unknown key 'a' at its root (dict)"),
        ({1: 0}, {"1": 0}, "has no key '1', and an unknown key 1 at its root (dict)"),
        ([[0, None]], [[0]], "has 2 entries at '0', wanted 1"),
        ([Layer(0, 3)], [Layer(0, 4)], "has width=3 (wanted 4) at '0' (Layer)"),
        (Plain(0, "x"), Plain(0, "y"), "has the static data 'x' (wanted 'y') at its root (Plain)"),
        (
            OrderedDict(a=0, b=0),
            OrderedDict(b=0, a=0),
            "has its keys in another order at its root (OrderedDict)",
        ),
    ],
)  # fmt: skip
def test_what_is_told(got, wanted, text):
    assert difference(got, wanted) == text


def test_a_module_in_another_mode_is_told_by_its_attribute():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    trained, served = Net(), Net()
    served.eval()
    text = "has use_running_average=False (wanted True) at 'norm' (BatchNorm)"
    assert difference(trained, served) == text
