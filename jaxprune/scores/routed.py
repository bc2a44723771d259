"""Scores of whole experts from what a mixture does with tokens: who is chosen, and what it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress
from jaxprune.scores.evidence import Batches, watched
from jaxprune.typing import Params

Route = Callable[..., Mapping[str, tuple[Any, Any, Any]]]


class ExpertScores(NamedTuple):
    r"""Scores of the experts of one layer, (experts,) float64 each; larger = keep.

    With :math:`X_e` the tokens that choose expert e, among all tokens X, :math:`g_e` its gate and
    :math:`f_e` its output:

    Attributes:
      frequency: :math:`|X_e| / |X|`.
      gate: the mean gate over all tokens, :math:`\sum_{x \in X_e} g_e(x) / |X|`.
      norm: the sum of the outputs' norms, :math:`\sum_{x \in X_e} \|f_e(x)\|_2`.
      reap: the mean of what it adds, :math:`\sum_{x \in X_e} g_e(x) \|f_e(x)\|_2 / |X_e|`; 0 for
        an expert that no token chooses.
    """

    frequency: np.ndarray
    gate: np.ndarray
    norm: np.ndarray
    reap: np.ndarray


def experts(
    route: Route,
    params: Params,
    batches: Batches,
    *,
    count: int | Mapping[str, int],
    progress: Progress = None,
) -> dict[str, ExpertScores]:
    """Returns scores of the experts of each layer, from batches of data.

    Args:
      route: ``route(params, *batch) -> {layer: (chosen, gates, outputs)}``, which mixtures compute
        anyway: chosen (..., k) are the experts of each token, gates (..., k) what their outputs are
        multiplied with, outputs (..., k, features) those outputs before. It is compiled once per
        shape of batch. Where layers have the names that ``jp.experts.find`` gives, scores lead to
        ``remove`` by name.
      params: any pytree of arrays.
      batches: a list of tuples of what follows params.
      count: how many experts there are, one number or {layer: number}.
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        batches, such as ``tqdm.tqdm``.

    Returns:
      {layer: :class:`ExpertScores`}.

    Raises:
      TypeError: for batches that are used up after one pass, or a batch that is no tuple; for a
        route that doesn't return {layer: (chosen, gates, outputs)}.
      ValueError: without batches; for shapes that don't belong together, or chosen experts beyond
        the count.

    References:
      Lasby et al., `REAP the Experts <https://arxiv.org/abs/2510.13999>`__, 2025: ``reap`` is its
      router-weighted expert activation, ``frequency`` and ``norm`` what it is compared with.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> def route(params, x):  # two experts, one of which doubles, the other one negates
      ...     chosen = (x[:, :1] < 0).astype(int)
      ...     return {"moe": (chosen, jnp.full(x.shape, 0.5), jnp.stack([x * (2 - 3 * chosen)], 1))}
      >>> found = jp.scores.experts(route, {}, [(jnp.array([[1.0], [2.0], [-4.0]]),)], count=2)
      >>> found["moe"].frequency.round(2), found["moe"].reap
      (array([0.67, 0.33]), array([1.5, 2. ]))
    """
    sums = jax.jit(lambda p, *batch: _sums(route(p, *batch), count))
    total: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    for batch in watched(batches, progress):
        for name, (found, seen, largest) in sums(params, *batch).items():
            _check_range(name, int(largest), found.shape[1])
            total[name] = total.get(name, 0) + np.asarray(found, np.float64)
            tokens[name] = tokens.get(name, 0) + int(seen)
    return {name: _scores(rows, tokens[name]) for name, rows in total.items()}


def _scores(rows: np.ndarray, tokens: int) -> ExpertScores:
    times, gate, norm, added = rows
    return ExpertScores(times / tokens, gate / tokens, norm, added / np.maximum(times, 1))


def _sums(routed: Any, count: int | Mapping[str, int]) -> dict[str, Any]:
    if not isinstance(routed, Mapping) or not all(isinstance(x, tuple) for x in routed.values()):
        raise TypeError(
            f"route returned a {type(routed).__name__}; wanted {{layer: (chosen, gates, outputs)}}"
        )
    counts = dict.fromkeys(routed, count) if isinstance(count, int) else count
    return {name: _of_layer(name, x, counts[name]) for name, x in routed.items()}


def _of_layer(name: str, routed: tuple[Any, Any, Any], count: int) -> Any:
    """Sums of one, gates, norms, and their products over the tokens of each expert."""
    chosen, gates, outputs = routed
    if chosen.shape != gates.shape or outputs.shape[:-1] != chosen.shape:
        raise ValueError(
            f"route gives {name!r} chosen experts of shape {chosen.shape}, gates {gates.shape} and "
            f"outputs {outputs.shape}; wanted (..., k), (..., k) and (..., k, features)"
        )
    norms = jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1).reshape(-1)
    gate, index = gates.astype(jnp.float32).reshape(-1), chosen.reshape(-1)
    rows = jnp.stack([jnp.ones_like(gate), gate, norms, gate * norms])
    found = jnp.zeros((4, count)).at[:, index].add(rows)
    return found, chosen.size // chosen.shape[-1], jnp.max(jnp.abs(chosen))


def _check_range(name: str, largest: int, count: int) -> None:
    if largest >= count:
        raise ValueError(
            f"route gives {name!r} expert {largest} of {count}; give the number of experts: count="
        )
