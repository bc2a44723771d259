"""Which weights can't be held in few bits: a metric with each leaf rounded alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tables import Part, Shown, Table
from jaxprune.budget.metric import Metric, value_of
from jaxprune.runtimes._runtime import NothingQuantized, Options, Runtime
from jaxprune.typing import path_str


@dataclass(frozen=True)
class Sensitivity(Shown):
    """What :func:`sensitivity` found.

    Attributes:
      exact: the metric of params as they are.
      every: with all matrices rounded.
      leaves: path -> the metric with this leaf alone rounded, the most sensitive one first.
    """

    exact: float
    every: float
    leaves: dict[str, float]
    _metric_of: Callable[[Collection[str]], float] = field(repr=False)

    def keep_float(self, floor: float) -> tuple[str, ...]:
        """Returns the paths to leave in float so that the metric of the rest is at the floor.

        They are what ``jp.runtimes.onnx(keep_float=...)`` and the other engines take. The most
        sensitive leaf is left in float first, until the metric is reached.

        Raises:
          ValueError: when the metric is below the floor without any rounding.
        """
        if not self.exact >= floor:
            raise ValueError(
                f"the metric is {self.exact:.4g} in float, below the floor of {floor:.4g} already; "
                "lower the floor, or give a metric of which larger is better"
            )
        left, found, kept = list(self.leaves), self.every, []
        while left and not found >= floor:
            kept.append(left.pop(0))
            found = self._metric_of(left)
        return tuple(kept)

    def _parts(self) -> Iterable[Part]:
        rows = [
            ("none", f"{self.exact:.4g}", ""),
            ("all", f"{self.every:.4g}", self._loss(self.every)),
        ]
        rows += [(path, f"{x:.4g}", self._loss(x)) for path, x in self.leaves.items()]
        yield Table(("rounded", "metric", "change"), rows, (1, 2))

    def _loss(self, metric: float) -> str:
        return f"{metric - self.exact:+.4g}"


def sensitivity(
    params: Any, metric: Metric, *, bits: int = 8, axis: int = -1, runtime: Runtime | None = None
) -> Sensitivity:
    r"""Returns what a metric loses when the weights of each leaf alone are held in few bits.

    By default no engine is needed: weights are rounded as engines hold them, symmetrically with one
    scale for each channel, and the metric runs in JAX,

    .. math:: w_c \to s_c \, \mathrm{round}(w_c / s_c), \quad s_c = \max|w_c| / (2^{bits-1} - 1).

    Activations stay in float. Leaves with fewer than two axes are not rounded; engines keep
    biases and the weights of norms in float. With a ``runtime`` that quantises, each file is
    written for the engine, one for each leaf and two more, so that activations count, too: what
    goes into and comes out of the operation that reads the leaf.

    Args:
      params: any tree of arrays, such as ``small.params``.
      metric: ``params -> number``, larger = better, on data that is not the test data. With a
        runtime ``runtime -> number``, such as ``lambda r: accuracy(r(fn, params, x))``.
      bits: of each weight, in JAX.
      axis: the output channels of a kernel in JAX: the last axis in Flax, 0 in Equinox.
      runtime: one with ``quantize=``, of which only some weights are to be quantised.

    Returns:
      A :class:`Sensitivity`; ``.keep_float(floor)`` names what should stay in float.

    Raises:
      TypeError: for a metric that doesn't return one number.
      ValueError: for bits outside 2 to 16, params without a matrix, or a runtime that does not
        quantise.

    References:
      Wu, Judd, Zhang, Isaev, Micikevicius, `Integer Quantization for Deep Learning Inference
      <https://arxiv.org/abs/2004.09602>`_, 2020 (partial quantization).

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"fine": jnp.eye(4), "rough": jnp.array([[100.0, 100.0], [0.3, 0.0]])}
      >>> metric = lambda p: 1 - jnp.abs(p["rough"][1, 0] - 0.3) - jnp.abs(p["fine"].sum() - 4)
      >>> found = jp.runtimes.sensitivity(params, metric)
      >>> print(found)
      rounded  metric  change
      none          1
      all         0.7    -0.3
      rough       0.7    -0.3
      fine          1      +0
      >>> found.keep_float(floor=0.9)
      ('rough',)
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"sensitivity wants 2 to 16 bits, got {bits}")
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    matrices = [path_str(path) for path, x in leaves if _is_matrix(x)]
    if not matrices:
        raise ValueError("params hold no floating array of two axes or more to be quantised")
    if runtime is None:
        metric_of = _in_jax(params, metric, bits, axis)
    else:
        metric_of = _in_engine(runtime, metric, matrices)
    alone = {name: metric_of([name]) for name in matrices}
    by_loss = dict(sorted(alone.items(), key=lambda row: row[1]))
    return Sensitivity(metric_of(()), metric_of(matrices), by_loss, metric_of)


def _in_jax(params: Any, metric: Metric, bits: int, axis: int) -> Callable[..., float]:
    """The metric with the chosen leaves rounded."""

    def held(path: Any, x: Any, chosen: Collection[str]) -> Any:
        return rounded(x, bits, axis) if path_str(path) in chosen else x

    return lambda chosen: value_of(
        metric, jax.tree_util.tree_map_with_path(lambda p, x: held(p, x, chosen), params)
    )


def _in_engine(runtime: Runtime, metric: Metric, matrices: list[str]) -> Callable[..., float]:
    """The metric in the engine with the chosen leaves quantised, of those that it quantises.

    Raises:
      ValueError: for a runtime that does not quantise.
    """
    options = runtime.options
    if options.quantize is None:
        raise ValueError(f"{runtime} quantises nothing; give quantize=, or no runtime=")

    def metric_of(chosen: Collection[str]) -> float:
        kept = tuple(sorted({*options.keep_float, *matrices} - {*chosen}))
        some = options._replace(keep_float=kept)
        if chosen:
            with contextlib.suppress(NothingQuantized):  # the engine leaves it in float itself
                return value_of(metric, runtime.replace(some))
        return value_of(metric, runtime.replace(Options(threads=options.threads)))

    return metric_of


def _is_matrix(x: Any) -> bool:
    return jnp.ndim(x) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def rounded(x: jax.Array, bits: int, axis: int) -> jax.Array:
    """Weights as integers of so many bits times a scale for each channel hold them."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    largest = jnp.max(jnp.abs(x), axis=others, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest) / (2 ** (bits - 1) - 1)
    return (jnp.round(x / scale) * scale).astype(x.dtype)
