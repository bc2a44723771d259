"""Arrays in the memory of this host, and agreement among processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)


def to_host(leaf: Any) -> np.ndarray:
    """The whole of a leaf, bitwise; of random keys the words.

    Where a leaf is spread over processes, all of them must call this, in the same order.
    """
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def agree(error: BaseException | None, what: str) -> None:
    """Waits for all processes; raises in each of them when one of them has failed."""
    failed = np.asarray([error is not None])
    if jax.process_count() > 1:
        failed = np.asarray(multihost_utils.process_allgather(failed))
    if error is not None:
        raise error
    if failed.any():
        raise OSError(f"{what} failed in another process, whose own error says why")
