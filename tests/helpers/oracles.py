"""What tests compare with: the same thing computed the slow way, in numpy, by sorting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.helpers.arrays import drawn


def keep_largest(scores: Any, k: int) -> np.ndarray:
    """A full stable sort, descending: the first k places are kept. NaN counts as lowest of all."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    kept = np.zeros(flat.size, bool)
    kept[np.lexsort((-flat, np.isnan(flat)))[:k]] = True
    return kept.reshape(np.shape(scores))


def keep_n_of_m(scores: Any, n: int, m: int, axis: int) -> np.ndarray:
    """Each group is sorted on its own."""
    lines = np.moveaxis(np.asarray(scores).astype(np.float64), axis, -1)
    groups = lines.reshape(-1, m)
    kept = np.stack([keep_largest(group, n) for group in groups])
    return np.moveaxis(kept.reshape(lines.shape), -1, axis)


def n_of_m(scores: Any, n: int, m: int) -> np.ndarray:
    """n of every m along the first of two axes."""
    rows, columns = np.shape(scores)
    groups = np.reshape(scores, (rows // m, m, columns))
    return keep_n_of_m(groups, n, m, axis=1).reshape(rows, columns)


def ranked(scores: Any, sparsity: Any) -> Any:
    """A pattern: unstructured, by counting for each entry which are ahead. It compiles fast."""

    def leaf(score: Any) -> Any:
        if score.ndim < 2:
            return jnp.asarray(True)
        x, place = score.ravel().astype(jnp.float32), jnp.arange(score.size)
        ahead = (x > x[:, None]) | ((x == x[:, None]) & (place < place[:, None]))
        kept = jnp.sum(ahead, axis=1, dtype=jnp.float32) < jnp.round((1 - sparsity) * score.size)
        return kept.reshape(score.shape)

    return jax.tree.map(leaf, scores)


def kept_count(size: int, sparsity: float) -> int:
    return max(size - round(size * sparsity), int(sparsity < 1))


def kept_total(sizes: list[int], sparsity: float) -> int:
    """Of all entries together, and one of each leaf that has any."""
    total = sum(sizes)
    return max(total - round(total * sparsity), sum(n > 0 for n in sizes) * (sparsity < 1))


def erk(shapes: list[tuple[int, ...]], sparsity: float, power: float) -> list[float]:
    """Solve, make the densest leaf dense if it exceeds 1, and solve again."""
    sizes = [np.prod(shape) for shape in shapes]
    raw = [(sum(shape) / size) ** power for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free)
        worst = max(free, key=lambda i: raw[i])
        if scale * raw[worst] <= 1:
            return [0.0 if i in dense else 1 - scale * raw[i] for i in range(len(shapes))]
        dense.add(worst)
    return [0.0] * len(shapes)


def keep_counts(scores: list[Any], shares: list[int], least: list[int]) -> list[int]:
    """Walk down one sorted list of all entries until enough are kept."""
    owner = np.concatenate([np.full(np.size(x), i) for i, x in enumerate(scores)])
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in scores])
    seen = [0] * len(scores)
    kept = list(least)
    for i in owner[np.argsort(-flat, kind="stable")]:
        if sum(kept) >= sum(shares):
            break
        seen[i] += 1
        kept[i] = max(kept[i], seen[i])
    return kept


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(12, 4, rngs=rngs)


def trees() -> dict[str, Any]:
    """One network's worth of parameters in each kind of tree that users have."""
    rng = np.random.default_rng(0)
    w, v = (jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in [(8, 12), (12, 4)])
    b, c = jnp.asarray(np.ones(12, np.float32)), jnp.asarray(np.ones(4, np.float32))
    mlp = eqx.filter_eval_shape(lambda: eqx.nn.MLP(8, 4, 12, 1, key=jax.random.key(0)))
    return {
        "dict": {"up": {"kernel": w, "bias": b}, "down": {"kernel": v}, "step": jnp.int32(3)},
        "tuple": (w, (b, [v]), None, jax.random.key(0)),
        "dataclass": [Layer(w, b), Layer(v.astype(jnp.bfloat16), c)],
        "nnx": drawn(nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))[1]),
        "equinox": drawn(mlp),
    }


TREES = trees()
