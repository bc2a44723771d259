"""What is to be small while a compact model is tuned, and which of its leaves are tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._leaf import is_float
from jaxprune.compaction.model import Compact
from jaxprune.structure import infer
from jaxprune.training.distillation import logit_loss

Batch = tuple[Any, ...]
NUMBER = "wanted a number, or a tuple of it and updated parameters"
Loss = Callable[..., Any]


@dataclass(frozen=True)
class Objective:
    """A loss of small parameters.

    Attributes:
      fn: ``(params, *batch) -> (number, updated)``, where ``updated`` is a list of new values, one
        for each position in ``updated``.
      updated: positions of the leaves that the loss itself updates.
      tuned: for each leaf, whether a gradient moves it.
    """

    fn: Callable[..., Any]
    updated: tuple[int, ...]
    tuned: tuple[bool, ...]

    def split(self, params: Any) -> tuple[Any, Any]:
        """What is tuned and what is not, each a tree with None at the other's leaves."""
        leaves, treedef = jax.tree.flatten(params)
        pairs = list(zip(self.tuned, leaves, strict=True))
        tuned = [x if yes else None for yes, x in pairs]
        rest = [None if yes else x for yes, x in pairs]
        return jax.tree.unflatten(treedef, tuned), jax.tree.unflatten(treedef, rest)

    def join(self, tuned: Any, rest: Any, updated: list[Any]) -> Any:
        """The parameters, with what the loss has updated."""
        both = jax.tree.map(
            lambda a, b: b if a is None else a, tuned, rest, is_leaf=lambda x: x is None
        )
        if not updated:
            return both
        leaves, treedef = jax.tree.flatten(both)
        for i, new in zip(self.updated, updated, strict=True):
            leaves[i] = jnp.asarray(new, jnp.result_type(leaves[i]))
        return jax.tree.unflatten(treedef, leaves)


def objective_of(
    small: Compact,
    loss: Callable[..., Any] | None,
    teacher: Callable[..., Any] | None,
    batch: Batch,
) -> Objective:
    """The loss, the distance to the teacher, or the mean of both, of the small parameters."""
    if loss is None and teacher is None:
        raise TypeError(
            "recover needs what to tune by: a loss(params, *batch), or teacher=lambda *inputs: "
            "fn(params, *inputs), the dense network"
        )
    own = None if loss is None else small.cut(loss, *batch)
    found = jax.eval_shape(own, small.params, *batch) if own is not None else None
    places = {} if own is None else _places(small, _beside(found))
    taught = None if teacher is None else _distance(small, teacher, batch)
    parts = [f for f in (own, taught) if f is not None]

    def total(params: Any, *batch: Any) -> tuple[jax.Array, list[Any]]:
        results = [f(params, *batch) for f in parts]
        values = [r[0] if isinstance(r, tuple) else r for r in results]
        new = jax.tree.leaves(results[0][1]) if places else []
        mean = functools.reduce(jnp.add, values) / len(values)
        return mean, [new[k] for k in places.values()]

    return Objective(total, tuple(places), _tuned(small, places))


def _tuned(small: Compact, updated: Iterable[int]) -> tuple[bool, ...]:
    """Which leaves a gradient moves: floats that are neither statistics nor updated by the loss."""
    structure, leaves = small._structure, jax.tree.leaves(small.params)
    still = {structure.paths.index(path) for path in structure.statistics} | set(updated)
    tuned = tuple(is_float(x) and i not in still for i, x in enumerate(leaves))
    if not any(tuned):
        raise ValueError("recover found nothing to tune: no leaf of small.params holds floats")
    return tuned


def _beside(found: Any) -> Any:
    """What a loss returns beside its number."""
    pair = isinstance(found, tuple) and len(found) == 2
    value = found[0] if pair else found
    if getattr(value, "shape", None) != ():
        got = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", found)
        raise ValueError(f"the loss returns {got}; {NUMBER}")
    return found[1] if pair else None


def _places(small: Compact, aux: Any) -> dict[int, int]:
    """Position of a parameter -> that of the result beside the loss that is its new value.

    All parameters may be among the results, as they are in ``variables | updated``: then only
    running statistics are taken from there.
    """
    if aux is None:
        return {}
    structure = small._structure
    known = list(zip(structure.paths, map(jnp.shape, jax.tree.leaves(small.params)), strict=True))
    leaves = jax.tree.leaves(aux)
    given = list(zip(infer.paths_of(aux), (x.shape for x in leaves), strict=True))
    names = infer.followed(given, known)
    places = {structure.paths.index(name): k for k, name in enumerate(names) if name is not None}
    if len(places) < len(known):
        return places
    return {i: k for i, k in places.items() if structure.paths[i] in structure.statistics}


def _distance(small: Compact, teacher: Callable[..., Any], batch: Batch) -> Callable[..., Any]:
    """How far the outputs are from the teacher's, which takes what the compact function takes."""
    count = len(small.fn.traced_for[1])  # type: ignore[attr-defined]
    outputs = [jax.eval_shape(f, *batch[:count]) for f in (_at(small), teacher)]
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), out) for out in outputs]
    if not isinstance(shapes[0], tuple) or shapes[0][0] != getattr(outputs[1], "shape", None):
        raise ValueError(
            f"the compact function returns {shapes[0]} and the teacher {shapes[1]}; wanted logits "
            "of one shape from both. For other outputs pass a loss of your own that calls the "
            "teacher: jp.training.distill(fn, teacher, loss)"
        )

    def distance(params: Any, *batch: Any) -> jax.Array:
        taught = jax.lax.stop_gradient(teacher(*batch[:count]))
        return jnp.mean(logit_loss(small.fn(params, *batch[:count]), taught))

    return distance


def _at(small: Compact) -> Callable[..., Any]:
    return functools.partial(small.fn, small.params)
