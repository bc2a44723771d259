"""Scores of whole units, {dimension: vector}, from a loss and batches of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxprune import reduce
from jaxprune._leaf import is_float
from jaxprune._progress import Progress
from jaxprune.scores.evidence import Batches, Loss, examples, split, watched
from jaxprune.scores.gradients import taylor
from jaxprune.sharding import host
from jaxprune.typing import Params

if TYPE_CHECKING:
    from jaxprune.structure.dimensions import Structure

Units = dict[str, Any]
Join = Callable[[Any], Params]  # the leaves that hold floats -> params


def taylor_units(
    structure: Structure,
    params: Params,
    loss: Loss,
    batches: Batches,
    *,
    fisher: bool = False,
    progress: Progress = None,
) -> Units:
    r"""Returns by how much the loss changes with each unit, to first order and squared.

    .. math:: S_u = \frac{1}{B} \sum_b \Bigl( \sum_{i \in u} w_i \,
              \partial L_b / \partial w_i \Bigr)^2

    over B batches, where i runs over the entries in all slots of unit u: what its weights gain and
    lose together counts, and not each alone. Running statistics have no vote. One program is
    compiled for each shape of batch, and memory is that of one gradient.

    Args:
      structure: what ``jp.infer_structure`` found for params.
      params: any pytree of arrays.
      loss: ``(params, *batch) ->`` a number; or a tuple of it and anything else, such as updated
        statistics.
      batches: a list of tuples of what follows params, ``[(x, y), ...]``; arrays may be sharded.
      fisher: whether each example is a batch of its own, which takes as much longer as a batch has
        examples. The first axis of all arrays is then the example.
      progress: None or True for a bar, False for silence, or a function such as ``tqdm.tqdm``.

    Returns:
      {dimension: (units,) float32}, larger = keep, for each dimension that can be pruned: scores
      for ``jp.search`` and ``jp.structured``.

    Raises:
      TypeError: for batches that are used up after one pass, or a batch that is no tuple.
      ValueError: for params of another structure, no batches, a loss that is no number, or scores
        that are not finite.

    References:
      Molchanov et al., `Importance Estimation <https://arxiv.org/abs/1906.10771>`__, 2019, eq. 8,
      with the square taken in each batch, and over all slots of a unit in place of one filter. With
      ``fisher`` it is the diagonal of Liu et al., `Group Fisher Pruning
      <https://arxiv.org/abs/2108.00708>`__, 2021, where masks stand for weights.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [0.0]])}
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> x, y = jnp.ones((1, 1)), jnp.zeros((1, 1))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> loss = lambda p, x, y: jnp.sum((fn(p, x) - y) ** 2) / 2
      >>> jp.scores.taylor_units(structure, params, loss, [(x, y)])
      {'up:1': array([324.,   0.], dtype=float32)}
    """
    structure.check_params(params)
    floats, join = split(params)
    one = jax.jit(
        _of_examples(structure, loss, join) if fisher else _of_batch(structure, loss, join)
    )
    total: Units = {}
    count = 0
    for batch in watched(batches, progress):
        jax.block_until_ready(total)  # One batch is ahead at most, so that what is shown is true.
        found = one(floats, *batch)
        total = {name: total.get(name, 0.0) + vector for name, vector in found.items()}
        count += 1
    return _finite({name: host(vector) / count for name, vector in total.items()})


def number(loss: Loss) -> Loss:
    """The loss alone, of a function that returns it alone or before something else."""

    def first(params: Params, *batch: Any) -> Any:
        found = loss(params, *batch)
        value = found[0] if isinstance(found, tuple) else found
        if getattr(value, "shape", ()) != ():
            raise ValueError(
                f"the loss returns {value.dtype}{list(value.shape)}; wanted a number, such as "
                "the mean over the batch, or a tuple of it and anything else"
            )
        return value

    return first


def _of_batch(
    structure: Structure, loss: Loss, join: Callable[..., Params]
) -> Callable[..., Units]:
    steep = jax.grad(lambda floats, *batch: number(loss)(join(floats), *batch))

    def units(floats: list[Any], *batch: Any) -> Units:
        params, grad = join(floats), join(steep(floats, *batch))
        products = taylor(params, grad=grad)
        numbers = jax.tree.map(lambda p: p if is_float(p) else jnp.zeros(jnp.shape(p)), products)
        return structure.unit_scores(numbers, reduce.taylor)

    return units


def _of_examples(structure: Structure, loss: Loss, join: Join) -> Callable[..., Units]:
    one = _of_batch(structure, loss, join)

    def units(floats: list[Any], *batch: Any) -> Units:
        each = jax.lax.map(lambda example: one(floats, *example), examples(batch))
        return jax.tree.map(lambda vectors: jnp.mean(vectors, 0), each)

    return units


def _finite(units: Units) -> Units:
    for name, vector in units.items():
        if not jnp.isfinite(vector).all():
            raise ValueError(
                f"the scores of {name}, {vector.shape[0]} units, are not finite: the loss or its "
                "gradient is NaN or infinite on some batch; look at jax.grad(loss)(params, *batch)"
            )
    return units
