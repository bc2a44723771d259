"""Scores of whole units, {dimension: vector}, from the loss without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune._progress import Progress, track
from jaxprune.masks import apply_masks
from jaxprune.scores.evidence import Batches, Loss, check_batches
from jaxprune.scores.units import number, taylor_units
from jaxprune.sharding import host
from jaxprune.structure.named_scores import rankable
from jaxprune.typing import Masks, Params

if TYPE_CHECKING:
    from jaxprune.structure.dimensions import Structure

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
TILT = 1e-3  # Where a curve is straight its units differ by this share, in their order;
FREE = 1e-12  # units that lower the loss together count as so much.


Repair = Callable[[Params, Masks], Params]


class Measured(dict[str, Any]):
    """Scores of units whose sums were measured: ``jp.search`` adds nothing of its own to them.

    Attributes:
      curves: dimension -> (numbers of units that went, by how much the loss rose).
    """

    curves: dict[str, tuple[list[int], list[float]]]


def loss_units(
    structure: Structure,
    params: Params,
    loss: Loss,
    batches: Batches,
    *,
    order: Mapping[str, Any] | None = None,
    measured: int = 8,
    shares: Sequence[float] = SHARES,
    repair: Repair | None = None,
    progress: Progress = None,
) -> Measured:
    r"""Returns by how much the loss rises as units go, measured, one dimension at a time.

    The worst units of a dimension are masked, an eighth, a quarter and so on, and all else stays.
    What scores of single units add up to is far from that where most of a dimension goes: each of
    four heads may be spared alone, and three of them not. A unit's score is the rise when it goes
    after all that are worse,

    .. math:: S_{(k)} = C(k) - C(k - 1)

    where C(k) is the largest convex curve below the rises of the mean loss that were measured, and
    units are taken with the worst first. So the scores of those that go add up to what was
    measured, within a thousandth, wherever the rise of the loss is convex; where pruning lowers
    the loss they are all but 0.

    Args:
      structure: what ``jp.infer_structure`` found for params.
      params: any pytree of arrays.
      loss: ``(params, *batch) ->`` a number; or a tuple of it and anything else, such as updated
        statistics. In the mode of training BatchNorm takes the statistics of the batch, which are
        those of the masked network.
      batches: a list of tuples of what follows params, ``[(x, y), ...]``; arrays may be sharded.
      order: scores that tell the units of a dimension apart, {dimension: vector}, for those that
        are wanted; None takes :func:`taylor_units` of all batches.
      measured: the loss is measured on so many of the batches, the first ones: for each dimension
        as many evaluations of the loss as shares times this. One program serves all.
      shares: of a dimension that go, ascending, in (0, 1].
      repair: what is done to a network that has lost units before its loss is measured,
        ``(masked params, masks) -> params``, where that will be done to the one that is chosen:
        ``lambda params, masks: jp.oneshot.refit(dense, masks, stats, start=params)``.
      progress: None or True for a bar, False for silence, or a function such as ``tqdm.tqdm``.

    Returns:
      {dimension: (units,) float64}, larger = keep, with what was measured in ``.curves``. In
      dimensions of ``semantics="kept"`` norms go over the masked channels here, too, so that their
      curves are estimates.

    Raises:
      TypeError: for batches that are used up after one pass, or a batch that is no tuple.
      ValueError: for params of another structure, no batches, a loss that is no number or not
        finite, an order that does not fit, shares out of range, or ``measured`` below 1.

    References:
      Frantar and Alistarh, `SPDY <https://arxiv.org/abs/2201.13096>`__, 2022, and Kurtic et al.,
      `ZipLM <https://arxiv.org/abs/2302.04089>`__, 2023, whose tables hold a layer's error at each
      width; here it is the network's loss, and the table is turned into scores of units.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [1.0]])}
      >>> fn = lambda p, x: x @ p["up"] @ p["down"]
      >>> x = jnp.ones((1, 1))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> loss = lambda p, x, y: jnp.sum((fn(p, x) - y) ** 2) / 2
      >>> scores = jp.scores.loss_units(structure, params, loss, [(x, jnp.full((1, 1), 6.0))])
      >>> scores.curves
      {'up:1': ([0, 1, 2], [0.0, 4.0, 17.5])}
    """
    structure.check_params(params)
    _check(measured, shares)
    if order is None:
        order = taylor_units(structure, params, loss, batches, progress=progress)
    vectors = {name: host(v) for name, v in rankable(structure, [*order], order).items()}
    few = [*itertools.islice(check_batches(batches), measured)]
    rise = _rises(structure, [*vectors], params, loss, few, repair)
    found = Measured()
    found.curves = {}
    for name in track([*vectors], "dimensions", progress, label=str):
        worst = np.argsort(vectors[name], kind="stable")
        curve = _curve(name, worst, shares, rise)
        found.curves[name] = curve
        found[name] = np.empty(worst.size)
        found[name][worst] = _spread(_hull(*curve), worst.size)
    return found


def _check(measured: int, shares: Sequence[float]) -> None:
    if measured < 1:
        raise ValueError(f"measured is {measured}; wanted at least 1 batch to measure the loss on")
    ascend = [0.0, *shares]
    if not shares or any(a >= b for a, b in itertools.pairwise(ascend)) or ascend[-1] > 1:
        raise ValueError(
            f"shares is {shares!r}; wanted what goes of a dimension, ascending, in (0, 1], such as "
            f"{SHARES}"
        )


def _rises(
    structure: Structure,
    names: Sequence[str],
    params: Params,
    loss: Loss,
    batches: Batches,
    repair: Repair | None,
) -> Callable[[str, list[np.ndarray]], list[float]]:
    """(dimension, vectors of kept units) -> by how much the mean loss rises with each."""
    alone = number(loss)

    @jax.jit
    def masked(keep: Any, params: Params, *batch: Any) -> Any:
        return alone(apply_masks(params, structure.traced_masks(keep)), *batch)

    whole = {n: np.ones(structure.dims[n].size, bool) for n in names}

    def mean(keep: dict[str, Any]) -> Any:
        start = params
        if repair is not None and keep:
            masks = structure.masks_of(keep)
            start = repair(apply_masks(params, masks), masks)
        return sum(masked(whole | keep, start, *batch) for batch in batches) / len(batches)

    dense = float(mean({}))
    if not math.isfinite(dense):
        raise ValueError(f"the loss of the dense network is {dense}; wanted a finite number")
    return lambda name, kept: [float(x) - dense for x in [mean({name: k}) for k in kept]]


def _curve(
    name: str, worst: np.ndarray, shares: Sequence[float], rise: Callable[..., list[float]]
) -> tuple[list[int], list[float]]:
    """The numbers of units that went, and by how much the loss rose."""
    size = worst.size
    counts = sorted({max(round(share * size), 1) for share in shares})
    found = rise(name, [~np.isin(np.arange(size), worst[:count]) for count in counts])
    for count, value in zip(counts, found):
        if not math.isfinite(value) and count < size:
            raise ValueError(
                f"the loss without {count} of the {size} units of {name} is {value}; wanted a "
                "finite number: look at the masked network, or leave the dimension out of order="
            )
    points = [(c, v) for c, v in zip(counts, found) if math.isfinite(v)]
    return [0, *(c for c, _ in points)], [0.0, *(v for _, v in points)]


def _hull(counts: Sequence[int], rises: Sequence[float]) -> list[tuple[int, float]]:
    """The corners of the largest convex curve below the points, which never falls."""
    hull: list[tuple[int, float]] = []
    for count, rise in zip(counts, np.maximum.accumulate(rises)):
        while len(hull) > 1 and _slope(hull[-1], (count, rise)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((count, float(rise)))
    return hull


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _spread(hull: list[tuple[int, float]], size: int) -> np.ndarray:
    """What each unit adds, the worst first: a slope each, tilted so that no two are the same."""
    each = [np.full(b[0] - a[0], _slope(a, b)) for a, b in itertools.pairwise(hull)]
    last = each[-1][-1] if each else 0.0  # what is not known goes on like that
    slopes = np.concatenate([*each, np.full(size - hull[-1][0], last)])
    place = np.arange(1, size + 1) / size - 0.5
    least = TILT**2 * max(slopes.max(), FREE) / size
    return np.sort(slopes * (1 + TILT * place) + least * (1 + place))
