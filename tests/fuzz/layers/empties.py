"""Slices, rolls, pads and pieces of nothing, or of a single channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import plain

NOTHING: dict[str, Callable[[Any], Any]] = {
    "roll by 0": lambda x: jnp.roll(x, 0, -1),
    "roll by its size": lambda x: jnp.roll(x, x.shape[-1], -1),
    "roll of all axes": lambda x: jnp.roll(x, (0, 1), (1, -1)),
    "pad of 0": lambda x: jnp.pad(x, [(0, 0)] * x.ndim),
    "empty slice before": lambda x: jnp.concatenate([x[..., :0], x], -1),
    "empty slice after": lambda x: jnp.concatenate([x, x[..., x.shape[-1] :]], -1),
    "empty between": lambda x: jnp.concatenate([x[..., :2], x[..., 2:2], x[..., 2:]], -1),
    "empty sections": lambda x: jnp.concatenate(jnp.split(x, [0, 1, 1], -1), -1),
    "empty tokens": lambda x: jnp.concatenate([x[:, :0], x, x[:, :0]], 1),
    "concatenation of one": lambda x: jnp.concatenate([x], -1),
    "repeat once": lambda x: jnp.repeat(x, 1, -1),
    "tile once": lambda x: jnp.tile(x, 1),
    "sum of nothing": lambda x: x + x[..., :0].sum(-1, keepdims=True),
    "product of nothing": lambda x: x * jnp.prod(x[..., :0], -1, keepdims=True),
    "broadcast of itself": lambda x: jnp.broadcast_to(x, x.shape),
    "reshape of itself": lambda x: x.reshape(x.shape),
    "update of nothing": lambda x: x.at[..., :0].set(1.0),
    "all of it": lambda x: x[..., 0 : x.shape[-1] : 1],
    "two halves of one": lambda x: jnp.concatenate([x[..., :1], x[..., 1:]], -1),
    "last set apart": lambda x: jnp.concatenate([jnp.cos(x[..., :-1]), x[..., -1:]], -1),
    "one channel in the middle": lambda x: jnp.concatenate(
        [x[..., :1], 2 * x[..., 1:2], x[..., 2:]], -1
    ),
    "nothing stays": lambda x: x + jnp.zeros((0, *x.shape)).sum(0),
    "identity by an empty contraction": lambda x: x + x[..., :0] @ jnp.ones((0, x.shape[-1])),
}  # fmt: skip


@layer(keeps=True)
def nothing(draw: Draw, shape: Shape) -> Layer:
    """What changes nothing, or works on a piece of no or one channel."""
    name = draw.one(list(NOTHING))
    return plain(shape, f"nothing: {name}", NOTHING[name])


MODES = (
    "constant", "edge", "linear_ramp", "maximum", "mean", "median", "minimum", "reflect",
    "symmetric", "wrap",
)  # fmt: skip


@layer()
def padded_by(draw: Draw, shape: Shape) -> Layer:
    """All modes of jnp.pad, along channels or the axis after the batch; widths may be 0."""
    mode, axis = draw.one(MODES), draw.one([1, -1, -1])
    widths = [(0, 0)] * len(shape)
    widths[axis] = draw.one([(1, 2), (0, 1), (2, 0), (0, 0), (1, 1)])

    def apply(x: Any) -> Any:
        return jnp.pad(x, widths, mode=mode)

    made = jax.eval_shape(apply, jax.ShapeDtypeStruct(shape, np.float64)).shape
    return plain(made, f"padded_by {mode} {widths[axis]} along {axis}", apply)


@layer(keeps=True)
def empty_parameter(draw: Draw, shape: Shape) -> Layer:
    """Parameters without entries: contracted, concatenated, summed."""
    c, how = shape[-1], draw.one(["contracted", "concatenated", "summed", "unused"])
    form = {"contracted": (c, 0), "concatenated": (0,), "summed": (0, c), "unused": (0, 3)}[how]
    params = {"none": np.zeros(form), "scale": draw.positive(c)}
    if how == "contracted":
        params["back"] = np.zeros((0, c))

    def apply(p: Params, x: Any) -> Any:
        if how == "contracted":
            return p["scale"] * x + (x @ p["none"]) @ p["back"]
        if how == "concatenated":
            return x * jnp.concatenate([p["none"], p["scale"]])
        return x * (p["scale"] + p["none"].sum(0) if how == "summed" else p["scale"])

    return Layer(f"empty_parameter {how}", params, apply, shape)


@layer(keeps=True)
def pieces(draw: Draw, shape: Shape) -> Layer | None:
    """Cut into sections, some empty or of one channel; some of them are changed."""
    c = shape[-1]
    if c < 3:
        return None
    ends = sorted(int(k) for k in draw.rng.integers(0, c + 1, draw.one([1, 2, 3])))
    each = [draw.one([jnp.tanh, jnp.cos, lambda x: x, lambda x: 0.5 * x]) for _ in range(4)]
    params = {"scale": draw.positive(c)} if draw.maybe() else {}

    def apply(p: Params, x: Any) -> Any:
        parts = [f(part) for f, part in zip(each, jnp.split(x, ends, -1))]
        y = jnp.concatenate(parts, -1)
        return y * jnp.concatenate(jnp.split(p["scale"], ends)[::-1]) if p else y

    return Layer(f"pieces at {ends}", params, apply, shape)
