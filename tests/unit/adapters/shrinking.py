"""A module halved by magnitude, shrunk, and held against its compact function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.zoo.check import drawn, is_float, relative_error, weighted

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time


def halves(structure: Any, params: Any, spared: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The larger half of every dimension that may go, but those whose label holds a word."""
    scores = structure.unit_scores(jp.magnitude(params))
    keep = {}
    for name, dim in structure.dims.items():
        if not dim.frozen and dim.size > 1 and not any(word in dim.label for word in spared):
            order = np.argsort(-np.asarray(scores[name]))
            keep[name] = np.isin(np.arange(dim.size), order[: max(dim.size // 2, 1)])
    return keep


def halved(
    fn: Any, params: Any, *args: Any, semantics: str = "masked", spared: tuple[str, ...] = ()
) -> Any:
    """The compact model; no parameter is zero, and variances are positive."""
    params = drawn(params, 0)
    structure = jp.infer_structure(fn, params, *args)
    masks = structure.masks(halves(structure, params, spared))
    small = jp.compact(fn, params, masks, *args, semantics=semantics)
    assert count(small.params) < count(params)
    return small


def count(tree: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def outputs_and_gradients(fn: Any, params: Any, *args: Any) -> Any:
    """The outputs, and the gradients of their weighted sum by floating parameters and inputs."""

    def loss(tree: Any) -> Any:
        outputs = fn(tree[0], *tree[1])
        return weighted(outputs), outputs

    gradient = jax.grad(loss, has_aux=True, allow_int=True)
    return jax.jit(gradient, compiler_options=QUICK)((params, args))


def assert_same(pure: Any, arrays: Any, small: Any, *args: Any) -> None:
    """Outputs and gradients of a shrunk module; where scales are folded, by the chain rule."""
    (ours, inputs), outputs = outputs_and_gradients(pure, arrays, *args)
    (wanted, wanted_inputs), expected = outputs_and_gradients(small.fn, small.params, *args)
    assert relative_error(expected, outputs) < 1e-5
    assert relative_error(floating(wanted_inputs), floating(inputs)) < 1e-5
    before, after = ([x for x in jax.tree.leaves(t) if is_float(x)] for t in (small.params, arrays))
    pairs = zip(floating(ours), before, after, strict=True)
    chained = [g * jnp.where(b == 0, 1, a / jnp.where(b == 0, 1, b)) for g, b, a in pairs]
    largest = max(float(jnp.abs(g).max()) for g in floating(wanted))
    for mine, theirs in zip(chained, floating(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * largest, rtol=1e-4)


def floating(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if is_float(x)]
