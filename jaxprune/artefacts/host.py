"""Arrays in the memory of this host, and agreement among processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxprune.sharding import host


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)


def to_host(leaf: Any) -> np.ndarray:
    """The whole of a leaf, bitwise; of random keys the words.

    Where a leaf is spread over processes, all of them must call this, in the same order.
    """
    return host(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def agree(error: BaseException | None, what: str) -> None:
    """Waits for all processes; raises in each of them when one of them has failed."""
    failed = np.asarray([error is not None])
    if jax.process_count() > 1:
        failed = np.asarray(multihost_utils.process_allgather(failed))
    if error is not None:
        raise error
    if failed.any():
        raise OSError(f"{what} failed in another process, whose own error says why")
