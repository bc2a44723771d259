"""Arrays that are drawn without JAX, which compiles a program for each shape that it draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int) -> jax.Array:
    """Returns a float32 array of the shape, from a normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def drawn(shapes: Any) -> Any:
    """Returns the tree with an array for each ``ShapeDtypeStruct``; random keys stay the same one.

    Other leaves stay as they are.
    """
    rng = np.random.default_rng(0)

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.asarray(rng.normal(size=x.shape).astype(x.dtype))

    return jax.tree.map(leaf, shapes)
