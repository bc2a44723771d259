"""Operations along other axes than the last, from the end, several at once, or of size 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import plain


def _along(draw: Draw, shape: Shape) -> int:
    """Any axis but the batch, counted from either end."""
    axis = draw.one(range(1, len(shape)))
    return axis if draw.maybe() else axis - len(shape)


SCANS: dict[str, Callable[[Any, int], Any]] = {
    "cumsum": lambda x, k: jnp.cumsum(x, k),
    "cumsum reversed": lambda x, k: lax.cumsum(x, k % x.ndim, reverse=True),
    "cumprod": lambda x, k: jnp.cumprod(jnp.tanh(x), k),
    "cumprod reversed": lambda x, k: lax.cumprod(jnp.cos(x), k % x.ndim, reverse=True),
    "cummin reversed": lambda x, k: lax.cummin(x, k % x.ndim, reverse=True),
    "cumlogsumexp": lambda x, k: lax.cumlogsumexp(x, k % x.ndim),
    "sort": lambda x, k: jnp.sort(x, k),
    "sort descending": lambda x, k: -jnp.sort(-x, k),
    "argsort": lambda x, k: x + 0.1 * jnp.argsort(x, k),
    "rank": lambda x, k: x * jnp.argsort(jnp.argsort(x, k), k),
    "argmax": lambda x, k: x + 0.1 * jnp.argmax(x, k, keepdims=True),
    "argmin one hot": lambda x, k: x + jax.nn.one_hot(
        jnp.argmin(x, k), x.shape[k], axis=k % x.ndim
    ),
    "taken at the largest": lambda x, k: x - jnp.take_along_axis(
        x, jnp.argmax(jnp.abs(x), k, keepdims=True), k
    ),
    "softmax": lambda x, k: jax.nn.softmax(x, k),
    "flip": lambda x, k: x + jnp.flip(x, k),
    "difference": lambda x, k: x - jnp.roll(x, 1, k),
    "less the median": lambda x, k: x - jnp.median(x, k, keepdims=True),
    "by the norm": lambda x, k: x / (0.1 + jnp.linalg.norm(x, axis=k, keepdims=True)),
    "less the third": lambda x, k: x - jnp.expand_dims(jnp.take(x, 1, k), k),
}  # fmt: skip


@layer(keeps=True)
def along_an_axis(draw: Draw, shape: Shape) -> Layer:
    name, axis = draw.one(list(SCANS)), _along(draw, shape)
    return plain(shape, f"along_an_axis {name} {axis}", lambda x: SCANS[name](x, axis))


@layer(keeps=True)
def best(draw: Draw, shape: Shape) -> Layer | None:
    """The largest along an axis, by lax.top_k on moved axes."""
    axis = _along(draw, shape)
    if shape[axis] < 2:
        return None
    how = draw.one(["threshold", "sum", "places"])

    def apply(x: Any) -> Any:
        values, places = lax.top_k(jnp.moveaxis(x, axis, -1), 2)
        if how == "threshold":
            return jnp.where(x >= jnp.moveaxis(values[..., -1:], -1, axis), x, 0.1 * x)
        if how == "sum":
            return x + jnp.moveaxis(values.sum(-1, keepdims=True), -1, axis)
        return x + 0.1 * jnp.moveaxis(places[..., :1], -1, axis)

    return plain(shape, f"best {how} along {axis}", apply)


REDUCED: dict[str, Callable[..., Any]] = {
    "mean": jnp.mean, "sum": jnp.sum, "max": jnp.max, "min": jnp.min, "var": jnp.var,
    "logsumexp": jax.nn.logsumexp, "all": lambda x, **k: jnp.all(x > 0, **k),
    "any": lambda x, **k: jnp.any(x > 0.5, **k), "count": lambda x, **k: (x > 0).sum(**k),
    "prod": lambda x, **k: jnp.prod(jnp.cos(x), **k), "std": lambda x, **k: jnp.std(x + 1, **k),
}  # fmt: skip


@layer(keeps=True)
def over_several(draw: Draw, shape: Shape) -> Layer:
    """A reduction over a tuple of axes, in any order and from either end."""
    rank, name = len(shape), draw.one(list(REDUCED))
    count = draw.one(range(1, rank + 1)) if rank > 2 else 1
    chosen = [int(k) for k in draw.rng.permutation(range(0 if count > 1 else 1, rank))[:count]]
    axes = tuple(k - rank if draw.maybe() else k for k in chosen)
    minus = draw.maybe()

    def apply(x: Any) -> Any:
        total = 0.3 * REDUCED[name](x, axis=axes, keepdims=True)
        return x - total if minus else x * (1 + total)

    return plain(shape, f"over_several {name} {axes}", apply)


@layer(keeps=True)
def transposed(draw: Draw, shape: Shape) -> Layer:
    """Axes moved, something done along what is last then, and moved back."""
    rank = len(shape)
    order = [int(k) for k in draw.rng.permutation(rank)]
    back = [order.index(k) for k in range(rank)]
    how = draw.one(["softmax", "cumsum", "reversed", "table"])
    params = {"table": draw.weights(shape[order[-1]])} if how == "table" and order[-1] else {}

    def apply(p: Params, x: Any) -> Any:
        y = jnp.transpose(x, order)
        if p:
            y = y * p["table"]
        elif how == "cumsum":
            y = jnp.cumsum(y, 0)
        elif how == "reversed":
            y = lax.rev(y, (rank - 1,))
        else:
            y = jax.nn.softmax(y)
        return y.transpose(back)

    return Layer(f"transposed {order} {how}", params, apply, shape)


@layer()
def contracted_oddly(draw: Draw, shape: Shape) -> Layer:
    """The channels' kernel in other orders of axes: einsum, tensordot, dot_general, matvec."""
    c, width = shape[-1], draw.width()
    how = draw.one(["d first", "tensordot", "vecdot", "inner", "middle", "batched"])
    form: Shape = {"d first": (width, c), "inner": (width, c), "vecdot": (width, c)}.get(
        how, (c, width)
    )
    if how == "middle":
        form = (2, c, width)
    params = {"kernel": draw.weights(*form)}

    def apply(p: Params, x: Any) -> Any:
        w = p["kernel"]
        if how == "d first":
            return jnp.moveaxis(jnp.einsum("b...c,dc->d...b", x, w), (0, -1), (-1, 0))
        if how == "tensordot":
            return jnp.tensordot(x, w, axes=[[-1], [0]])
        if how == "vecdot":
            return jnp.vecdot(x[..., None, :], w)
        if how == "inner":
            return jnp.inner(x, w)
        if how == "middle":
            return jnp.einsum("...c,kcd->k...d", x, w).prod(0)
        return jnp.matmul(x[..., None, :], w)[..., 0, :]

    return Layer(f"contracted_oddly {how}", params, apply, (*shape[:-1], width))


