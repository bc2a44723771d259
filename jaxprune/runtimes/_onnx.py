"""ONNX files by jax2onnx, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.ir import compat
from jaxprune.runtimes import _onnx_graph, _onnx_quantize
from jaxprune.runtimes._onnx_rules import RULES
from jaxprune.runtimes._runtime import Engine, Flat, Options, package
from jaxprune.runtimes._runtime import versions as versions_of
from jaxprune.runtimes.freezing import Frozen
from jaxprune.runtimes.keeping import differing
from jaxprune.runtimes.rewriting import rewritten

PACKAGES = "jax2onnx", "onnx", "onnxruntime"


def write(frozen: Frozen, path: Path, options: Options, signed: bool = False) -> None:
    """Writes an ONNX file, quantised if that was asked for, with signed activations or not."""
    model = _rewritten(frozen)
    floats = set[str]()
    if frozen.twin:
        twin = _onnx_graph.weights(_rewritten(frozen.twin))
        floats = differing(_onnx_graph.weights(model), twin, options.keep_float)
    package("onnx", "onnx").save(model, os.fspath(path))
    if options.quantize:
        _onnx_quantize.quantize(frozen, path, options, signed, floats)


def _rewritten(frozen: Frozen) -> Any:
    model = convert(frozen)
    _onnx_graph.rewrite(model)
    return model


def convert(frozen: Frozen) -> Any:
    """An ONNX model of a program.

    Raises:
      NotImplementedError: for an operation that jax2onnx can't write, with its source line.
    """
    closed = rewritten(frozen.closed, RULES)
    _check_keys(closed)
    specs = jax.tree.leaves(frozen.args)
    every = [*specs, *(v.aval for v in closed.jaxpr.outvars)]
    wide = any(x.dtype == np.float64 for x in every)
    names = [f"input_{i}" for i in range(len(specs))]
    with _as_they_were(jnp, jax.lax, jax.nn, jax.random), _x64_as_it_was():
        to_onnx = package("jax2onnx", "onnx").to_onnx
        try:
            fn = core.jaxpr_as_fun(closed)
            return to_onnx(fn, specs, enable_double_precision=wide, input_names=names)
        except Exception as error:
            raise NotImplementedError(_unsupported(error)) from error


@contextlib.contextmanager
def _as_they_were(*modules: Any) -> Iterator[None]:
    """Modules with the functions that they had: jax2onnx leaves its own jnp.cumsum behind."""
    before = [(module, dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, names in before:
            for name, value in names.items():
                if vars(module).get(name) is not value:
                    setattr(module, name, value)


@contextlib.contextmanager
def _x64_as_it_was() -> Iterator[None]:
    """64 bits stay on or off: jax2onnx leaves for all threads what it has found in this one."""
    before = _x64_of_all_threads()
    try:
        yield
    finally:
        if _x64_of_all_threads() != before:
            jax.config.update("jax_enable_x64", before)


def _x64_of_all_threads() -> bool:
    """What a thread finds that no ``with jax.enable_x64`` is around."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: jnp.zeros(0, float).dtype == np.float64).result()


def _check_keys(closed: Any) -> None:
    """Raises for random keys, which ONNX has no type for."""
    jaxpr = closed.jaxpr
    for var in (*jaxpr.constvars, *jaxpr.invars):
        if jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.extended):
            reader = next((eqn for eqn in jaxpr.eqns if var in eqn.invars), None)
            what = _named(reader) if reader else "keys"
            raise NotImplementedError(
                f"the runtime onnx can't do {what}: it has no random keys; draw numbers outside, "
                "and pass them, or freeze the function without dropout"
            )


def _named(eqn: Any) -> str:
    """``cumsum at model.py:12 (Net.__call__)``"""
    line = compat.source_line(eqn)
    return f"{eqn.primitive.name} at {line}" if line else str(eqn.primitive.name)


def _unsupported(error: BaseException) -> str:
    """Names the equation that was being written."""
    found, at = None, error.__traceback__
    while at is not None:
        eqn = at.tb_frame.f_locals.get("eqn")
        found, at = eqn if isinstance(eqn, core.JaxprEqn) else found, at.tb_next
    what = _named(found) if found else "this function"
    return f"the runtime onnx can't do {what}: jax2onnx says {type(error).__name__}: {error}"


def read(path: Path, options: Options) -> Flat:
    """A session of ONNX Runtime on the processor.

    Its threads stop when a call returns: by default they go on spinning, and take the cores from
    whatever is called next, such as the other models of a comparison.
    """
    ort = package("onnxruntime", "onnx")
    config = ort.SessionOptions()
    config.log_severity_level = 3
    config.add_session_config_entry("session.force_spinning_stop", "1")
    if options.threads:
        config.intra_op_num_threads = options.threads
    with _telling(path):
        session = ort.InferenceSession(os.fspath(path), config, providers=["CPUExecutionProvider"])
    read = {i.name for i in session.get_inputs()}  # Others have no effect.

    def run(*flat: np.ndarray) -> list[np.ndarray]:
        given = {f"input_{i}": x for i, x in enumerate(flat)}
        with _telling(path):
            return list(session.run(None, {name: given[name] for name in read}))

    return run


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Says whose error it is.

    Raises:
      RuntimeError: for a file that ONNX Runtime can't run, though it is written.
    """
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime can't run {path.name}: {error}") from error


def versions() -> dict[str, str]:
    """Of the packages that write and run ONNX files."""
    return versions_of(*PACKAGES)


ENGINE = Engine("onnx", "model.onnx", "onnx", ("dynamic", "static"), write, read, versions)
