"""How long to tune and how fast, by the share of the parameters that is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5)  # Adam's, of which short trials pick one.
LONGER = 3.0  # A short trial prefers a rate that is too small for a long run: by so much.
PASSES = 4.0  # Passes over the data times the share that is gone: two at a half.
LEAST, WARMUP = 100, 100  # Steps.
TRIAL, LEAST_TRIAL = 0.05, 10  # Of the steps, for each rate on trial, and steps at least.


class Recipe(NamedTuple):
    """What tuning takes.

    Attributes:
      steps: of tuning, after all trials; those of trials that are not needed are added.
      warmup: steps over which the rate rises from zero.
      trial: steps for each rate on trial.
      rates: the rates on trial, from the highest down: they end with the first that does worse
        than the one before it.
    """

    steps: int
    warmup: int
    trial: int
    rates: tuple[float, ...]

    def shares_of_rate(self) -> np.ndarray:
        """The rate over the highest one, (steps,): straight up, then straight down towards zero."""
        count = np.arange(1, self.steps + 1)
        rise = count / max(self.warmup, 1)
        fall = (self.steps + 1 - count) / (self.steps + 1 - self.warmup)
        return np.minimum(np.minimum(rise, fall), 1.0)


def recipe_for(
    removed: float,
    batches: int | None,
    steps: int | None = None,
    rates: Sequence[float] = RATES,
) -> Recipe:
    """The recipe for a share of the parameters that is gone.

    Args:
      removed: the share, in [0, 1].
      batches: how many make one pass over the data; None where that is not known.
      steps: in all, trials included; None for four passes over the data times the share, a hundred
        at least.
      rates: the rates on trial; empty for none.

    Raises:
      ValueError: for fewer steps than one.

    References:
      Muralidharan et al., `Minitron <https://arxiv.org/abs/2407.14679>`__, 2024, distill pruned
      language models after 100 steps of warm-up along a cosine. Here the rate falls straight to
      zero, which Defazio et al., `Optimal linear decay <https://arxiv.org/abs/2310.07831>`__, 2023,
      find best. NVIDIA's Model Optimizer advises a fifth of the first training's rate at a half.
      The first training's rate is not known here, so short trials stand for it. What wins a short
      run is too small for a long one (Wu et al.,
      `Short-horizon bias <https://arxiv.org/abs/1803.02021>`__, 2018):
      tuning takes three times the winner.

    Example:
      >>> import jaxprune as jp
      >>> jp.recovery.recipe_for(0.5, batches=938)
      Recipe(steps=1411, warmup=100, trial=93, rates=(0.003, 0.001, 0.0003, 0.0001, 3e-05))
    """
    if steps is None:
        steps = max(LEAST, round(PASSES * removed * (batches or 0)))
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps is {steps!r}; wanted a whole number of steps, 1 or more")
    rates = tuple(rates)[: max(int(steps) // 2, 1)]
    trial = min(max(LEAST_TRIAL, int(TRIAL * steps)), steps // (2 * max(len(rates), 1)))
    trial = max(trial, 1)
    tuning = max(int(steps) - trial * len(rates), 1)
    return Recipe(tuning, min(WARMUP, tuning // 10), trial, rates)
