"""The training loop: a rate by trial, a rise and a fall, the best of what was seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._progress import Progress, track
from jaxprune.recovery.objective import Batch, Objective
from jaxprune.recovery.recipe import LONGER, Recipe
from jaxprune.scores.evidence import Batches, check_batches

LOOKS = 10  # At so many points the loss on held-out batches is looked at.
PATIENCE = 3  # After so many looks in the second half without a better one tuning ends.
HELD = 8  # Batches at most that are held out.


def held_out(batches: Batches) -> list[Batch]:
    """The batches to judge by: the first tenth, at least one and at most :data:`HELD`."""
    count = len(batches) // 10 if hasattr(batches, "__len__") else HELD
    return list(itertools.islice(check_batches(batches), min(max(count, 1), HELD)))


def training(batches: Batches, held: int) -> Iterator[Batch]:
    """All other batches, again and again; the held-out ones, too, where there is no other."""
    while True:
        seen = 0
        for batch in itertools.islice(check_batches(batches), held, None):
            seen += 1
            yield batch
        if not seen:
            yield from check_batches(batches)


@dataclass
class Tuned:
    """What tuning gave: the best parameters, their held-out loss, and the steps that were done."""

    params: Any
    loss: float
    steps: int
    rate: float | None = None
    rates: tuple[tuple[float | None, float], ...] = ()  # (rate, held-out loss after its trial)
    stopped: str = ""


class Tuner:
    """Tunes the parameters of one objective; a step is compiled once for each shape of batch."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        held: Sequence[Batch],
        optimizer: optax.GradientTransformation | None,
    ):
        self.objective, self.batches, self.held = objective, batches, held
        self.given = optimizer is not None
        self.tx = optimizer or optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(mu_dtype=jnp.float32),
            optax.scale(-1.0),
        )  # fmt: skip
        self._step, self._value = jax.jit(self._one), jax.jit(lambda p, *b: objective.fn(p, *b)[0])

    def _one(self, params: Any, state: Any, rate: Any, *batch: Any) -> tuple[Any, Any, Any]:
        tuned, rest = self.objective.split(params)

        def loss(tuned: Any) -> Any:
            return self.objective.fn(self.objective.join(tuned, rest, []), *batch)

        (value, updated), grad = jax.value_and_grad(loss, has_aux=True)(tuned)
        updates, state = self.tx.update(grad, state, tuned)
        scaled = jax.tree.map(lambda u: u * jnp.asarray(rate, u.dtype), updates)
        tuned = optax.apply_updates(tuned, scaled)
        return self.objective.join(tuned, rest, updated), state, value

    def loss(self, params: Any) -> float:
        """The mean loss on the held-out batches."""
        return float(np.mean([self._value(params, *batch) for batch in self.held]))

    def run(self, params: Any, loss: float, recipe: Recipe, progress: Progress) -> Tuned:
        """Tunes along a recipe, at the rate that a trial chooses, or by the given optimizer.

        ``loss``: the held-out loss at ``params``, which is known.
        """
        start = Tuned(params, loss, 0)
        if self.given:
            return self._along(start, recipe, 1.0, progress)
        tried = self._trials(params, recipe, progress)
        best = min(tried, key=lambda t: t.loss)
        if not np.isfinite(best.loss):
            raise FloatingPointError(
                f"the loss is not finite after a few steps at any rate of {recipe.rates}; pass "
                "optimizer=optax.adam(...) with a smaller one, and look for NaN in the batches"
            )
        assert best.rate is not None
        # Tuning goes on from the trial: its steps are not lost.
        start = min(start, best, key=lambda t: t.loss)
        spared = recipe.trial * (len(recipe.rates) - len(tried))
        longer = recipe._replace(steps=recipe.steps + spared)
        tuned = self._along(start, longer, LONGER * best.rate, progress)
        rates = tuple((t.rate, t.loss) for t in tried)
        return replace(tuned, rate=LONGER * best.rate, rates=rates)

    def _trials(self, params: Any, recipe: Recipe, progress: Progress) -> list[Tuned]:
        """What a few steps give at each rate, down to the first that is worse than one before."""
        tried: list[Tuned] = []
        for rate in recipe.rates:
            found = self._trial(params, recipe, rate, progress)
            tried.append(found)
            if len(tried) > 1 and found.loss > tried[-2].loss:
                break
        return tried

    def _trial(self, params: Any, recipe: Recipe, rate: float, progress: Progress) -> Tuned:
        short = Recipe(recipe.trial, min(recipe.warmup, recipe.trial // 4), 0, ())
        steps = self._steps(params, short, rate, progress, f"a trial at the rate {rate:g}")
        *_, last = steps
        loss = self.loss(last)
        return Tuned(last, loss if np.isfinite(loss) else np.inf, 0, rate)

    def _along(self, best: Tuned, recipe: Recipe, rate: float, progress: Progress) -> Tuned:
        """The best at any look; what was there before tuning is the first one."""
        every, since, done = max(1, recipe.steps // LOOKS), 0, 0
        for params in self._steps(best.params, recipe, rate, progress, "tuning"):
            done += 1
            if done % every and done < recipe.steps:
                continue
            loss = self.loss(params)
            settling = done > recipe.steps // 2  # Before that the rate is too high to tell.
            since = since + 1 if settling and not loss < best.loss else 0
            if loss < best.loss:
                best = Tuned(params, loss, done)
            if done < recipe.steps and (since == PATIENCE or not np.isfinite(loss)):
                best.stopped = f"after {done} of {recipe.steps} steps: it no longer pays"
                break
        return replace(best, steps=done)

    def _steps(
        self, params: Any, recipe: Recipe, rate: float, progress: Progress, what: str
    ) -> Iterator[Any]:
        """The parameters after each step."""
        state = self.tx.init(self.objective.split(params)[0])
        batches = training(self.batches, len(self.held))
        shares = np.ones(recipe.steps) if self.given else recipe.shares_of_rate()
        for share in track(shares, what, progress, recipe.steps):
            params, state, value = self._step(params, state, rate * share, *next(batches))
            jax.block_until_ready(value)
            yield params
