"""Which leaves a pattern prunes, by how much each, and the checks on what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float, is_number, leaf_name
from jaxprune._trees import difference
from jaxprune.distributions import Rule, as_distribution, counts_of
from jaxprune.selection import kept_count, known
from jaxprune.typing import Distribution, Masks, Scores, Where, named_leaves

_NO_KERNELS = ("bias", "scale", "mean", "var")


def is_kernel(path: str, leaf: Any) -> bool:
    """Is it a float leaf of rank 2 or more that is not named bias, scale, mean or var?

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> jp.is_kernel("dense/kernel", jnp.ones((2, 3))), jp.is_kernel("dense/bias", jnp.ones(3))
      (True, False)
    """
    return is_float(leaf) and leaf.ndim >= 2 and leaf_name(path) not in _NO_KERNELS


def check_sparsity(sparsity: Any) -> None:
    """Raises ValueError unless a known sparsity is one number in [0, 1]."""
    if np.shape(sparsity) != ():
        raise ValueError(
            f"sparsity has shape {np.shape(sparsity)}; wanted one number in [0, 1]; a sparsity per "
            'leaf is a distribution: jp.unstructured({"*/kernel": 0.9})'
        )
    if known(sparsity) and not (is_number(sparsity) and 0 <= float(sparsity) <= 1):
        raise ValueError(f"sparsity is {sparsity!r}; wanted a fraction in [0, 1] such as 0.9")


class Chosen(NamedTuple):
    """The leaves that a pattern prunes, and what it takes to build a whole tree again."""

    leaves: dict[str, jax.Array]  # path -> scores
    paths: list[str]  # of all leaves
    treedef: Any

    def masks(self, masks: dict[str, jax.Array]) -> Masks:
        dense = jnp.asarray(True)
        return jax.tree.unflatten(self.treedef, [masks.get(p, dense) for p in self.paths])


def choose(scores: Scores, where: Where) -> Chosen:
    """The leaves that ``where`` means; raises unless there are some, and they can be ranked."""
    named, treedef = named_leaves(scores), jax.tree.structure(scores)
    if not named:
        raise ValueError("scores is an empty tree; pass the scores of params: jp.magnitude(params)")
    found = [(path, leaf) for path, leaf in named if where(path, leaf)]
    if not found:
        shapes = ", ".join(f"{path}{list(np.shape(leaf))}" for path, leaf in named[:8])
        raise ValueError(
            f"where={getattr(where, '__name__', where)} selects none of the leaves {shapes}; pass "
            "where=lambda path, leaf: ... that is true for some"
        )
    for path, leaf in found:
        if not is_float(leaf) or jnp.iscomplexobj(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                f"the scores of {path} are {kind}{list(np.shape(leaf))}; wanted real floats: cast "
                "them, or leave the leaf out with where=lambda path, leaf: ..."
            )
    leaves, paths = dict(found), [path for path, _ in named]
    _check_nan(leaves)
    return Chosen(leaves, paths, treedef)


def _check_nan(leaves: dict[str, jax.Array]) -> None:
    """Raises for NaN where scores are known; traced NaN ranks lowest."""
    here = {path: leaf for path, leaf in leaves.items() if known(leaf)}
    bad = [path for path, is_bad in zip(here, _any_nan(list(here.values()))) if is_bad]
    if bad:
        raise ValueError(
            f"the scores of {bad[0]}, shape {here[bad[0]].shape}, hold NaN and can't be ranked; "
            "look for it in params and gradients, or write jax.tree.map(jnp.nan_to_num, scores)"
        )


def _any_nan(leaves: list[jax.Array]) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(_nan_flags(leaves))


@jax.jit
def _nan_flags(leaves: list[jax.Array]) -> jax.Array:
    return jnp.array([jnp.any(jnp.isnan(leaf)) for leaf in leaves], bool)


def distribute(
    distribution: Distribution | Mapping[str, Rule], scores: dict[str, jax.Array], sparsity: Any
) -> dict[str, Any]:
    """One sparsity per leaf, checked."""
    sparsities = as_distribution(distribution)(scores, sparsity)
    got: Any = jax.tree.structure(sparsities)
    if got != jax.tree.structure(scores):
        raise ValueError(
            f"the distribution returned another tree than its scores: it {difference(got, scores)}"
            f"; wanted one sparsity for each of {list(scores)[:8]}, in a dict"
        )
    for path, value in sparsities.items():
        if not is_number(value) or (known(value) and not 0 <= float(value) <= 1):
            raise ValueError(
                f"the distribution gives {path} sparsity {value}; wanted one number in [0, 1]"
            )
    return sparsities


def kept_counts(
    distribution: Distribution | Mapping[str, Rule], scores: dict[str, jax.Array], sparsity: Any
) -> dict[str, Any]:
    """How many entries (or units) each leaf keeps."""
    exact = counts_of(distribution)
    if exact is not None:
        return exact(scores, sparsity)
    sparsities = distribute(distribution, scores, sparsity)
    found: dict[Any, Any] = {}  # What leaves have in common is traced once.
    for path, leaf in scores.items():
        asked = leaf.size, id(sparsities[path])
        if asked not in found:
            found[asked] = kept_count(leaf.size, sparsities[path])
    return {path: found[leaf.size, id(sparsities[path])] for path, leaf in scores.items()}
