"""What was chosen is compacted, counted and timed beside the dense network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._progress import Progress, inner, working
from jaxprune.budget import choosing, landing
from jaxprune.budget.choosing import MET, Choices, Try
from jaxprune.budget.clock import compile_all
from jaxprune.budget.correction import CLIFF, Measurements
from jaxprune.budget.target import COUNTED
from jaxprune.compaction.api import Compact, compact
from jaxprune.costs.api import cost
from jaxprune.measuring import Race, benchmark
from jaxprune.structure.dimensions import Structure

DECISIONS = 3  # At most so many long runs are made until what is best meets the target.
NEAR = (0.9, 1.08)  # A try that used such a share of the budget in a short run gets a long one.
FINALISTS = 5  # At most so many tries are in a long run.
LOWER = (0.94, 0.88, 0.82, 0.76, 0.7)  # Shares of the time that are aimed at after misses.
DESCENTS = 3  # At most so many runs go a step down from a network that is much slower than told.
PROBING = 15.0  # Each of them takes about so many seconds at most.
CONFIRMED = 4  # At most so many of the best are measured again, one after the other.
DECISIVE = 3  # A long run is at most so many times as long as a short one.
SURE = 0.015  # A long run ends once the relative standard error of its ratios is below this,
FAR = 0.25  # or below this share of how far they are from the target: then they are decided.
BURST = 5  # After so many rounds each run looks whether it is long enough.
MIN_ROUND = 0.01  # A round lasts at least so many seconds: one short call measures cold caches.


class Speedup(NamedTuple):
    """Quartiles of a speed-up, and whether their run was sure of the median in the end."""

    median: float
    low: float
    high: float
    sure: bool

    def undecided(self, asked: float) -> bool:
        """Whether the clock can't say that a speed-up is reached."""
        return not self.sure and self.low < MET * asked <= self.high


