"""What a metric of the network allows: checks of metrics, fine-tuning, bisection over a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.budget.choosing import Try
from jaxprune.budget.result import SearchResult, Unreachable
from jaxprune.budget.target import COUNTED, as_number
from jaxprune.masks import apply_masks, check_structure

Metric = Callable[[Any], Any]  # It maps masked params of full size to a number; larger is better.
Finetune = Callable[[Any, Any], Any]  # It maps (masked params, masks) to params.
Point = tuple[SearchResult, Any, float]  # It holds a plan, its params, their metric.

BISECTIONS = 6
MINIMIZED = (*COUNTED, "speedup")


def several(name: str, values: Iterable[Any]) -> list[Any]:
    """A list of what must be several; raises a ValueError for a single one."""
    try:
        return list(values)
    except TypeError:
        raise ValueError(
            f"{name} is {values!r}; wanted several: write {name}=[{values!r}]"
        ) from None


def value_of(metric: Metric, params: Any) -> float:
    """The metric of params; raises a TypeError unless it is one number."""
    found = metric(params)
    number = as_number(found)
    if number is None:
        is_array = isinstance(found, np.ndarray | jax.Array)
        got = f"{found.dtype}{found.shape}" if is_array else type(found).__name__
        raise TypeError(
            f"metric returned {got}; wanted one number, larger = better, such as "
            "jnp.mean(labels == logits.argmax(-1))"
        )
    return float(number)


def tuned(params: Any, masks: Any, finetune: Finetune | None) -> Any:
    """Masked params, fine-tuned if that is asked for; raises if another tree comes back."""
    params = apply_masks(params, masks)
    if finetune is None:
        return params
    found = finetune(params, masks)
    check_structure(
        "what finetune returned", found, params, "return a tree like params, and nothing beside it"
    )
    return apply_masks(found, masks)


def best(metric: Metric, params: Any, tries: Sequence[Try]) -> Try:
    """The try of largest metric, which is noted; NaN is the least."""
    values = [value_of(metric, apply_masks(params, tried.masks)) for tried in tries]
    at = int(np.argmax(np.nan_to_num(values, nan=-math.inf)))
    said = ", ".join(f"{value:.4g}" for value in values)
    tries[at].notes += (f"chosen by its metric, {values[at]:.4g}, of those at hand: {said}",)
    return tries[at]


def check_bisection(minimize: str, bisections: int) -> None:
    """Raises a ValueError for a cost that isn't known, or no budget to try."""
    if minimize not in MINIMIZED:
        raise ValueError(f"minimize is {minimize!r}; wanted one of {MINIMIZED}")
    if bisections < 1:
        raise ValueError(
            f"bisections is {bisections}; wanted at least 1 budget to try, such as {BISECTIONS}"
        )


def check_dense(dense: float, floor: float) -> None:
    """Raises a ValueError unless the dense network's metric is a number at the floor or above."""
    if math.isnan(dense):
        raise ValueError(
            "the dense network's metric is NaN, so that no floor can be kept; give a metric that "
            "is a number for params as they are"
        )
    if not dense >= floor:
        raise ValueError(
            f"the dense network's metric is {dense:.4g}, below the floor of {floor:.4g} already; "
            "lower the floor, or give a metric of which larger is better"
        )


def bisect(
    at: Callable[[float], Point], floor: float, bisections: Iterable[Any]
) -> tuple[Point | None, tuple[tuple[float, float], ...], Unreachable | None]:
    """The furthest point at the floor, every budget with its metric, the last one out of reach.

    Args:
      at: the point at a part of the dense network's cost; raises :class:`Unreachable`.
      floor: the least metric that is acceptable.
      bisections: one budget is tried for each of it.
    """
    low, high = 0.0, 1.0  # The part is between them.
    best, trace, refused = None, [], None
    for _ in bisections:
        part = (low + high) / 2
        try:
            found = at(part)
        except Unreachable as error:
            low, refused = part, error
            continue
        (budget,), value = found[0].target.given.values(), found[2]
        trace.append((budget, value))
        if value >= floor:
            high, best = part, found
        else:
            low = part
    return best, tuple(trace), refused


def none_found(
    bisections: int, trace: Any, refused: Unreachable | None, floor: float, dense: float
) -> str:
    """The text of the error when no budget that was tried will do."""
    if not trace:
        return f"no budget of {bisections} that were tried is in reach; at the last one: {refused}"
    return (
        f"no budget of {bisections} that were tried keeps the metric at {floor:.4g} (dense "
        f"{dense:.4g}; tried, budget and metric: {[*trace]}); give finetune=, or more bisections="
    )
