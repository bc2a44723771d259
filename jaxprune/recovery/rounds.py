"""Deep cuts in rounds: search, recover, and search again among what is left."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._progress import Progress
from jaxprune.budget.limits import check_masked
from jaxprune.budget.search import Search, targets_of
from jaxprune.budget.target import Target
from jaxprune.compaction.api import compact
from jaxprune.compaction.model import Compact
from jaxprune.recovery.api import recover
from jaxprune.scores.evidence import Batches, check_batches
from jaxprune.scores.units import taylor_units

EVIDENCE = 64  # Batches at most that units are scored on in each round.


def in_rounds(
    search: Search,
    loss: Callable[..., Any],
    batches: Batches,
    targets: Sequence[float | Target],
    *,
    score: Callable[..., Any] | None = None,
    progress: Progress = None,
    **options: Any,
) -> Compact:
    """Prunes to each target in turn, and recovers before the next one.

    What units are worth changes once others are gone and the rest is tuned: each round scores
    anew, at the tuned parameters, and cuts further. What is gone stays gone.

    Args:
      search: a :class:`jp.Search` for the dense network; times are taken once for all rounds.
      loss, batches: as for :func:`jp.recover`.
      targets: from mild to deep; numbers are speed-ups, ``[1.7, 3.0]``.
      score: ``(structure, params, loss, batches) -> {dimension: vector}``, of the first 64 batches;
        None is :func:`jp.scores.taylor_units`.
      progress: as for :func:`jp.recover`.
      **options: of :func:`jp.recover`.

    Returns:
      The :class:`Compact` of the last target, tuned, at one cut of the dense network; its
      ``recovery`` is that of the last round.

    Raises:
      ValueError: for no targets; and as ``search.plan`` and ``jp.recover`` do.

    References:
      NVIDIA's Model Optimizer advises to prune in steps of at most a third above a half, with
      distillation between them.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> params = {"up": jax.random.normal(keys[0], (3, 16)), "down": jnp.ones((16, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> xs = jax.random.normal(keys[1], (12, 16, 3))
      >>> batches = [(x, jnp.sin(x[:, :2])) for x in xs]
      >>> loss = lambda p, x, y: jnp.mean((fn(p, x) - y) ** 2)
      >>> structure = jp.infer_structure(fn, params, xs[0])
      >>> scores = jp.scores.taylor_units(structure, params, loss, batches)
      >>> search = jp.Search(fn, params, structure, scores, xs[0], round_to=1, device="h100")
      >>> targets = [jp.Target(params=0.75), jp.Target(params=0.5)]
      >>> small = jp.recovery.in_rounds(search, loss, batches, targets, steps=20, progress=False)
      >>> small.sizes["hidden"]
      8
    """
    if not targets:
        raise ValueError("targets is empty; pass speed-ups from mild to deep, such as [1.7, 3.0]")
    check_masked(search.verifier.structure, search.model.names, "pruning in rounds")
    dense, score = search.verifier, score or functools.partial(taylor_units, progress=progress)
    evidence = list(itertools.islice(check_batches(batches), EVIDENCE))
    params, masks = dense.params, jax.tree.map(lambda _: True, dense.params)
    semantics = dense.structure.semantics
    for target in targets_of(targets):
        plan = search.stage(score(dense.structure, params, loss, evidence)).plan(target)
        masks = jax.tree.map(jnp.logical_and, masks, plan.masks)
        cut = compact(dense.fn, params, masks, *dense.args, semantics=semantics)
        small = recover(cut, loss, batches, progress=progress, **options)
        params = small.expand(small.params)
    # The certificate speaks of the dense network's masks, and not of the last round's parameters.
    whole = compact(dense.fn, dense.params, masks, *dense.args, semantics=semantics)
    return replace(whole.replace(small.params), recovery=small.recovery)