@dataclass(frozen=True, eq=False)
class Verifier:
    """Measures choices; what it finds goes into ``measured``.

    Attributes:
      fn, params, args: the dense network and what it is called with; shapes will do.
      structure: the structure of the network.
      measured: where findings are kept.
      repeats: samples of each time.
      timed: whether this device's clock counts; otherwise times are estimates.
      progress: how measuring is shown, a progress of the search.
      runtime: where the networks run; None is XLA.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    structure: Structure
    measured: Measurements
    repeats: int
    timed: bool
    progress: Progress = False
    runtime: Any = None

    @property
    def _shown(self) -> Progress:
        return inner(self.progress)

    @functools.cached_property
    def inputs(self) -> tuple[Any, ...]:
        """Params and arguments as arrays."""
        return tuple(examples((self.params, *self.args)))

    @functools.cached_property
    def on_host(self) -> Any:
        """Params where cutting them compiles nothing."""
        return jax.tree.map(_hosted, self.inputs[0])

    @functools.cached_property
    def jitted(self) -> Callable[..., Any]:
        """The dense network, compiled once."""
        if self.runtime:
            return self.runtime(self.fn, *self.inputs, check=False)
        return jax.jit(self.fn)

    def dense_seconds(self) -> float:
        """The median time of one call of the dense network."""
        found = benchmark(self.jitted, *self.inputs, repeats=self.repeats, progress=self._shown)
        return found.median

    def verify(self, tries: Sequence[Try], budgets: Mapping[str, float], runs: int = 1) -> None:
        """Measures tries beside each other and judges them; ``runs``: while the clock is unsure."""
        for tried in tries:
            self._cut(tried)
            if any(name in budgets for name in COUNTED):
                self.count(tried)
        if "latency" in budgets and self.timed:
            asked = self.measured.dense["latency"] / budgets["latency"]
            speedups = self._speedups(tries, runs, asked)
            for tried, speedup in zip(tries, speedups, strict=True):
                tried.found["latency"] = self.measured.dense["latency"] / speedup.median
                tried.speedup = speedup
        for tried in tries:
            self._learn(tried, budgets, certain=runs > 1)
            tried.judge(budgets)
        if runs > 1:
            self.measured.forget_uncertain()

    def decided(
        self, choices: Choices, budgets: Mapping[str, float], uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        """The tries near the target and their neighbors, measured in one long interleaved run.

        A short run puts some on the wrong side, and the one of most score is likely to be one that
        looked faster than it is. From the best that fits a walk leads up to the target; it isn't
        bound to stay below the cliffs that were found.
        """
        finalists = self._finalists(choices, budgets, uniform, tries)
        measured: list[Try] = []
        for _ in range(DECISIONS):
            self.verify(finalists, budgets, DECISIVE)
            measured += finalists
            finalists = choices.better(budgets, uniform, measured)[: FINALISTS - 1]
            if not finalists:
                break
        measured += self._lower(choices, budgets, uniform, measured)
        verify = functools.partial(self.verify, budgets=budgets, runs=DECISIVE)
        measured += landing.land(choices.free, verify, budgets, uniform, measured)
        self._confirm(choices, budgets, measured)
        if lower := self._lower(choices, budgets, uniform, measured):
            measured += lower
            self._confirm(choices, budgets, measured)
        return measured

    def _lower(
        self, choices: Choices, budgets: Mapping[str, float], uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        """What is best for less time, as long as nothing but a uniform choice meets the target."""
        found: list[Try] = []
        for part in LOWER:
            best = choices.best([*tries, *found])
            if best.used <= 1 and not best.apart:
                break
            less = {**budgets, "latency": part * budgets["latency"]}
            choice = choices.solved(less, uniform)
            if choice is not None and not any(t.same(choice) for t in [*tries, *found]):
                found.append(choices.tried(choice))
                self.verify(found[-1:], budgets, DECISIVE)
        return found

    def _confirm(
        self, choices: Choices, budgets: Mapping[str, float], tries: Sequence[Try]
    ) -> None:
        """Measures the best of many again: it is likely to be one that looked faster than it is."""
        known: list[Try] = []
        for _ in range(CONFIRMED):
            best = choices.best(tries)
            if best in known or best.used > 1:
                break
            self.verify([best], budgets, DECISIVE)
            known.append(best)

    def descended(
        self, choices: Choices, tried: Try, budgets: Mapping[str, float], seconds: float
    ) -> tuple[Choices, list[Try]]:
        """What is a step below a try that is much slower than told, and so on from the best.

        Where one of them is far faster the try was on a cliff, and little need be given up: the
        dimension stays below it in the choices that are handed back. ``seconds``: what it took to
        compile and measure the try; where that is long, few others are looked at, or none.
        """
        found: list[Try] = []
        for _ in range(DESCENTS):
            if tried.used <= (1 if found else 1 + choosing.NEAR):
                break
            around = choices.below(tried)[: int(PROBING / max(seconds, 1e-9))]
            if around:
                self.verify(around, budgets)
            found += around
            best = choices.best(around) if around else tried
            if tried.used < CLIFF * best.used:
                break
            choices, tried = choices.held_below(tried, best), best
        return choices, found

    def _finalists(
        self, choices: Choices, budgets: Mapping[str, float], uniform: bool, tries: Sequence[Try]
    ) -> list[Try]:
        near = [t for t in tries if NEAR[0] <= t.used <= NEAR[1]]
        near = near or [min(tries, key=lambda t: abs(t.used - 1))]
        near += choices.beside(budgets, uniform, near)
        return sorted(near, key=lambda t: choices.worth.at(t.choice), reverse=True)[:FINALISTS]

    def count(self, tried: Try) -> None:
        """Counts what a try costs that was compacted, once."""
        if any(name in tried.found for name in COUNTED):
            return
        assert tried.small is not None
        total = cost(tried.small.fn, tried.small.params, *self.args)
        counted = [name for name in COUNTED if self.measured.dense[name]]
        tried.found |= {name: float(getattr(total, name)) for name in counted}

    def _cut(self, tried: Try) -> None:
        """Compacts a try, if that wasn't done yet."""
        if tried.small is None:
            tried.small = compact(
                self.fn, self.on_host, tried.masks, *self.args, semantics=self.structure.semantics
            )
            tried.notes = notes_of(self.structure, tried.small, tried.keep)

    def _speedups(self, tries: Sequence[Try], runs: int, asked: float) -> list[Speedup]:
        """The speed-ups of compact networks over the dense one, from one interleaved run."""
        with working(f"search: {len(tries)} networks beside the dense one", self._shown) as row:
            row.now = "compiling"
            self._compile(tries)
            entries: dict[str, Any] = {"dense": (self.jitted, self.inputs)}
            for i, t in enumerate(tries):
                assert t.small is not None
                entries[str(i)] = (t.program, (t.small.params, *self.inputs[1:]))
            race = Race(entries, MIN_ROUND, row, {})
            unsure, most = [*entries][1:], self.repeats * runs
            while unsure and (done := len(race.samples["dense"])) < most:
                race.run(min(BURST, most - done), self._shown, ["dense", *unsure])
                unsure = [i for i in unsure if not is_sure(_ratios(race, i), asked)]
        return [_speedup(_ratios(race, i), i not in unsure) for i in [*entries][1:]]

    def _compile(self, tries: Sequence[Try]) -> None:
        """Compiles what isn't compiled yet, side by side where that can be."""
        lowered = {}
        for t in tries:
            if t.program is None:
                assert t.small is not None
                inputs = (t.small.params, *self.inputs[1:])
                if self.runtime:
                    t.program = self.runtime(t.small.fn, *inputs, check=False)
                else:
                    lowered[t] = jax.jit(t.small.fn).lower(*inputs)
        for t, program in zip(lowered, compile_all(lowered.values()), strict=True):
            t.program = program

    def _learn(self, tried: Try, budgets: Mapping[str, float], certain: bool) -> None:
        for name in budgets if not tried.apart else ():
            if name in tried.found:
                self.measured.missed(name, tried.found[name] / tried.predicted[name] - 1)
                self.measured.add(name, tried.said[name], tried.found[name], certain)


