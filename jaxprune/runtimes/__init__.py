"""Runtimes: each compiles a JAX function for one engine, ``runtime(fn, *args)``.

An engine is one file with three functions, ``_onnx.py``; nothing of it is imported before it runs.
"""

from collections.abc import Sequence
from typing import Any

from jaxprune.runtimes._runtime import Compiled as Compiled
from jaxprune.runtimes._runtime import Engine as Engine
from jaxprune.runtimes._runtime import Options as Options
from jaxprune.runtimes._runtime import Runtime as Runtime
from jaxprune.runtimes.freezing import Frozen as Frozen

Calibration = Sequence[tuple[Any, ...]] | None


def xla() -> Runtime:
    """Returns the runtime of this process: ``xla()(fn, *args)`` is ``jax.jit(fn)``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> fn = jp.runtimes.xla()(jnp.sin, jnp.ones(3))
      >>> fn(jnp.zeros(3))
      Array([0., 0., 0.], dtype=float32)
    """
    return Runtime(None)
