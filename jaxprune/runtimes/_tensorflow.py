"""Programs as functions of TensorFlow, by jax2tf, for SavedModels and LiteRT."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from jaxprune.runtimes._runtime import package
from jaxprune.runtimes.freezing import Frozen

NAMES = "tensorflow", "tensorflow-cpu", "tensorflow-intel"  # packages that bring it


def module(frozen: Frozen, extra: str, platforms: tuple[str, ...] = ("cpu",)) -> Any:
    """A ``tf.Module`` whose ``f(x0, x1, ...)`` gives ``{"y0": ..., "y1": ...}``.

    Raises:
      ImportError: without TensorFlow.
    """
    tf = package("tensorflow", extra)
    jax2tf = package("jax.experimental.jax2tf", extra)
    leaves = jax.tree.leaves(frozen.args)
    converted = jax2tf.convert(
        _callable(frozen, platforms),
        polymorphic_shapes=[str(x.shape).replace("'", "") for x in leaves],
        with_gradient=False,
        native_serialization_platforms=platforms,
    )

    def f(*xs: Any) -> dict[str, Any]:
        return {f"y{i}": y for i, y in enumerate(converted(*xs))}

    types = [_type(tf, x, f"x{i}") for i, x in enumerate(leaves)]
    made = tf.Module()
    made.f = tf.function(f, autograph=False, input_signature=types)
    return made


def _callable(frozen: Frozen, platforms: tuple[str, ...]) -> Any:
    """The program of flat arrays; jax2tf has names of sizes of its own, which JAX matches."""
    if not frozen.named:
        return frozen.flat
    exporting = jax.export.export(jax.jit(frozen.flat), platforms=platforms)
    return exporting(*jax.tree.leaves(frozen.args)).call


def _named(x: Any) -> bool:
    return any(jax.export.is_symbolic_dim(n) for n in x.shape)


def _type(tf: Any, x: Any, name: str) -> Any:
    shape = [None if jax.export.is_symbolic_dim(n) else n for n in x.shape]
    return tf.TensorSpec(shape, tf.as_dtype(x.dtype), name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of what TensorFlow's packages call within themselves, and their progress."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
