"""Runtimes: each compiles a JAX function for one engine, ``runtime(fn, *args)``.

An engine is one file with three functions, ``_onnx.py``; nothing of it is imported before it runs.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from jaxprune.runtimes._runtime import Compiled as Compiled
from jaxprune.runtimes._runtime import Engine as Engine
from jaxprune.runtimes._runtime import NothingQuantized as NothingQuantized
from jaxprune.runtimes._runtime import Options as Options
from jaxprune.runtimes._runtime import Runtime as Runtime
from jaxprune.runtimes._runtime import make as _make
from jaxprune.runtimes._sensitivity import Sensitivity as Sensitivity
from jaxprune.runtimes._sensitivity import sensitivity as sensitivity
from jaxprune.runtimes.freezing import Frozen as Frozen

_NAMES = "onnx", "openvino", "litert", "savedmodel"
_FILES = {name: f"jaxprune.runtimes._{name}" for name in _NAMES}
Calibration = Sequence[tuple[Any, ...]] | None


def engine(name: str) -> Engine:
    """Returns the engine of a name, "onnx"; none of its packages is imported.

    Raises:
      ValueError: for a name that is none of ``jp.runtimes``' engines.

    Example:
      >>> import jaxprune as jp
      >>> jp.runtimes.engine("onnx").file
      'model.onnx'
    """
    if name not in _FILES:
        raise ValueError(f"is for the engine {name!r}; this version knows {', '.join(_FILES)}")
    found: Engine = importlib.import_module(_FILES[name]).ENGINE
    return found


def xla() -> Runtime:
    """Returns the runtime of this process: ``xla()(fn, *args)`` is ``jax.jit(fn)``.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> fn = jp.runtimes.xla()(jnp.sin, jnp.ones(3))
      >>> fn(jnp.zeros(3))
      Array([0., 0., 0.], dtype=float32)
    """
    return Runtime(None)


def onnx(
    *,
    quantize: str | None = None,
    calibration: Calibration = None,
    threads: int | None = None,
    keep_float: str | Sequence[str] = (),
) -> Runtime:
    """Returns the runtime of ONNX Runtime, on the processor; ``pip install "jaxprune[onnx]"``.

    Args:
      quantize: None for float32. "dynamic": int8 weights of matrix products and embeddings, within
        loops too, activations quantised while it runs; convolutions stay in float. "static": int8
        weights per channel and uint8 activations, convolutions too, weights within loops stay in
        float.
      calibration: for "static", a list of arguments as the function takes them after params, on
        which the ranges of activations are measured. Evaluate on other data.
      threads: how many an operation takes; None: all cores.
      keep_float: weights that are not quantised, by the paths of leaves or layers: what
        ``jp.runtimes.sensitivity(params, metric).keep_float(floor)`` gives.

    Raises:
      ValueError: for another ``quantize``, "static" without calibration, threads below 1, or
        ``keep_float`` without ``quantize``.

    Example:
      >>> import jaxprune as jp
      >>> jp.runtimes.onnx(quantize="dynamic", threads=1)
      <runtime onnx int8 dynamic threads=1>
    """
    return _make(engine("onnx"), quantize, calibration, threads, keep_float)


def openvino(
    *,
    quantize: str | None = None,
    calibration: Calibration = None,
    threads: int | None = None,
    keep_float: str | Sequence[str] = (),
) -> Runtime:
    """Returns the runtime of OpenVINO, on the processor; ``pip install "jaxprune[openvino]"``.

    It reads the ONNX file that :func:`onnx` writes.

    Args:
      quantize: None for float32; "static": int8 weights and activations.
      calibration, threads, keep_float: as for :func:`onnx`.

    Raises:
      ValueError: as :func:`onnx`.

    Example:
      >>> import jaxprune as jp
      >>> jp.runtimes.openvino()
      <runtime openvino>
    """
    return _make(engine("openvino"), quantize, calibration, threads, keep_float)


def litert(
    *,
    quantize: str | None = None,
    calibration: Calibration = None,
    threads: int | None = None,
    keep_float: str | Sequence[str] = (),
) -> Runtime:
    """Returns the runtime of LiteRT (TensorFlow Lite), on the processor; ``jaxprune[litert]``.

    Sizes are numbers: with names LiteRT runs without its fast kernels.

    Args:
      quantize: None for float32. "dynamic": int8 weights per channel, activations quantised while
        it runs, weights within loops too. "static": int8 weights and activations of convolutions
        and matrix products; what is between them stays in float, loops are refused.
      calibration, threads, keep_float: as for :func:`onnx`.

    Raises:
      ValueError: as :func:`onnx`.

    Example:
      >>> import jaxprune as jp
      >>> jp.runtimes.litert(threads=1)
      <runtime litert threads=1>
    """
    return _make(engine("litert"), quantize, calibration, threads, keep_float)


def savedmodel() -> Runtime:
    """Returns the runtime of TensorFlow, which reads SavedModels; ``jaxprune[savedmodel]``.

    The file runs on processors, and on what else TensorFlow compiles for.

    Example:
      >>> import jaxprune as jp
      >>> jp.runtimes.savedmodel()
      <runtime savedmodel>
    """
    return _make(engine("savedmodel"), None, None, None)
