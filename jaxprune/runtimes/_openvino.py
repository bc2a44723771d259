"""OpenVINO, which reads the ONNX files of :mod:`jaxprune.runtimes._onnx`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.runtimes import _onnx
from jaxprune.runtimes._runtime import Engine, Flat, Options, package
from jaxprune.runtimes._runtime import versions as versions_of
from jaxprune.runtimes.freezing import Frozen


def write(frozen: Frozen, path: Path, options: Options) -> None:
    """Writes an ONNX file; its activations are signed, which OpenVINO's kernels take fastest."""
    _onnx.write(frozen, path, options, signed=True)


def read(path: Path, options: Options) -> Flat:
    """A compiled model on the processor, in float32 wherever it is not quantised."""
    core = _package().Core()
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if options.threads:
        config["INFERENCE_NUM_THREADS"] = str(options.threads)
    compiled = core.compile_model(os.fspath(path), "CPU", config)
    request = compiled.create_infer_request()
    read = {name for port in compiled.inputs for name in port.names}

    def run(*flat: np.ndarray) -> list[np.ndarray]:
        given = {f"input_{i}": np.asarray(x, order="C") for i, x in enumerate(flat)}
        found = request.infer({name: given[name] for name in read if name in given})
        return [np.array(found[port]) for port in compiled.outputs]  # The next call reuses these.

    return run


def _package() -> Any:
    """OpenVINO without its telemetry, which forks this process to report that it was imported."""
    hidden = "openvino_telemetry" not in sys.modules and "openvino" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return package("openvino", "openvino")
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]


def versions() -> dict[str, str]:
    """Of the packages that write and run its files."""
    return versions_of("jax2onnx", "onnx", "openvino")


ENGINE = Engine("openvino", "model.onnx", "openvino", ("static",), write, read, versions)
