"""An engine of ``jax.export``, for tests of runtimes that need no package."""

import jax
import numpy as np

from jaxprune import runtimes
from jaxprune.runtimes import Engine


def write(frozen, path, options):
    exporting = jax.export.export(jax.jit(lambda *xs: frozen.flat(*xs)))
    path.write_bytes(exporting(*jax.tree.leaves(frozen.args)).serialize())


def read(path, options):
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    return lambda *flat: [np.asarray(x) for x in program.call(*flat)]


VERSIONS = {"plain": "1.0"}
ENGINE = Engine(
    "plain", "model.plain", "plain", ("dynamic", "static"), write, read, lambda: dict(VERSIONS)
)


def runtime(monkeypatch=None, **options):
    """The runtime; with ``monkeypatch`` files of it can be loaded."""
    if monkeypatch is not None:
        monkeypatch.setitem(runtimes._FILES, "plain", __name__)
    return runtimes._make(
        ENGINE, options.get("quantize"), options.get("calibration"), options.get("threads")
    )
