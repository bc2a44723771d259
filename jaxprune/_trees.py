"""How two trees differ, in as few words as an error has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax

from jaxprune.typing import path_str

LISTED = 3  # So many paths or values are named, others are counted.
WIDEST = 70  # A path or a value is cut after so many letters.


def difference(got: Any, wanted: Any) -> str:
    """Returns what one tree has otherwise than another, as what follows "it"; "" for nothing.

    Leaves that only one of both has are named by their paths. Where all paths agree, the first node
    of another type, or with other static data, is named, and what is other about it.

    Args:
      got, wanted: pytrees, or ``PyTreeDef`` of such.

    Returns:
      Less than 600 letters, however large the trees are.

    Example:
      >>> difference({"w": 1, "bias": 2}, {"w": 1, "b": 2})
      "has no leaf 'b', and an unknown leaf 'bias'"
      >>> difference({"layers": (1, 2)}, {"layers": [1, 2]})
      "has a tuple at 'layers' where a list is wanted"
    """
    ours, theirs = _tree(got), _tree(wanted)
    here, there = (dict.fromkeys(map(path_str, _leaves(t))) for t in (ours, theirs))
    missing = [path for path in there if path not in here]
    extra = [path for path in here if path not in there]
    if "" in {*here, *there}:  # One of both is a leaf.
        return _first_node((), ours, theirs)
    told = [*_listed("no leaf", missing), *_listed("an unknown leaf", extra)]
    return f"has {', and '.join(told)}" if told else _first_node((), ours, theirs)


def _listed(what: str, paths: Sequence[str]) -> list[str]:
    """``no leaf 'a' (nor 'b', 'c' and 7 more)``; an empty list for no paths."""
    if not paths:
        return []
    first, *others = [repr(_ending(path)) for path in paths[:LISTED]]
    more = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
    joint = "nor" if what.startswith("no ") else "and"
    return [f"{what} {first}" + (f" ({joint} {', '.join(others)}{more})" if others else "")]


def _first_node(path: tuple[Any, ...], got: Any, wanted: Any) -> str:
    """The first node that differs, on the way down from one whose leaves have the same paths."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (got, wanted)]
    if structures[0] == structures[1]:
        return ""
    (mine, ours), (other, theirs) = _level(got), _level(wanted)
    where = f"at {_ending(path_str(path))!r}" if path else "at its root"
    if mine is None or other is None or mine[0] is not other[0]:
        return f"has {_kind(got)} {where} where {_kind(wanted)} is wanted"
    if mine[1] != other[1]:
        return f"has {_static(got, wanted, ours, mine, other)} {where} ({mine[0].__name__})"
    if len(ours) != len(theirs):
        return f"has {len(ours)} entries {where}, wanted {len(theirs)}"
    below = (
        _first_node((*path, *key), a, b) for (key, a), (_, b) in zip(ours, theirs, strict=True)
    )
    return next(filter(None, below), "")


def _static(got: Any, wanted: Any, children: Any, mine: Any, other: Any) -> str:
    """What is other about two nodes of one type: keys, attributes, or else all static data."""
    if isinstance(got, Mapping) and isinstance(wanted, Mapping):
        missing, extra = wanted.keys() - got.keys(), got.keys() - wanted.keys()
        told = [*_named("no key", missing), *_named("an unknown key", extra)]
        return ", and ".join(told) or "its keys in another order"
    pairs = [
        f"{name}={_short(vars(got).get(name))} (wanted {_short(vars(wanted).get(name))})"
        for name in _other_attributes(got, wanted, children)
    ]
    if pairs:
        return ", ".join(pairs[:LISTED])
    return f"the static data {_short(mine[1])} (wanted {_short(other[1])})"


def _named(what: str, keys: Set[Any]) -> list[str]:
    return [f"{what} {', '.join(sorted(map(repr, keys))[:LISTED]):.{WIDEST}}"] if keys else []


def _other_attributes(got: Any, wanted: Any, children: Any) -> list[str]:
    """Attributes, but for children, whose values differ."""
    if not (hasattr(got, "__dict__") and hasattr(wanted, "__dict__")):
        return []
    below = {getattr(key, "name", None) for (key,), _ in children}
    names = [name for name in {**vars(wanted), **vars(got)} if name not in below]
    return [n for n in names if not _same(vars(got).get(n), vars(wanted).get(n))]


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # arrays of several entries are neither
        return a is b


def _level(tree: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """(type, static data) of a node, None of a leaf; and its children by key."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    treedef: Any = jax.tree.structure(tree, is_leaf=lambda x: x is not tree)
    return treedef.node_data(), list(flat)


def _tree(x: Any) -> Any:
    """A tree of the structure, with numbers for leaves."""
    treedef = x if isinstance(x, jax.tree_util.PyTreeDef) else jax.tree.structure(x)
    return treedef.unflatten([0] * treedef.num_leaves)


def _leaves(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _kind(node: Any) -> str:
    """``a list``, ``None``, ``a leaf``."""
    if node is None or jax.tree_util.all_leaves([node]):
        return "None" if node is None else "a leaf"
    return f"a {type(node).__name__:.{WIDEST}}"


def _ending(path: str) -> str:
    """The end of a path, which says most."""
    return path if len(path) <= WIDEST else "..." + path[3 - WIDEST :]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
