"""TensorFlow's SavedModels by jax2tf, run by TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.runtimes import _probing, _tensorflow
from jaxprune.runtimes._runtime import Engine, Flat, Options, package
from jaxprune.runtimes._runtime import versions as versions_of
from jaxprune.runtimes.freezing import Frozen

SIGNATURE = "serving_default"
PLATFORMS = "cpu", "cuda", "tpu"


def write(frozen: Frozen, path: Path, options: Options) -> None:
    """Writes a SavedModel whose signature takes x0, x1, ... and gives y0, y1, ...

    Raises:
      NotImplementedError: for operations that TensorFlow can't run, with their source lines.
    """
    tf = package("tensorflow", "savedmodel")
    module = _probing.converted("savedmodel", frozen, _running)
    with _tensorflow.quiet():
        tf.saved_model.save(module, os.fspath(path), signatures={SIGNATURE: module.f})


def _running(frozen: Frozen) -> Any:
    """A module that has run once: TensorFlow refuses some operations only then."""
    module = _tensorflow.module(frozen, "savedmodel", PLATFORMS)
    with _tensorflow.quiet():
        module.f(*_probing.zeros(frozen))
    return module


def read(path: Path, options: Options) -> Flat:
    """The signature of a SavedModel."""
    tf = package("tensorflow", "savedmodel")
    loaded = tf.saved_model.load(os.fspath(path))
    call = loaded.signatures[SIGNATURE]

    def run(*flat: np.ndarray) -> list[np.ndarray]:
        found = call(**{f"x{i}": tf.constant(x) for i, x in enumerate(flat)})
        return [found[f"y{i}"].numpy() for i in range(len(found))]

    return run


def versions() -> dict[str, str]:
    """Of the packages that write and run SavedModels."""
    return versions_of("jax", *_tensorflow.NAMES)


ENGINE = Engine("savedmodel", "saved_model", "savedmodel", (), write, read, versions)
