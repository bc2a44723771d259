"""What scores ask for, computed from a loss and batches of data.

Everywhere ``loss(params, *batch)`` is a number, and ``batches`` a list of tuples of what follows
params: ``[(x, y), ...]``. Results are means over the batches, each batch counting the same, in
float32 or wider. Leaves of params that hold no floats are passed through. ``progress`` is None or
True for a bar once it takes long, False for silence, or what wraps the batches, such as
``tqdm.tqdm``. An iterator in place of the list, or a batch that is no tuple, is a TypeError; no
batches at all are a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._leaf import is_float, widen
from jaxprune._progress import Progress, track
from jaxprune.typing import Params, PyTree

Loss = Callable[..., Any]  # (params, *batch) -> scalar
Batches = Sequence[tuple[Any, ...]]


def mean_gradient(
    loss: Loss, params: Params, batches: Batches, *, progress: Progress = None
) -> PyTree:
    """Returns the gradient of the mean loss: ``grad=`` over more data than one batch can hold.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(p["w"] * x)
      >>> batches = [(jnp.array([1.0]),), (jnp.array([3.0]),)]
      >>> jp.scores.evidence.mean_gradient(loss, {"w": jnp.array([5.0])}, batches)
      {'w': Array([2.], dtype=float32)}
    """
    floats, join = split(params)
    one = jax.jit(jax.grad(lambda w, *batch: loss(join(w), *batch)))
    return join(_mean(lambda *batch: one(floats, *batch), batches, progress))


def gradient_flow(
    loss: Loss, params: Params, batches: Batches, *, progress: Progress = None
) -> PyTree:
    r"""Returns :math:`H g`, half the gradient of :math:`\lVert g \rVert^2`: ``hvp=`` of GraSP.

    With g and H the gradient and Hessian of the mean loss; the batches are gone through twice.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(x * p["w"] ** 2) / 2
      >>> x = jnp.array([1.0, 3.0])
      >>> jp.scores.evidence.gradient_flow(loss, {"w": jnp.array([2.0, 1.0])}, [(x,)])
      {'w': Array([2., 9.], dtype=float32)}
    """
    floats, join = split(params)
    grad = jax.grad(lambda w, *batch: loss(join(w), *batch))
    one, product = jax.jit(grad), jax.jit(_hvp(grad))
    flow = _mean(lambda *batch: one(floats, *batch), batches, progress)
    return join(_mean(lambda *batch: product(floats, flow, *batch), batches, progress))


def hessian_diagonal(
    loss: Loss,
    params: Params,
    batches: Batches,
    *,
    key: jax.Array,
    samples: int = 1,
    progress: Progress = None,
) -> PyTree:
    r"""Returns an estimate of the diagonal of the Hessian: ``hessian=`` of OBD.

    .. math:: \mathrm{diag}(H) = E[v \odot H v]

    over vectors v of random signs; exact where H is diagonal.

    Args:
      loss, params, batches, progress: as everywhere here.
      key: a ``jax.random.key``.
      samples: vectors per batch.

    Raises:
      ValueError: for fewer than one sample.

    References:
      Bekas et al., An estimator for the diagonal of a matrix, 2007. OBD itself has an exact
      recursion for the Gauss-Newton part in networks of its kind.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(x * p["w"] ** 2) / 2
      >>> params, batches = {"w": jnp.array([2.0, 1.0])}, [(jnp.array([1.0, 3.0]),)]
      >>> jp.scores.evidence.hessian_diagonal(loss, params, batches, key=jax.random.key(0))
      {'w': Array([1., 3.], dtype=float32)}
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; wanted the number of random vectors, 1 or more")
    floats, join = split(params)
    product = _hvp(jax.grad(lambda w, *batch: loss(join(w), *batch)))

    @jax.jit
    def estimate(floats: list[Any], key: jax.Array, *batch: Any) -> list[Any]:
        def one(key: jax.Array) -> list[Any]:
            keys = jax.random.split(key, len(floats))
            signs = [
                jax.random.rademacher(k, np.shape(w), widen(w).dtype) for k, w in zip(keys, floats)
            ]
            return [v * x for v, x in zip(signs, product(floats, signs, *batch))]

        each = jax.lax.map(one, jax.random.split(key, samples))
        return [jnp.mean(x, 0) for x in each]

    keys = (jax.random.fold_in(key, i) for i in range(np.iinfo(np.int32).max))
    return join(_mean(lambda *batch: estimate(floats, next(keys), *batch), batches, progress))


