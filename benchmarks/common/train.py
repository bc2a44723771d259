"""Training and evaluation: one compiled step for every method, dense or masked.

The whole tree of variables is what optax sees. A gradient is an update of the weights; the change
of a batch statistic is an update too, one that passes through untouched. So masks, which cover the
statistics of a pruned channel as well, need no special case anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common.data import Data

PyTree = Any
Fn = Callable[[PyTree, Any], Any]  # (variables, images) -> logits


class Run(NamedTuple):
    """Where a training run stands."""

    variables: PyTree  # params and batch_stats
    opt_state: PyTree


def inference(model: nn.Module) -> Fn:
    """Returns ``fn(variables, images) -> logits``, the function that is pruned and timed."""
    return lambda variables, x: model.apply(variables, x, train=False)


def sgd(steps: int, peak: float) -> optax.GradientTransformation:
    """Returns SGD with Nesterov momentum, decay and a cosine rate, for a tree of variables."""
    rate = optax.warmup_cosine_decay_schedule(peak / 10, peak, steps // 10, steps)
    descend = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)
    )
    return optax.partition(
        {"params": descend, "batch_stats": optax.identity()},
        lambda variables: {key: key for key in variables},
    )


def updates(model: nn.Module, variables: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
    """Returns the gradient of the loss for the weights, and the change of the batch statistics."""

    def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
        logits, new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    grad, new = jax.grad(loss, has_aux=True)(variables["params"])
    change = jax.tree.map(jnp.subtract, new["batch_stats"], variables["batch_stats"])
    return {"params": grad, "batch_stats": change}


@functools.partial(jax.jit, static_argnames=("model", "tx"), donate_argnames="run")
def step(model: nn.Module, tx: Any, run: Run, x: jax.Array, y: jax.Array) -> Run:
    """Returns the run one batch further on."""
    change = updates(model, run.variables, x, y)
    change, opt_state = tx.update(change, run.opt_state, run.variables)
    return Run(optax.apply_updates(run.variables, change), opt_state)


def fit(
    model: nn.Module,
    tx: Any,
    run: Run,
    data: Data,
    *,
    steps: int,
    batch: int,
    seed: int,
    advance: Callable[[], Any] = lambda: None,
) -> Run:
    """Trains for some steps on shuffled batches; ``advance`` is called after each."""
    run = jax.tree.map(jnp.copy, run)  # a step donates its run, and the caller's serves many
    rng = np.random.default_rng(seed)
    per_epoch = len(data.train_x) // batch
    for i in range(steps):
        if i % per_epoch == 0:
            order = rng.permutation(len(data.train_x))
        pick = order[i % per_epoch * batch :][:batch]
        run = step(model, tx, run, data.train_x[pick], data.train_y[pick])
        advance()
    return run


def accuracy(fn: Fn, variables: PyTree, data: Data, batch: int) -> float:
    """Returns the fraction of test images that ``fn`` classifies right.

    The batches all have one size, the last one overlapping the one before it, so that one
    compiled program serves them, and the timing afterwards.
    """
    right = np.zeros(len(data.test_x), bool)
    batch = min(batch, len(right))
    for start in [*range(0, len(right) - batch, batch), len(right) - batch]:
        here = slice(start, start + batch)
        guess = np.argmax(fn(variables, data.test_x[here]), axis=-1)
        right[here] = guess == data.test_y[here]
    return float(right.mean())
