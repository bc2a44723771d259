"""``jp.recover``: what pruning has cost, won back."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from jaxprune._progress import Progress
from jaxprune.calibration.api import calibrate
from jaxprune.compaction.model import Compact
from jaxprune.oneshot._refit import refit
from jaxprune.recovery.objective import Batch, Objective, objective_of
from jaxprune.recovery.recipe import RATES, recipe_for
from jaxprune.recovery.report import Recovery, Stage
from jaxprune.recovery.statistics import estimate_statistics
from jaxprune.recovery.tuning import Tuner, held_out
from jaxprune.scores.evidence import Batches

STATISTICS = 32  # Batches at most whose statistics are averaged at the end.


def recover(
    small: Compact,
    loss: Callable[..., Any] | None,
    batches: Batches,
    *,
    teacher: Callable[..., Any] | None = None,
    dense: Any = None,
    steps: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: Progress = None,
) -> Compact:
    """Tunes a compact model by a recipe that follows from how much was removed.

    In this order:

    1. Refit, when ``dense`` is given: kept weights are solved for the dense layers' outputs
       (:func:`jp.oneshot.refit`). It is kept if the loss on held-out batches falls.
    2. Tuning by Adam along :func:`jp.recovery.recipe_for`, at a rate that short trials choose,
       from where the best of them ended. It ends early when looks at the held-out loss in the
       second half find nothing better, and the best parameters that were seen are taken.
    3. Running statistics are measured anew, when the loss updates them
       (:func:`jp.recovery.estimate_statistics`), and kept whatever the held-out loss says: of
       these statistics only the distance to the teacher knows, whose own may be the worse ones.

    The first tenth of the batches, eight at most, is held out.

    Args:
      small: what ``jp.compact`` returned.
      loss: ``(params, *batch) ->`` a number, of parameters of the *full* size: it is cut here. In
        train mode it returns ``(number, updated)``, where ``updated`` holds new running statistics
        under their paths, ``{"batch_stats": ...}`` or all of params. None to learn from the teacher
        alone.
      batches: a list of tuples of what follows params in ``loss``, ``[(x, y), ...]``, or anything
        that can be gone through again and again.
      teacher: ``(*inputs) -> logits``, mostly the dense network, ``lambda x: fn(params, x)``. It
        and ``small.fn`` take the first arrays of a batch, as many as ``small.fn`` takes. With a
        loss the objective is the mean of both.
      dense: the full parameters before pruning, for the refit.
      steps: of training in all, those of trials included; None for four passes over the data
        times the share that was removed.
      optimizer: an optax transformation with its own rate and schedule, in place of the recipe's.
      progress: None or True for bars and the table at the end, False for silence, or a function
        such as ``tqdm.tqdm``.

    Returns:
      A :class:`Compact` with tuned ``params``; ``.recovery`` is a table of what was done.

    Raises:
      TypeError: with neither loss nor teacher; for batches that are used up after one pass.
      ValueError: for a loss that is no number, outputs unlike the teacher's, no batches, a loss
        that can't be had at this cut.
      FloatingPointError: when the loss is not finite at any rate.

    References:
      See :func:`jp.recovery.recipe_for`; the objective of the teacher is Hinton et al.'s at
      temperature 1, :func:`jp.training.logit_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> xs = jax.random.normal(keys[1], (20, 16, 3))
      >>> batches = [(x, fn(params, x)) for x in xs]
      >>> loss = lambda p, x, y: jnp.mean((fn(p, x) - y) ** 2)
      >>> structure = jp.infer_structure(fn, params, xs[0])
      >>> masks = structure.masks({"up:1": jnp.arange(8) < 4})
      >>> small = jp.compact(fn, params, masks, xs[0])
      >>> tuned = jp.recover(small, loss, batches, steps=50, progress=False)
      >>> before, after = (float(small.cut(loss, *batches[0])(m.params, *batches[0]))
      ...                  for m in (small, tuned))
      >>> after < before
      True
    """
    held = held_out(batches)
    objective = objective_of(small, loss, teacher, held[0])
    tuner = Tuner(objective, batches, held, optimizer)
    removed = _removed(small)
    count = len(batches) if hasattr(batches, "__len__") else None
    recipe = recipe_for(removed, count, steps, RATES if optimizer is None else ())
    work = _Work(small, tuner)
    work.stage("compact", lambda params: params)
    if dense is not None:
        work.stage("refit", lambda params: _refit(small, dense, held, progress))
    work.tune(recipe, progress)
    if objective.updated:
        some = list(itertools.islice(batches, STATISTICS))
        work.stage("statistics", lambda p: _statistics(objective, p, some, progress), always=True)
    recovery = Recovery(tuple(work.stages), removed, work.steps)
    if progress is None or progress is True:
        print(recovery)
    return replace(small.replace(work.params), recovery=recovery)


class _Work:
    """The parameters as they are, and what was done to them."""

    def __init__(self, small: Compact, tuner: Tuner):
        self.tuner, self.params = tuner, small.params
        self.stages: list[Stage] = []
        self.steps = 0

    def stage(self, name: str, do: Callable[[Any], Any], always: bool = False) -> None:
        """Keeps what a stage makes if the held-out loss falls, or always."""
        begin = time.perf_counter()
        params = do(self.params)
        loss, said = self.tuner.loss(params), ""
        if self.stages and not always and not loss < self.stages[-1].loss:
            said, loss = f"not kept: the loss would be {loss:.4g}", self.stages[-1].loss
        else:
            self.params = params
        self.stages.append(Stage(name, loss, time.perf_counter() - begin, said))

    def tune(self, recipe: Any, progress: Progress) -> None:
        begin = time.perf_counter()
        tuned = self.tuner.run(self.params, self.stages[-1].loss, recipe, progress)
        said = [f"{tuned.steps} steps"]
        if tuned.rate is not None:
            others = ", ".join(f"{rate:g}: {loss:.4g}" for rate, loss in tuned.rates)
            said.append(f"at the rate {tuned.rate:g} (trials: {others})")
        said += [tuned.stopped] * bool(tuned.stopped)
        self.params = tuned.params
        self.steps = tuned.steps + len(tuned.rates) * recipe.trial
        seconds = time.perf_counter() - begin
        self.stages.append(Stage("tuning", tuned.loss, seconds, ", ".join(said)))


def _removed(small: Compact) -> float:
    """The share of the parameters that is gone."""
    full = sum(math.prod(shape) for shape in small._structure.shapes)
    return 1 - sum(np.size(x) for x in jax.tree.leaves(small.params)) / max(full, 1)


def _refit(small: Compact, dense: Any, held: list[Batch], progress: Progress) -> Any:
    """Kept weights that reproduce the dense layers' outputs; those that have no inputs stay."""
    function = small.fn
    count = len(function.traced_for[1])  # type: ignore[attr-defined]
    inputs = [batch[:count] for batch in held]
    stats = calibrate(function.fn, dense, inputs, progress=progress)  # type: ignore[attr-defined]
    stats = replace(stats, reasons={})
    return small.restrict(refit(dense, small.masks, stats, progress=progress))


def _statistics(objective: Objective, params: Any, some: list[Batch], progress: Progress) -> Any:
    def update(params: Any, *batch: Any) -> Any:
        tuned, rest = objective.split(params)
        return objective.join(tuned, rest, objective.fn(params, *batch)[1])

    return estimate_statistics(update, params, some, progress=progress)
