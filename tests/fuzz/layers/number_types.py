"""Parameters of other types: integer, boolean, complex, of 16 and 32 bits, scalars."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import plain

SHORT = (jnp.bfloat16, jnp.float16, np.float32)


@layer()
def short_dense(draw: Draw, shape: Shape) -> Layer:
    """A kernel of few bits; the product in its type, in the data's, or accumulated in float32."""
    width, dtype = draw.width(), draw.one(SHORT)
    how = draw.one(["in it", "wider", "accumulated"])
    params = {"kernel": draw.weights(shape[-1], width).astype(dtype)}
    if draw.maybe():
        params["bias"] = draw.weights(width).astype(draw.one(SHORT))

    def apply(p: Params, x: Any) -> Any:
        if how == "in it":
            y = x.astype(dtype) @ p["kernel"]
        elif how == "wider":
            y = x @ p["kernel"].astype(x.dtype)
        else:
            y = jnp.matmul(x.astype(dtype), p["kernel"], preferred_element_type=np.float32)
        y = y + p["bias"] if "bias" in p else y
        return y.astype(x.dtype)

    return Layer(f"short_dense {np.dtype(dtype).name} {how}", params, apply, (*shape[:-1], width))


@layer()
def complex_dense(draw: Draw, shape: Shape) -> Layer:
    """A complex kernel, of which real numbers are made again."""
    width, dtype = draw.width(), draw.one([np.complex128, np.complex128, np.complex64])
    how = draw.one(["real", "square", "both", "real times imaginary", "conjugate"])
    kernel = draw.weights(shape[-1], width) + 1j * draw.weights(shape[-1], width)
    params = {"kernel": kernel.astype(dtype)}
    if draw.maybe():
        params["phase"] = np.exp(1j * draw.rng.normal(size=width)).astype(dtype)
    wide = 2 * width if how == "both" else width

    def apply(p: Params, x: Any) -> Any:
        y = x @ p["kernel"]
        y = y * p["phase"] if "phase" in p else y
        made: dict[str, Any] = {
            "real": lambda: y.real,
            "square": lambda: (y * y.conj()).real,
            "both": lambda: jnp.concatenate([y.real, y.imag], -1),
            "real times imaginary": lambda: y.real * y.imag,
            "conjugate": lambda: (y + 0.5 * jnp.conj(y)).imag,
        }
        return made[how]().astype(x.dtype)

    return Layer(f"complex_dense {how}", params, apply, (*shape[:-1], wide))


@layer(keeps=True)
def complex_rotation(draw: Draw, shape: Shape) -> Layer | None:
    """Neighbouring channels as complex numbers, turned by complex or real parameters."""
    c = shape[-1]
    if c % 2:
        return None
    params: Params = {"turn": np.exp(1j * draw.rng.normal(size=c // 2))}
    if draw.maybe():
        params = {"turn": draw.weights(c // 2)}

    def apply(p: Params, x: Any) -> Any:
        turn = p["turn"] if jnp.iscomplexobj(p["turn"]) else jnp.exp(1j * p["turn"])
        z = lax.complex(x[..., ::2], x[..., 1::2]) * turn
        return jnp.stack([z.real, z.imag], -1).reshape(x.shape)

    return Layer("complex_rotation", params, apply, shape)


@layer(keeps=True)
def fourier(draw: Draw, shape: Shape) -> Layer:
    """Mixing by a discrete Fourier transform along tokens or channels."""
    axis = draw.one([1, -1])
    return plain(shape, f"fourier along {axis}", lambda x: jnp.fft.fft(x, axis=axis).real)


@layer()
def quantised_dense(draw: Draw, shape: Shape) -> Layer:
    """A kernel of integers with scales; the product of integers, or of what they stand for."""
    c, width, dtype = shape[-1], draw.width(), draw.one([np.int8, np.int32, np.uint8])
    kernel = draw.rng.integers(1, 8, (c, width)) * draw.rng.choice([-1, 1], (c, width))
    kernel = (np.abs(kernel) if dtype is np.uint8 else kernel).astype(dtype)
    params: Params = {"kernel": kernel, "scale": 0.1 * draw.positive(width)}
    if draw.maybe():
        params["zero"] = draw.rng.integers(1, 4, width).astype(dtype)
    how = draw.one(["dequantised", "integers"])

    def apply(p: Params, x: Any) -> Any:
        w = p["kernel"].astype(np.int32) - p["zero"] if "zero" in p else p["kernel"]
        if how == "integers":
            return (jnp.round(4 * x).astype(np.int32) @ w.astype(np.int32)) * p["scale"] / 4
        return x @ (w * p["scale"])

    return Layer(
        f"quantised_dense {np.dtype(dtype).name} {how}", params, apply, (*shape[:-1], width)
    )


@layer(keeps=True)
def switches(draw: Draw, shape: Shape) -> Layer:
    """A boolean or integer parameter says which channels pass, or is their bias."""
    c, how = shape[-1], draw.one(["where", "times", "shift", "compared"])
    params: Params = {"on": np.ones(c, draw.one([np.bool_, np.int8, np.int32]))}
    if how == "compared":
        params = {"on": draw.rng.integers(1, 4, c)}

    def apply(p: Params, x: Any) -> Any:
        on = p["on"]
        if how == "where":
            return jnp.where(on != 0, x, 0.3)
        if how == "times":
            return x * on
        return jnp.where(on > 1, x, jnp.tanh(x)) if how == "compared" else x + on

    return Layer(f"switches {how} {params['on'].dtype}", params, apply, shape)


@layer(keeps=True)
def odd_leaves(draw: Draw, shape: Shape) -> Layer:
    """Scalars, arrays of one entry, none, or of few bits, and such as nothing reads."""
    params: Params = {
        "scale": np.asarray(draw.rng.uniform(0.5, 1.5)),
        "step": np.asarray(draw.one([3, 7]), np.int32),
        "one": draw.weights(1, 1),
        "none": np.zeros(draw.one([(0,), (0, 3), (2, 0)])),
        "unread": draw.weights(shape[-1]).astype(draw.one(SHORT)),
        "complex": np.asarray(0.5 + 0.5j),
    }
    params = {k: v for k, v in params.items() if k == "scale" or draw.maybe()}

    def apply(p: Params, x: Any) -> Any:
        y = x * p["scale"]
        y = y / (1 + p["step"]) if "step" in p else y
        y = y + p["one"][0, 0] if "one" in p else y
        y = y + p["none"].sum() if "none" in p else y
        return y + (p["complex"] * y).imag if "complex" in p else y

    return Layer(f"odd_leaves {', '.join(params)}", params, apply, shape)
