"""LiteRT's files (once TensorFlow Lite's) by jax2tf and TensorFlow's converter, run by LiteRT."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.runtimes import _litert_quantize, _probing, _tensorflow
from jaxprune.runtimes._runtime import Engine, Flat, Options, package
from jaxprune.runtimes._runtime import versions as versions_of
from jaxprune.runtimes.freezing import Frozen

PACKAGES = "jax", *_tensorflow.NAMES, "ai-edge-litert", "ai-edge-quantizer"


def write(frozen: Frozen, path: Path, options: Options) -> None:
    """Writes a LiteRT file, quantised if that was asked for.

    Raises:
      ValueError: where sizes are names.
      NotImplementedError: for operations that the converter can't write, with their source lines.
    """
    if frozen.named:
        raise ValueError(
            "the runtime litert wants numbers for sizes: with names LiteRT runs without its fast "
            "kernels, 2.5 to 7 times slower; leave shapes= out, with one file per batch size"
        )
    _litert_quantize.check(frozen, options)
    model: bytes = _probing.converted("litert", frozen, _running)
    if options.quantize:
        twin = _probing.converted("litert", frozen.twin, _running) if frozen.twin else None
        model = _litert_quantize.quantized(model, frozen, options, interpreter, twin)
    path.write_bytes(model)


def _running(frozen: Frozen) -> bytes:
    """A model that has run once: LiteRT refuses some operations only then."""
    model = _converted(frozen)
    interpreter(model, 1)(*_probing.zeros(frozen))
    return model


def _converted(frozen: Frozen) -> bytes:
    lite = package("tensorflow", "litert").lite
    module = _tensorflow.module(frozen, "litert")
    with _tensorflow.quiet():
        converter = lite.TFLiteConverter.from_concrete_functions(
            [module.f.get_concrete_function()], module
        )
        return bytes(converter.convert())


def read(path: Path, options: Options) -> Flat:
    """An interpreter on the processor; calls from several threads take turns."""
    return interpreter(path.read_bytes(), options.threads)


def interpreter(model: bytes, threads: int | None) -> Flat:
    """A function of flat arrays that runs a model."""
    lite = package("ai_edge_litert.interpreter", "litert")
    with _tensorflow.quiet():
        found = lite.Interpreter(model_content=model, num_threads=threads or os.cpu_count())
        found.allocate_tensors()
    inputs, outputs = _places(found)
    lock = threading.Lock()

    def run(*flat: np.ndarray) -> list[np.ndarray]:
        with lock:
            for name, place in inputs.items():
                found.set_tensor(place, flat[int(name[1:])])
            found.invoke()
            return [found.get_tensor(outputs[f"y{i}"]) for i in range(len(outputs))]

    return run


def _places(found: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The tensors of x0, x1, ... and of y0, y1, ..., by name.

    A runner that lives on keeps the interpreter from running.
    """
    runner = found.get_signature_runner()
    details = runner.get_input_details(), runner.get_output_details()
    inputs, outputs = ({name: d["index"] for name, d in each.items()} for each in details)
    return inputs, outputs


def versions() -> dict[str, str]:
    """Of the packages that write, quantise and run LiteRT's files."""
    return versions_of(*PACKAGES)


ENGINE = Engine("litert", "model.tflite", "litert", ("dynamic", "static"), write, read, versions)
