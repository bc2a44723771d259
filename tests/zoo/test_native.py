"""The acceptance zoo: what structure finds and compact promises for 52 kinds of structure."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.zoo import ENTRIES, Entry

ROWS = 52
SEEDS = (0, 1)
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time
# Without optimization, fused copies of one value round apart: then a maximum equals none of its
# entries, and its gradient is lost, in the masked model as well.
UNFUSED = {"int8_activations": {"xla_disable_hlo_passes": "fusion"}}


class Opened:
    """One entry's model, its structure, and its results with gradients, compiled once for all."""

    def __init__(self, entry: Entry) -> None:
        self.entry, (self.fn, self.params, self.args) = entry, entry.build()
        self.structure = jp.infer_structure(self.fn, self.params, *self.args)
        self.run = value_and_gradient(self.fn, entry)
        self.compacted = functools.cache(self._compacted)

    def _compacted(self, seed: int) -> Any:
        """The masked parameters, and the compact model."""
        masks = self.structure.masks(halves(self.structure, seed))
        small = jp.compact(jax.jit(self.fn), self.params, masks, *self.args)
        return jp.apply_masks(self.params, masks), small


@pytest.fixture(scope="module", params=ENTRIES, ids=str)
def zoo(request: Any) -> Opened:
    """All tests of an entry run one after another."""
    return Opened(request.param)


def halves(structure: jp.typing.Structure, seed: int) -> dict[str, np.ndarray]:
    """Half of every prunable dimension, at random."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, dim in structure.dims.items():
        if not dim.frozen:
            keep[name] = np.zeros(dim.size, bool)
            keep[name][rng.permutation(dim.size)[: dim.size // 2]] = True
    return keep


def prunable_sizes(structure: jp.typing.Structure, path: str, axis: int) -> tuple[int, ...]:
    """Sizes of the prunable dimensions along one axis of a leaf, each once, in order."""
    found = {}
    for dim in structure.dims.values():
        pieces = [s.piece for s in dim.slots if (s.path, s.axis) == (path, axis)]
        if pieces and not dim.frozen:
            found[min(pieces)] = dim.size
    return tuple(found[piece] for piece in sorted(found))


def inexact(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def value_and_gradient(fn: Any, entry: Entry) -> Any:
    """Jitted: the results, and the gradients of the sum of their squares.

    Removed entries of results that are states do not weigh in: they are zero.
    """

    def scalar(params: Any, *args: Any) -> Any:
        results = fn(params, *args)
        return sum(jnp.sum(jnp.abs(x) ** 2) for x in inexact(results)), results

    def both(params: Any, *args: Any) -> Any:
        if not entry.differentiable:
            return fn(params, *args), None
        grads, results = jax.grad(scalar, has_aux=True, allow_int=True)(params, *args)
        return results, grads

    return jax.jit(both, compiler_options=QUICK | UNFUSED.get(entry.name, {}))


def relative(expected: Any, got: Any) -> float:
    """max|got - expected| / max|expected| over the leaf where this is largest."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and np.isfinite(a).all()
        worst = max(worst, float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) or 1.0)))
    return worst


def gradient_error(expected: Any, got: Any) -> float:
    """The largest difference, relative to the norm of all gradients together."""
    pairs = list(zip(inexact(expected), inexact(got), strict=True))
    norm = np.sqrt(sum(np.sum(np.abs(a) ** 2) for a, _ in pairs))
    return max(float(np.max(np.abs(a - b))) for a, b in pairs) / float(norm)


def reasons(structure: jp.typing.Structure, certificate: Any) -> list[str]:
    found = [d.frozen for d in structure.dims.values() if d.frozen]
    return found + [e.reason for e in certificate.entries if e.reason]


def moved(a: Any) -> Any:
    """Another input."""
    return a + 1 if jnp.issubdtype(a.dtype, jnp.floating) else a[::-1] if a.ndim else a


def split_slot(slot: str) -> tuple[str, int]:
    path, axis = slot.rsplit(":", 1)
    return path, int(axis)


def test_dimensions_are_found(zoo):
    structure, wanted = zoo.structure, zoo.entry.prunable
    found = {slot: prunable_sizes(structure, *split_slot(slot)) for slot in wanted}
    assert found == dict(wanted), f"\n{structure}"


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_every_dimension_goes_exactly_or_is_refused(zoo, seed):
    entry, structure = zoo.entry, zoo.structure
    masked, small = zoo.compacted(seed)
    certificate = str(small.certificate)
    assert small.certificate.exact, certificate
    if entry.refused:
        assert any(re.search(entry.refused, r) for r in reasons(structure, small.certificate))
    results, grads = zoo.run(masked, *zoo.args)
    mine = value_and_gradient(small.fn, entry)(small.params, *zoo.args)
    assert relative(small.restrict_outputs(results), mine[0]) < 1e-5, certificate
    if entry.differentiable:
        assert gradient_error(small.restrict(grads), mine[1]) < 1e-4, certificate
    if any(not d.frozen for d in structure.dims.values()):
        assert count(small.params) < count(zoo.params)


def count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def test_the_check_in_float64_agrees_and_the_masked_model_sees_its_input(zoo):
    masked, small = zoo.compacted(0)
    checker = small.certificate._checker
    whole = functools.partial(jax.jit(checker.function, compiler_options=QUICK))
    whole.fn = checker.function.fn
    object.__setattr__(checker, "function", whole)  # compiled once, not operation by operation
    assert small.certificate.check(1) < 1e-10
    inputs = zoo.args, jax.tree.map(moved, zoo.args)
    results, others = (inexact(zoo.run(masked, *args)[0]) for args in inputs)
    assert any((a != b).any() for a, b in zip(results, others))


def test_every_row_has_a_model_and_48_rows_are_exact():
    rows = {row: [e for e in ENTRIES if e.row == row] for row in range(1, ROWS + 1)}
    assert all(rows.values()), [row for row, models in rows.items() if not models]
    exact = [row for row, models in rows.items() if not any(e.refused for e in models)]
    assert len(exact) >= 48, sorted(set(rows) - set(exact))
