"""Layers that index: by constants (integers, slices, tables, booleans), and by parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import plain

OUTSIDE = 0.5  # what an index out of bounds reads


def _table(draw: Draw, n: int) -> Callable[[Any], Any]:
    places = draw.rng.integers(0, n, draw.one([3, 4, n]))
    return lambda x: x[..., places]


def _booleans(draw: Draw, n: int) -> Callable[[Any], Any]:
    chosen = draw.rng.random(n) < 0.6
    chosen[0] = True
    return lambda x: x[..., chosen]


def _take(draw: Draw, n: int) -> Callable[[Any], Any]:
    places, mode = draw.rng.integers(-n, n + 2, 4), draw.one(["clip", "wrap"])
    return lambda x: jnp.take(x, places, axis=-1, mode=mode)


def _filled(draw: Draw, n: int) -> Callable[[Any], Any]:
    places = draw.rng.integers(0, n + 2, 4)
    return lambda x: jnp.take(x, places, axis=-1, mode="fill", fill_value=OUTSIDE)


def _permutation(draw: Draw, n: int) -> Callable[[Any], Any]:
    order, how = draw.rng.permutation(n), draw.one(["index", "take", "take_along_axis"])
    if how == "index":
        return lambda x: x[..., order]
    if how == "take":
        return lambda x: jnp.take(x, order, axis=-1)
    return lambda x: jnp.take_along_axis(x, order.reshape((1,) * (x.ndim - 1) + (n,)), -1)


def _slices(draw: Draw, n: int) -> Callable[[Any], Any]:
    at = draw.one([slice(None, None, -1), slice(None, None, -2), slice(-3, None), slice(n, 0, -1)])
    return lambda x: x[..., at]


def _inner(draw: Draw, n: int) -> Callable[[Any], Any]:
    return lambda x: lax.slice_in_dim(x, 1, n - 1, axis=-1)


def _dynamic(draw: Draw, n: int) -> Callable[[Any], Any]:
    return lambda x: lax.dynamic_slice_in_dim(x, 1, n - 2, axis=-1)


def _one_kept(draw: Draw, n: int) -> Callable[[Any], Any]:
    at = draw.one([0, 1, -1])
    return lambda x: jnp.repeat(x[..., at, None], 3, -1)


def _last_apart(draw: Draw, n: int) -> Callable[[Any], Any]:
    """Two pieces by indices; one of them has a single channel."""
    at = draw.one([1, n - 1])
    return lambda x: jnp.concatenate([jnp.tanh(x[..., at:]), x[..., :at]], -1)


CHOSEN: list[Callable[[Draw, int], Callable[[Any], Any]]] = [
    _table, _booleans, _take, _filled, _permutation, _slices, _inner, _dynamic, _one_kept,
    _last_apart,
]  # fmt: skip


@layer()
def chosen(draw: Draw, shape: Shape) -> Layer | None:
    """Channels by constant indices."""
    if shape[-1] < 4:
        return None
    how = draw.one(CHOSEN)
    function = how(draw, shape[-1])
    made = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, np.float64)).shape
    return plain(made, f"chosen by {how.__name__}", function)


@layer(keeps=True)
def updated(draw: Draw, shape: Shape) -> Layer:
    """``x.at[...]`` with constant places: set, add, multiply, max; numbers or parameters."""
    c = shape[-1]
    at = draw.one([1, slice(1, 3), slice(None, None, 2), "table"])
    at = draw.rng.permutation(c)[:3] if isinstance(at, str) else at
    how = draw.one(["set", "add", "multiply", "max"])
    params = {"values": draw.weights(len(np.arange(c)[at].reshape(-1)))} if draw.maybe() else {}

    def apply(p: Params, x: Any) -> Any:
        values: Any = p["values"] if p else 0.3
        values = values[0] if p and isinstance(at, int) else values
        return getattr(x.at[..., at], how)(values, unique_indices=True)  # a product needs it

    return Layer(f"updated {how} at {at}", params, apply, shape)


@layer(keeps=True)
def updated_by(draw: Draw, shape: Shape) -> Layer:
    """A window of the channels is replaced, or a sum is scattered into zeros."""
    c, n = shape[-1], min(draw.one([1, 2, 3]), shape[-1])
    places, how = draw.rng.integers(0, c, c), draw.one(["window", "scattered", "segments"])
    params = {"patch": draw.weights(n)} if how == "window" else {}

    def apply(p: Params, x: Any) -> Any:
        if how == "window":
            patch = jnp.broadcast_to(p["patch"], (*x.shape[:-1], n))
            return lax.dynamic_update_slice_in_dim(x, patch, 1, axis=-1)
        if how == "scattered":
            return jnp.zeros_like(x).at[..., places].add(x)
        sums = jax.ops.segment_sum(jnp.moveaxis(x, -1, 0), places, num_segments=c)
        return jnp.moveaxis(sums, 0, -1)

    return Layer(f"updated_by {how}", params, apply, shape)


@layer(keeps=True)
def tokens_chosen(draw: Draw, shape: Shape) -> Layer:
    """The second axis in another order."""
    n = shape[1]
    order, how = draw.rng.permutation(n), draw.one(["table", "reversed", "where", "shifted"])
    functions: dict[str, Any] = {
        "table": lambda x: x[:, order],
        "reversed": lambda x: x[:, ::-1],
        "where": lambda x: jnp.where((order > n // 2).reshape((-1, *[1] * (len(shape) - 2))), x, 0),
        "shifted": lambda x: jnp.concatenate([x[:, -1:], x[:, :-1]], 1),
    }
    return plain(shape, f"tokens_chosen {how}", functions[how])


# ---------------------------------------------------------------------------- integer parameters


def places(draw: Draw, count: int, below: int) -> Any:
    """A parameter of integers, none of them zero."""
    dtype = draw.one([np.int32, np.int64, np.uint8, np.int8])
    return draw.rng.integers(1, max(below, 2), count).astype(dtype)


@layer()
def by_integers(draw: Draw, shape: Shape) -> Layer | None:
    """Channels at the places that a parameter holds."""
    if shape[-1] < 2:
        return None
    count = draw.width()
    how = draw.one(["index", "take", "one hot", "vmap"])
    params = {"places": places(draw, count, shape[-1])}

    def apply(p: Params, x: Any) -> Any:
        at = p["places"]
        if how == "one hot":
            return x @ jax.nn.one_hot(at, x.shape[-1], axis=0)
        if how == "vmap":
            return jax.vmap(lambda i: x[..., i], out_axes=-1)(at)
        return x[..., at] if how == "index" else jnp.take(x, at, axis=-1, mode="clip")

    return Layer(f"by_integers {how}", params, apply, (*shape[:-1], count))


@layer()
def kernel_by_integers(draw: Draw, shape: Shape) -> Layer:
    """A codebook: each column of the kernel is a row of a table."""
    c, width, rows = shape[-1], draw.width(), draw.one([3, 4])
    params = {"codes": draw.weights(rows, c), "places": places(draw, width, rows)}
    if draw.maybe(0.3):
        params = {"codes": draw.weights(rows), "places": places(draw, c * width, rows)}
        params["places"] = params["places"].reshape(c, width)

    def apply(p: Params, x: Any) -> Any:
        kernel = p["codes"][p["places"]]
        return x @ (kernel.T if p["codes"].ndim == 2 else kernel)

    return Layer("kernel_by_integers", params, apply, (*shape[:-1], width))


@layer(keeps=True)
def updated_at_integers(draw: Draw, shape: Shape) -> Layer:
    """A bias scattered to the places that a parameter holds; a window that starts at one."""
    c = shape[-1]
    if draw.maybe():
        params = {"places": places(draw, 3, c), "values": draw.weights(3)}
        how = draw.one(["add", "set", "max"])
        return Layer(
            f"updated_at_integers {how}",
            params,
            lambda p, x: x + getattr(jnp.zeros(c).at[p["places"]], how)(p["values"]),
            shape,
        )
    params = {"start": places(draw, 1, c)[0], "table": draw.weights(2 * c)}

    def window(p: Params, x: Any) -> Any:
        return x + lax.dynamic_slice_in_dim(p["table"], p["start"].astype(int), c)

    return Layer("updated_at_integers window", params, window, shape)


@layer(keeps=True)
def chosen_member(draw: Draw, shape: Shape) -> Layer:
    """One of several stacked kernels: by a constant, by a parameter, by what the data says."""
    c, how = shape[-1], draw.one(["constant", "parameter", "data", "negative"])
    params: Params = {"kernel": draw.weights(3, c, c)}
    if how == "parameter":
        params["which"] = places(draw, 1, 3)[0]

    def apply(p: Params, x: Any) -> Any:
        if how == "data":
            which: Any = (x.sum() > 0).astype(int)
            return x @ lax.dynamic_index_in_dim(p["kernel"], which, 0, keepdims=False)
        which = p.get("which", -1 if how == "negative" else 1)
        return x @ p["kernel"][which]

    return Layer(f"chosen_member by {how}", params, apply, shape)


@layer(keeps=True)
def bias_chosen(draw: Draw, shape: Shape) -> Layer:
    """A longer vector of parameters: a slice, every second, backwards, by a table, by booleans."""
    c = shape[-1]
    table, booleans = draw.rng.permutation(2 * c)[:c], np.arange(2 * c) % 2 == draw.one([0, 1])
    at = draw.one([slice(c), slice(c, None), slice(None, None, 2), slice(None, c - 1, -1)])
    at = draw.one([at, at, table, booleans])
    text = "table" if isinstance(at, np.ndarray) else at
    return Layer(
        f"bias_chosen {text}", {"bias": draw.weights(2 * c)}, lambda p, x: x + p["bias"][at], shape
    )
