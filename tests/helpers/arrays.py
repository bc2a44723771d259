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
    """Returns the tree with a random array for each ``ShapeDtypeStruct``; integers are zero."""
    rng = np.random.default_rng(0)

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        new = rng.normal(size=x.shape) if is_float else np.zeros(x.shape)
        return jnp.asarray(np.asarray(new, x.dtype))

    return jax.tree.map(leaf, shapes)