def fisher_diagonal(
    loss: Loss, params: Params, batches: Batches, *, progress: Progress = None
) -> PyTree:
    """Returns the mean of squared gradients, one gradient per example: ``fisher=``.

    It is the *empirical* Fisher where the loss takes the labels of the data, and the Fisher itself
    where it samples them from the model. One example at a time, so that memory is that of params.

    Args:
      loss: called with one example at a time, as batches of size 1.
      params: any pytree of arrays.
      batches: tuples of arrays whose first axis is the example.
      progress: as everywhere here.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(p["w"] * x)
      >>> batches = [(jnp.array([1.0, -3.0]),)]
      >>> jp.scores.evidence.fisher_diagonal(loss, {"w": jnp.array([7.0])}, batches)
      {'w': Array([5.], dtype=float32)}
    """
    floats, join = split(params)
    grad = jax.grad(lambda w, *batch: loss(join(w), *batch))

    @jax.jit
    def one(floats: list[Any], *batch: Any) -> list[Any]:
        def add(total: list[Any], example: Any) -> tuple[list[Any], None]:
            squares = [jnp.square(jnp.abs(widen(g))) for g in grad(floats, *example)]
            return [t + s for t, s in zip(total, squares)], None

        zeros = [jnp.zeros_like(jnp.abs(widen(w))) for w in floats]
        alone = examples(batch)
        total, _ = jax.lax.scan(add, zeros, alone)
        return [t / len(jax.tree.leaves(alone)[0]) for t in total]

    return join(_mean(lambda *batch: one(floats, *batch), batches, progress))


def example_gradients(loss: Loss, params: Params, batch: tuple[Any, ...]) -> PyTree:
    """Returns the gradients of single examples: ``grads=`` of WoodFisher.

    Args:
      loss: called with one example at a time, as batches of size 1.
      params: any pytree of arrays.
      batch: a tuple of arrays whose first axis is the example, n of them.

    Returns:
      A tree like params with leaves (n, *shape): n times the memory of params.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> loss = lambda p, x: jnp.sum(p["w"] * x)
      >>> batch = (jnp.array([1.0, -3.0]),)
      >>> jp.scores.evidence.example_gradients(loss, {"w": jnp.array([7.0])}, batch)["w"].shape
      (2, 1)
    """
    floats, join = split(params)
    grad = jax.grad(lambda w, *example: loss(join(w), *example))
    (batch,) = check_batches([batch])
    grads = jax.vmap(lambda example: grad(floats, *example))(examples(batch))
    return join([widen(g) for g in grads])


def split(params: Params) -> tuple[list[Any], Callable[[Sequence[Any]], Params]]:
    """The leaves that hold floats, and the way back to a tree."""
    leaves, treedef = jax.tree.flatten(params)

    def join(floats: Sequence[Any]) -> Params:
        new = iter(floats)
        return jax.tree.unflatten(treedef, [next(new) if is_float(x) else x for x in leaves])

    return [x for x in leaves if is_float(x)], join


def _hvp(grad: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """(floats, vector, *batch) -> H vector."""

    def product(floats: list[Any], vector: list[Any], *batch: Any) -> list[Any]:
        tangents = [v.astype(w.dtype) for v, w in zip(vector, floats)]
        return jax.jvp(lambda w: grad(w, *batch), (floats,), (tangents,))[1]

    return product


def _mean(one: Callable[..., list[Any]], batches: Batches, progress: Progress) -> list[Any]:
    total: list[Any] = []
    count = 0
    for batch in watched(batches, progress):
        jax.block_until_ready(total)  # One batch is ahead at most, so that what is shown is true.
        new = [widen(x) for x in one(*batch)]
        total = [a + b for a, b in zip(total, new)] if count else new
        count += 1
    return [x / count for x in total]


def watched(batches: Batches, progress: Progress) -> Iterable[tuple[Any, ...]]:
    """Each batch, checked, and shown to who waits."""
    total = len(batches) if isinstance(batches, Sized) else None
    return track(check_batches(batches), "batches", progress, total)


def check_batches(batches: Batches) -> Iterator[tuple[Any, ...]]:
    if iter(batches) is batches:
        raise TypeError(
            f"batches is a {type(batches).__name__}, used up after one pass; write list(batches)"
        )
    batch = None
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(
                f"a batch is a {type(batch).__name__}; wanted a tuple of what follows params in "
                "loss(params, *batch), such as (x, y) or (x,)"
            )
        yield batch
    if batch is None:
        raise ValueError("batches is empty; pass at least one tuple: [(x, y)]")


def examples(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """(n, ...) -> (n, 1, ...): mapping over the first axis leaves batches of size 1."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the arrays of a batch have the shapes {[np.shape(x) for x in jax.tree.leaves(batch)]}"
            "; wanted one first axis, the examples, in all of them"
        )
    return jax.tree.map(lambda x: jnp.expand_dims(x, 1), batch)
