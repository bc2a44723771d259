"""What every method in this package shares: the update that lands on the masked parameters.

optax only ever adds: ``apply_updates`` computes ``p + u``. An entry is therefore pruned by the
update ``-p``, because ``p + (-p)`` is exactly +0 for each finite float.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._leaf import is_float
from jaxprune.masks import check_masks, check_structure
from jaxprune.selection import known
from jaxprune.sharding import over
from jaxprune.typing import Masks, Params, PyTree, Scores, path_str

_RESTORE = "restore a checkpoint with jax.eval_shape(tx.init, params) as its target"


def land_on_masked(updates: PyTree, params: Params, masks: Masks) -> PyTree:
    """Updates after which ``optax.apply_updates`` gives exactly 0 where masks are False.

    Kept entries keep the value of their update. The type is the wider one of update and parameter:
    a bfloat16 ``-p`` would miss a float32 ``p`` by its rounding.
    """

    def leaf(update: Any, param: Any, mask: Any) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(update), jnp.result_type(param))
        kept = over(mask, param)
        return jnp.where(kept, jnp.asarray(update, dtype), -jnp.asarray(param, dtype))

    return jax.tree.map(leaf, updates, params, masks)


def where_kept(masks: Masks, tree: PyTree) -> PyTree:
    """``tree`` with 0 where masks are False; of what else is there nothing comes through."""
    return jax.tree.map(lambda m, x: jnp.where(over(m, x), x, jnp.zeros_like(x)), masks, tree)


def hold(scores: Scores, masks: Masks, when: Any = True) -> Scores:
    """Scores in which pruned entries count as 0 and lose all ties, if ``when``.

    Not as -inf: a root mean square over a leaf and a sum over a unit must stay what they are.
    """

    free = ~jnp.asarray(when)

    def leaf(score: Any, mask: jax.Array) -> Any:
        if not jnp.issubdtype(score.dtype, jnp.floating):
            return score  # counters and random keys are never pruned
        kept = over(mask | free, score)
        return jnp.where(kept, score, -jnp.finfo(score.dtype).tiny)

    return jax.tree.map(leaf, scores, masks)


def check_update(name: str, updates: PyTree, params: Params | None, state: Any) -> None:
    """Raises ValueError unless updates, params and the state's masks belong together."""
    if not hasattr(state, "masks"):  # what a checkpoint gives back that was given no target
        raise TypeError(
            f"the state of {name} is a {type(state).__name__}; wanted what tx.init(params) "
            f"returns: {_RESTORE}"
        )
    if params is None:
        raise ValueError(
            f"{name} lands updates on masked parameters, so it must see them, and params is None; "
            "write tx.update(grads, state, params)"
        )
    check_like("updates", updates, params, "pass the gradients of these parameters")
    try:
        check_masks(params, state.masks)
    except ValueError as error:
        raise ValueError(
            f"the state of {name} was made for other parameters than it is given now; "
            f"write state = tx.init(params), or {_RESTORE} ({error})"
        ) from error


def all_pruned(masks: Masks) -> Masks:
    """Masks that keep no entry of a leaf that may be pruned at all."""
    return jax.tree.map(lambda mask: np.asarray(jnp.ndim(mask) == 0), masks)


def check_finite(name: str, params: Params, masks: Masks) -> None:
    """Raises ValueError for a NaN or an infinity, where masks are False and both are known."""
    flat = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(masks), strict=True)
    for (path, leaf), mask in flat:
        here = is_float(leaf) and known(leaf) and known(mask)
        if here and _count_not_finite(leaf, mask):
            raise ValueError(
                f"{name} prunes {path_str(path)}, {leaf.dtype}{list(leaf.shape)}, which holds NaN "
                "or infinity, and no update brings that to 0; write params = jax.tree.map("
                "jnp.nan_to_num, params), or leave the leaf dense with where=lambda path, leaf: ..."
            )


def _count_not_finite(leaf: Any, mask: Any) -> int:
    with jax.ensure_compile_time_eval():
        return int(_not_finite(leaf, mask))


@jax.jit
def _not_finite(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf) & ~mask)


def check_like(what: str, tree: PyTree, params: Params, instead: str) -> None:
    """Raises ValueError, naming a leaf, unless ``tree`` has params' structure and shapes."""
    check_structure(what, tree, params, instead)
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True)
    for (path, param), leaf in pairs:
        if np.shape(leaf) != np.shape(param):
            raise ValueError(
                f"{what} have the shape {np.shape(leaf)} at {path_str(path)}, params have "
                f"{np.shape(param)}; {instead}"
            )


def is_placeholder(params: Any) -> bool:
    """Is this not a tree of parameters, but what ``optax.tree_map_params`` calls ``init`` with?"""
    kinds: set[type] = set()

    def init(placeholder: Any) -> tuple[()]:
        kinds.add(type(placeholder))
        return ()

    optax.tree_map_params(init, lambda leaf: leaf, ())
    return type(params) in kinds
