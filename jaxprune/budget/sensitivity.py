"""How far a metric falls when one dimension, or one leaf, is pruned and all else stays."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._progress import Progress, track
from jaxprune.budget.metric import Metric, several, value_of
from jaxprune.masks import apply_masks
from jaxprune.patterns import structured, unstructured
from jaxprune.patterns.choose import is_kernel
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.select import chosen_dims
from jaxprune.typing import named_leaves

FRACTIONS = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Sensitivity:
    """How a metric falls when one dimension, or one leaf, is pruned and all else stays.

    Attributes:
      fractions: the shares of units, or of a leaf's entries, that are removed.
      curves: name -> the metric at each fraction.
      dense: the metric of the dense network.
    """

    fractions: tuple[float, ...]
    curves: dict[str, tuple[float, ...]]
    dense: float

    def save(self, path: str | Path) -> None:
        """Writes JSON, to be read by :meth:`load`; JSON has no NaN, which becomes null."""
        curves = {name: [_written(v) for v in values] for name, values in self.curves.items()}
        content = {"fractions": self.fractions, "curves": curves, "dense": _written(self.dense)}
        Path(path).write_text(json.dumps(content, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Reads what :meth:`save` wrote."""
        read = json.loads(Path(path).read_text())
        curves = {name: tuple(map(_read, values)) for name, values in read["curves"].items()}
        return cls(tuple(read["fractions"]), curves, _read(read["dense"]))

    def allowed(self, floor: float) -> dict[str, float]:
        """The largest fraction of each that alone keeps the metric at ``floor``, 0 for none.

        A curve counts up to where it first falls below, straight lines between its points. NaN
        is below, too, and no line leads to it, nor to infinity.
        """
        return {name: self._allowed(values, floor) for name, values in self.curves.items()}

    def _allowed(self, values: Sequence[float], floor: float) -> float:
        x, y = (0.0, *self.fractions), (self.dense, *values)
        below = [k for k in range(len(x)) if not y[k] >= floor]  # NaN is, too
        if not below or below[0] == 0:
            return 0.0 if below else x[-1]
        k = below[0]
        fall = y[k - 1] - y[k]
        part = (y[k - 1] - floor) / fall if math.isfinite(fall) else 0.0
        return x[k - 1] + (x[k] - x[k - 1]) * part


def _written(value: float) -> float | str | None:
    """As strict JSON has it: null for NaN, a text for infinity."""
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)


def _read(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def sensitivity(
    params: Any,
    structure: Structure | None,
    scores: Any,
    *,
    metric: Metric,
    dims: str | Sequence[str] = "*",
    where: Callable[[Any, Any], Any] = is_kernel,
    fractions: Sequence[float] = FRACTIONS,
    progress: Progress = None,
) -> Sensitivity:
    """Prunes one dimension, or one leaf, at a time, and evaluates a metric.

    Args:
      params: the dense parameters.
      structure: units of its dimensions are removed; None: single entries of each leaf.
      scores: a tree like params, larger = keep.
      metric: ``params -> number``, larger = better, on a held-out batch; params are masked and at
        full size, so that one compiled function serves all.
      dims: which dimensions of the structure.
      where: which leaves, ``(path, leaf) -> bool``, without a structure.
      fractions: removed, in (0, 1).
      progress: None or True for a bar once it takes long, False for silence, or what wraps the
        evaluations, such as ``tqdm.tqdm``.

    Returns:
      A :class:`Sensitivity`; :func:`jp.plot.sensitivity` draws it.

    Raises:
      TypeError: for a metric that doesn't return one number, or a structure that isn't one.
      ValueError: for fractions outside (0, 1) or not ascending, dims without a structure, or when
        nothing is chosen.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.arange(8.0).reshape(2, 4)}
      >>> metric = lambda p: p["w"].sum()
      >>> found = jp.sensitivity(params, None, params, metric=metric, fractions=(0.5,))
      >>> found.dense, found.curves
      (28.0, {'w': (22.0,)})

    References:
      Li et al., `Pruning Filters <https://arxiv.org/abs/1608.08710>`__, 2017, section 3.2.
    """
    fractions = _checked_fractions(fractions)
    _check_structure(structure)
    if structure is None and dims != "*":
        raise ValueError(
            f"dims={dims!r} are dimensions of a structure, and structure is None; give "
            "jp.infer_structure(fn, params, ...) in its place, or choose leaves by where="
        )
    one = _of_dimensions(structure, dims) if structure is not None else _of_leaves(params, where)
    wanted = [(name, f) for name in one for f in fractions]
    values = [
        value_of(metric, apply_masks(params, one[name](scores, f)))
        for name, f in track(wanted, "pruning one at a time", progress, label=_called)
    ]
    rows = zip(one, np.array(values).reshape(len(one), len(fractions)).tolist())
    return Sensitivity(fractions, {n: tuple(row) for n, row in rows}, value_of(metric, params))


def _called(each: tuple[str, float]) -> str:
    return f"{each[0]}, {each[1]:.0%} removed"


def _check_structure(structure: Any) -> None:
    if not (structure is None or isinstance(structure, Structure)):
        raise TypeError(
            f"structure of jp.sensitivity is {type(structure).__name__}; wanted what "
            "jp.infer_structure found, or None for single entries of each leaf: write "
            "jp.sensitivity(params, structure, scores, metric=accuracy)"
        )


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(f) for f in several("fractions", fractions))
    if not found or not all(0 < f < 1 for f in found) or sorted(found) != [*found]:
        raise ValueError(f"fractions are {found}; wanted ascending numbers between 0 and 1")
    return found


def _of_dimensions(structure: Structure, dims: str | Sequence[str]) -> dict[str, Any]:
    return {
        name: structured(structure, dims=glob.escape(name)) for name in chosen_dims(structure, dims)
    }


def _of_leaves(params: Any, where: Callable[[Any, Any], Any]) -> dict[str, Any]:
    flat = named_leaves(params)
    chosen = [path for path, leaf in flat if where(path, leaf)]
    if not chosen:
        raise ValueError("where chooses no leaf of params; there is no sensitivity to find")
    return {name: unstructured(where=_only(name)) for name in chosen}


def _only(name: str) -> Callable[[Any, Any], bool]:
    return lambda path, leaf: path == name