@layer(keeps=True)
def axis_of_one(draw: Draw, shape: Shape) -> Layer:
    """Axes of size 1: in parameters, put in and taken out, summed over, contracted."""
    c = shape[-1]
    how = draw.one(["(1, c)", "(c, 1)", "(1,)", "stack", "sum", "contracted", "reshape"])
    params: Params = {}
    if how.startswith("("):
        params = {"table": draw.weights(*{"(1, c)": (1, c), "(c, 1)": (c, 1), "(1,)": (1,)}[how])}
    if how == "contracted":
        params = {"a": draw.weights(c, 1), "b": draw.weights(1, c)}

    def apply(p: Params, x: Any) -> Any:
        if how == "(c, 1)":
            return x * p["table"].squeeze(-1)
        if how.startswith("("):
            return x + p["table"].reshape(-1)
        if how == "contracted":
            return x + (x @ p["a"]) @ p["b"]
        if how == "stack":
            return jnp.stack([x], -2).max(-2)
        return x[..., None].sum(-1) if how == "sum" else x.reshape(*x.shape, 1).reshape(x.shape)

    return Layer(f"axis_of_one {how}", params, apply, shape)


@layer(keeps=True)
def stacked(draw: Draw, shape: Shape) -> Layer:
    """Stacked on a new axis anywhere, and reduced, indexed or contracted along it."""
    axis = draw.one([0, 1, -1, -2])
    how = draw.one(["max", "index", "weights"])
    params = {"weights": draw.weights(2)} if how == "weights" else {}

    def apply(p: Params, x: Any) -> Any:
        both = jnp.stack([jnp.tanh(x), jnp.cos(x)], axis)
        if how == "max":
            return both.max(axis)
        if how == "index":
            return jnp.take(both, 1, axis) + lax.index_in_dim(both, 0, axis % both.ndim, False)
        return jnp.tensordot(both, p["weights"], ((axis,), (0,)))

    return Layer(f"stacked {how} along {axis}", params, apply, shape)
