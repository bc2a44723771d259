"""What is compared: each method turns the trained network into masks, at once or gradually."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from benchmarks.common import train
from benchmarks.common.data import Data
from jaxprune.reduce import Reduction

PyTree = Any

ONE_SHOT, GRADUAL = "one-shot", "gradual"


def l2(variables: PyTree, **evidence: Any) -> PyTree:
    """Returns squared magnitudes: summed over a unit, its squared L2 norm."""
    return jax.tree.map(jnp.square, jp.magnitude(variables))


# name -> how entries are scored, and how a unit's entries come together
STRUCTURED: dict[str, tuple[Callable[..., PyTree], Reduction]] = {
    "magnitude L2": (l2, jp.reduce.sum),
    "Taylor": (jp.scores.taylor, jp.reduce.taylor),
    "BatchNorm scale": (jp.scores.batch_norm_scale, jp.reduce.sum),
}
UNSTRUCTURED = "magnitude"


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    pattern: str  # "unstructured", "2:4" or "structured"
    score: str
    schedule: str  # ONE_SHOT or GRADUAL
    sparsity: float  # of entries; for structured patterns, of the units of each dimension

    @property
    def compact(self) -> bool:
        """Whether there are whole units to remove, so that the network really becomes smaller."""
        return self.pattern == "structured"

    @property
    def label(self) -> str:
        return f"{self.pattern}, {self.score}, {self.schedule}, {self.sparsity:.0%}"

    def score_fn(self) -> Callable[..., PyTree]:
        """Scores over a tree of variables; batch statistics follow the weights and never vote."""
        score = STRUCTURED[self.score][0] if self.compact else jp.magnitude

        def weights_only(variables: PyTree, **evidence: Any) -> PyTree:
            scores = score(variables, **evidence)
            return scores | {"batch_stats": jax.tree.map(jnp.zeros_like, scores["batch_stats"])}

        return weights_only

    def pattern_fn(self, structure: Any) -> Callable[[PyTree, Any], PyTree]:
        """Scores and sparsity -> masks. The stem reads one grey channel: 2:4 does not fit it."""
        if self.pattern == "structured":
            return jp.structured(structure, round_to=8, reduce=STRUCTURED[self.score][1])
        if self.pattern == "2:4":
            return jp.n_m(2, 4, where=lambda path, leaf: leaf.ndim > 1 and leaf.shape[-2] % 4 == 0)
        if self.pattern == "dense":
            return lambda scores, sparsity: dense(scores)
        return jp.unstructured()


def dense(tree: PyTree) -> PyTree:
    """Returns the masks that keep everything."""
    return jax.tree.map(lambda leaf: jnp.asarray(True), tree)


def mean_gradient(model: nn.Module, variables: PyTree, data: Data, batches: int, batch: int) -> Any:
    """Returns the loss's gradient over the first training images, zero for batch statistics."""
    gradient = jax.jit(lambda x, y: train.updates(model, variables, x, y)["params"])
    total = jax.tree.map(jnp.zeros_like, variables)
    for i in range(batches):
        here = slice(i * batch, (i + 1) * batch)
        grad = gradient(data.train_x[here], data.train_y[here])
        total["params"] = jax.tree.map(lambda t, g: t + g / batches, total["params"], grad)
    return total


def one_shot(method: Method, structure: Any, variables: PyTree, gradient: PyTree) -> PyTree:
    """Returns the masks that the method chooses on the trained network."""
    scores = method.score_fn()(variables, grad=gradient)
    return method.pattern_fn(structure)(scores, method.sparsity)


def gradual(
    score: str, structure: Any, inner: optax.GradientTransformation, steps: int, every: int
) -> optax.GradientTransformation:
    """Returns ``inner`` wrapped so that units go over the first two thirds of the steps.

    The final sparsity is the hyperparameter ``target`` in the optimizer's state: all operating
    points of a score share one transformation, and with it one compiled step.
    """
    method = Method("structured", score, GRADUAL, 0.5)
    growth = jp.schedules.cubic(0.0, 1.0, begin=0, end=steps * 2 // 3)

    def with_target(target: Any) -> optax.GradientTransformation:
        return jp.prune(
            inner,
            method.score_fn(),
            lambda step: target * growth(step),
            pattern=method.pattern_fn(structure),
            every=every,
        )

    return optax.inject_hyperparams(with_target)(target=method.sparsity)