def _ratios(race: Race, name: str) -> np.ndarray:
    """The speed-ups of a network over the dense one, one for each round that it was in."""
    found = np.array(race.samples[name])
    return np.array(race.samples["dense"])[: len(found)] / found


def _speedup(ratios: np.ndarray, sure: bool) -> Speedup:
    low, median, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Speedup(median, low, high, sure)


def is_sure(ratios: np.ndarray, asked: float) -> bool:
    """Whether ratios tell their median, or at least on which side of ``asked`` it is.

    Example:
      >>> import numpy as np
      >>> from jaxprune.budget.verification import is_sure
      >>> rounds = np.array([0.9, 1.0, 1.1])
      >>> is_sure(2 * rounds, asked=2.0), is_sure(4 * rounds, asked=2.0)
      (False, True)
    """
    off = abs(float(np.median(ratios)) / asked - 1)
    return uncertainty(ratios) < max(SURE, FAR * off)


def uncertainty(ratios: np.ndarray) -> float:
    """The relative standard error of the median, as of a normal distribution.

    Example:
      >>> import numpy as np
      >>> from jaxprune.budget.verification import uncertainty
      >>> uncertainty(np.full(9, 2.0))
      0.0
    """
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    sigma = (high - low) / 1.35
    return float(1.25 * sigma / middle / math.sqrt(ratios.size))


def notes_of(
    structure: Structure, small: Compact, keep: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    """A line for each branch that goes, and for each dimension with units that could not go."""
    notes = []
    for name, vector in keep.items():
        label = structure.dims[name].label or name
        if not vector.any():
            notes.append(f"nothing is kept of {label}: the branch goes, the rest goes on")
        back = int((small.keep[name] & ~vector).sum())
        if back and vector.any():
            notes.append(f"{back} units of {label} could not go; see jp.compact's certificate")
    return tuple(notes)


def examples(tree: Any) -> Any:
    """The tree with arrays of zeros for what is given as shapes: times don't depend on values."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, tree
    )


def _hosted(leaf: Any) -> Any:
    """An array in this process's memory, where it can be there with all that its type says."""
    if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    there = leaf.devices() == jnp.zeros(()).devices() and not leaf.weak_type
    return np.asarray(leaf) if there else leaf
