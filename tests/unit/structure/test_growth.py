"""Finding, cutting and tracing grow with the program: counted in calls, at a size and its double.

The calls are those of this package's own functions, which are the same on every machine.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.models.deep import NETWORKS

PACKAGE = str(Path(jp.__file__).parent)
SIZES = {"transformer": 4, "dense_net": 8, "branches": 16, "tree": 100}


def calls(work):
    """How often functions of the package are called, and go on after a yield."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def each(make, n):
    """The calls of each job on a network of size n."""
    fn, params, x = make(n)
    structure = jp.infer_structure(fn, params, x)
    scores = jax.tree.map(np.abs, params)
    masks = jp.structured(structure)(scores, 0.5)
    entries = jax.tree.map(lambda w: w > 0, params)
    small = jp.compact(fn, params, masks, x)
    return {
        "infer_structure": calls(lambda: jp.infer_structure(fn, params, x)),
        "structured": calls(lambda: jp.structured(structure)(scores, 0.5)),
        "compact": calls(lambda: jp.compact(fn, params, masks, x)),
        "compact by entries": calls(lambda: jp.compact(fn, params, entries, x)),
        "parents": calls(lambda: [structure.parents(name) for name in structure.dims]),
        "restrict": calls(lambda: small.restrict(params)),
        "trace": calls(lambda: jax.make_jaxpr(small.fn)(small.params, x)),
    }


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["dense_net", *map(slow, ["transformer", "branches", "tree"])])
def test_calls_double_when_a_network_doubles(name):
    half, whole = (each(NETWORKS[name], n) for n in (SIZES[name], 2 * SIZES[name]))
    growth = {job: whole[job] / half[job] for job in half}
    if name == "dense_net":  # what masks leave of each piece is evaluated, and there are n * n
        assert growth.pop("compact by entries") < 4.2
    assert max(growth.values()) < 2.1, growth


@pytest.mark.slow
def test_many_pieces_are_no_recursion():
    fn, params, x = NETWORKS["dense_net"](400)
    structure = jp.infer_structure(fn, params, x)
    (head,) = (axs[0] for path, axs in zip(structure.paths, structure.param_axes) if path == "head")
    assert head.size == 8 + 4 * 400
    small = jp.compact(fn, params, structure.masks({"layers/0:1": np.arange(4) < 2}), x)
    assert small.params["head"].shape == (8 + 4 * 400 - 2, 3)


def test_structured_at_hand_compiles_nothing_for_a_dimension(caplog):
    """Networks that differ in how many layers they have need the same programs."""
    prune(*NETWORKS["branches"](3))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        prune(*NETWORKS["branches"](9))
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 3)(1.0)
    assert "Compiling" in caplog.text  # where there is one, the log says so


def prune(fn, params, x):
    structure = jp.infer_structure(fn, params, x)
    return jp.structured(structure)(jax.tree.map(np.abs, params), 0.5)
