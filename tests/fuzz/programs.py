"""Random programs: layers of all sorts composed from an integer seed.

``random_program(seed)`` is the same on every machine. A program is a pure function of a nested
dictionary of parameters and one input; printed, it is the list of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz import layers
from tests.fuzz.layers.catalogue import ANY, FORWARD, REVERSE, Draw, Layer, Params, Shape, chained
from tests.fuzz.layers.contractions import dense_to

__all__ = ["Program", "gradient", "layers", "random_program"]

BATCH = 2
WORDS = 7  # rows of an embedding


@dataclass(frozen=True, eq=False)
class Program:
    """A random program; ``fn(params, *args)`` needs float64 to be enabled."""

    seed: int
    steps: tuple[str, ...]
    fn: Callable[..., Any]
    params: Params
    args: tuple[Any, ...]
    differentiable: bool  # in reverse, by params

    def __str__(self) -> str:
        rows = [f"program {self.seed}", *(f"  {step}" for step in self.steps)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            rows.append(f"    {jax.tree_util.keystr(path)}: {leaf.shape}")
        return "\n".join(rows)


def random_program(seed: int) -> Program:
    """Returns the program of a seed."""
    draw = Draw(np.random.default_rng(seed))
    name = draw.one(list(WRAPPERS))
    draw.derivative, wrap = WRAPPERS[name]
    while True:
        first, x = _start(draw)
        body = draw.layers(first.shape, draw.one([1, 2, 3, 4]))
        rows = [first, *body, _head(draw, body[-1].shape)]
        whole = chained(rows)
        if any(_counts(leaf) for leaf in jax.tree.leaves(whole.params)):
            break
    steps = (*(one.text for one in rows), f"as a whole: {name}")
    return Program(seed, steps, wrap(whole.apply), whole.params, (x,), name in DIFFERENTIABLE)


def _counts(leaf: Any) -> bool:
    """Whether a leaf is something to prune and to differentiate by."""
    return bool(leaf.size) and jnp.issubdtype(leaf.dtype, jnp.inexact)


# ------------------------------------------------------------------------------------ both ends


def _start(draw: Draw) -> tuple[Layer, np.ndarray]:
    """The input, and a first layer that makes prunable channels of it."""
    kind = draw.one(["vector", "tokens", "image", "words"])
    if kind == "words":
        return _embedding(draw)
    shape: Shape = (BATCH, draw.one([3, 5, 6]))
    if kind == "tokens":
        shape = (BATCH, draw.one([3, 4, 5]), shape[-1])
    if kind == "image":
        shape = (BATCH, draw.one([4, 5, 6]), draw.one([4, 6]), 3)
    x = draw.rng.normal(size=shape)
    if draw.maybe(0.1):  # now and then the input's own, frozen axes come first
        return draw.layer(shape), x
    return dense_to(draw, shape, draw.width()), x


def _embedding(draw: Draw) -> tuple[Layer, np.ndarray]:
    tokens, width = draw.one([3, 4, 5]), draw.width()
    ids = draw.rng.integers(0, WORDS, (BATCH, tokens))
    how = draw.one(["indexing", "take", "one hot"])

    def apply(p: Params, x: Any) -> Any:
        if how == "one hot":
            return jax.nn.one_hot(x, WORDS) @ p["table"]
        return p["table"][x] if how == "indexing" else jnp.take(p["table"], x, axis=0)

    params = {"table": draw.weights(WORDS, width)}
    shape = (BATCH, tokens, width)
    return Layer(f"embedding by {how}, {width} wide", params, apply, shape), ids


def _head(draw: Draw, shape: Shape) -> Layer:
    """Mostly a readout; else the channels come out and are frozen, or only a loss does."""
    how = draw.one(["dense", "dense", "dense", "flatten", "nothing", "loss", "labels"])
    if how == "nothing":
        return Layer("outputs as they are", {}, lambda p, x: x, shape)
    if how == "loss":
        return Layer("outputs one number", {}, lambda p, x: jnp.mean(jnp.sin(x) * x), ())
    if how == "labels":
        return _cross_entropy(draw, shape)
    flat = (shape[0], int(np.prod(shape[1:])))
    inner = dense_to(draw, flat if how == "flatten" else shape, 3)
    if how == "dense":
        return inner
    return Layer(
        f"flatten, {inner.text}",
        inner.params,
        lambda p, x: inner.apply(p, x.reshape(x.shape[0], -1)),
        inner.shape,
    )


def _cross_entropy(draw: Draw, shape: Shape) -> Layer:
    inner = dense_to(draw, shape, 4)
    labels = draw.rng.integers(0, 4, shape[:-1])

    def apply(p: Params, x: Any) -> Any:
        logs = jax.nn.log_softmax(inner.apply(p, x))
        return -(jax.nn.one_hot(labels[: len(x)], 4) * logs).sum(-1).mean()

    return Layer(f"cross entropy of {inner.text}", inner.params, apply, ())


# ------------------------------------------------------------------------------------- wrappers


def _plain(forward: Any) -> Any:
    return forward


def _loss(forward: Any) -> Any:
    return lambda p, x: jnp.sum(jnp.sin(forward(p, x)))


def gradient(function: Any) -> Any:
    """The gradient by all parameters of floats; zeros of their own type for others."""

    def steep(params: Params, *args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        chosen = [jnp.issubdtype(w.dtype, jnp.inexact) for w in leaves]

        def by(some: list[Any]) -> Any:
            rest = iter(some)
            mixed = [next(rest) if c else w for c, w in zip(chosen, leaves, strict=True)]
            return function(jax.tree.unflatten(treedef, mixed), *args)

        found = iter(jax.grad(by)([w for c, w in zip(chosen, leaves, strict=True) if c]))
        all_of = [next(found) if c else jnp.zeros_like(w) for c, w in zip(chosen, leaves)]
        return jax.tree.unflatten(treedef, all_of)

    return steep


def _gradients(forward: Any) -> Any:
    """The results are gradients of the parameters and follow them in size."""
    return gradient(_loss(forward))


def _stepped(params: Params, gradients: Params) -> Params:
    return jax.tree.map(lambda p, g: (p - 0.1 * g).astype(p.dtype), params, gradients)


def _training_step(forward: Any) -> Any:
    return lambda params, x: _stepped(params, gradient(_loss(forward))(params, x))


def _step_and_loss(forward: Any) -> Any:
    """The new parameters stand in a dictionary, beside a number."""

    def step(params: Params, x: Any) -> Any:
        loss = _loss(forward)
        return {"params": _stepped(params, gradient(loss)(params, x)), "loss": loss(params, x)}

    return step


def _with_params(forward: Any) -> Any:
    """A pair of logits and the parameters as they are."""
    return lambda params, x: (forward(params, x), params)


def _with_average(forward: Any) -> Any:
    """A pair of logits and a moving average of the parameters."""

    def both(params: Params, x: Any) -> Any:
        return forward(params, x), _stepped(params, jax.tree.map(jnp.tanh, params))

    return both


def _several(forward: Any) -> Any:
    """Outputs in a dictionary: some twice, some of nothing, the input, a constant."""

    def outputs(params: Params, x: Any) -> Any:
        y = forward(params, x)
        rest = (2 * y, [y[..., :0] if y.ndim else y, None])
        return {"y": y, "rest": rest, "x": x, "one": jnp.ones(3), "sum": y.sum()}

    return outputs


def _decayed(forward: Any) -> Any:
    """The loss with a penalty on all parameters, and the penalty beside it."""

    def total(params: Params, x: Any) -> Any:
        squares = [jnp.sum(jnp.abs(w) ** 2) for w in jax.tree.leaves(params)]
        penalty = 1e-2 * sum(square.astype(float) for square in squares)
        return _loss(forward)(params, x) + penalty, penalty

    return total


def _tangent(forward: Any) -> Any:
    """The derivative along the input, or along the parameters where the input is of integers."""

    def derivative(params: Params, x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return _tangent_of_params(forward, params, x)
        return jax.jvp(lambda h: forward(params, h), (x,), (x,))

    return derivative


def _tangent_of_params(forward: Any, params: Params, x: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    along = [
        w if jnp.issubdtype(w.dtype, jnp.inexact) else np.zeros(np.shape(w), jax.dtypes.float0)
        for w in leaves
    ]
    return jax.jvp(lambda p: forward(p, x), (params,), (jax.tree.unflatten(treedef, along),))


def _vmapped_oddly(forward: Any) -> Any:
    """The batch last, and its results in front of the last axis."""

    def rows(params: Params, x: Any) -> Any:
        turned = jnp.moveaxis(x, 0, -1)
        return jax.vmap(lambda row: forward(params, row[None]), in_axes=-1, out_axes=-1)(turned)

    return rows


def _vmapped(forward: Any) -> Any:
    def rows(params: Params, x: Any) -> Any:
        return jax.vmap(lambda row: forward(params, row[None]))(x)

    return rows


# name -> (the derivative that it takes of the layers, or leaves to be taken; what it does)
WRAPPERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "value": (ANY, _plain),
    "differentiable value": (REVERSE, _plain),
    "jit": (ANY, jax.jit),
    "vmap over the batch": (REVERSE, _vmapped),
    "gradients": (REVERSE, _gradients),
    "training step": (REVERSE, _training_step),
    "tangent": (FORWARD, _tangent),
    "checkpoint": (REVERSE, jax.checkpoint),
    "vmap over the last axis": (REVERSE, _vmapped_oddly),
    "step and loss": (REVERSE, _step_and_loss),
    "with params": (REVERSE, _with_params),
    "with average": (ANY, _with_average),
    "several": (REVERSE, _several),
    "decayed": (REVERSE, _decayed),
}
DIFFERENTIABLE = {
    "differentiable value", "vmap over the batch", "checkpoint", "vmap over the last axis",
    "with params", "several", "decayed",
}  # fmt: skip
