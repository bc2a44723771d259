"""A folder that any web server can serve: a page, networks as ONNX files, images to classify."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxprune as jp
from benchmarks.common.data import Data

HERE = Path(__file__).parent
DIST = HERE / "node_modules" / "onnxruntime-web" / "dist"
ENGINE = "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
CLASSES = {
    "Fashion-MNIST": (
        "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
        "ankle boot",
    )
}  # fmt: skip


class Samples(NamedTuple):
    """Images as bytes; a network gets ``low + step * byte``."""

    dataset: str
    classes: tuple[str, ...]
    images: np.ndarray  # uint8, (n, height, width)
    labels: list[int]
    low: float
    step: float

    @classmethod
    def of(cls, data: Data, each: int) -> Samples:
        """The first test images of each class, as many as asked for."""
        low, high = float(data.test_x.min()), float(data.test_x.max())
        step = (high - low) / 255
        firsts = [np.flatnonzero(data.test_y == label)[:each] for label in range(data.classes)]
        picks = np.stack(firsts, 1).reshape(-1)  # one of each class, then another one of each
        images = np.round((data.test_x[picks, ..., 0] - low) / step).astype(np.uint8)
        classes = CLASSES.get(data.name) or tuple(map(str, range(data.classes)))
        return cls(data.name, classes, images, data.test_y[picks].tolist(), low, step)

    @property
    def inputs(self) -> np.ndarray:
        """What a network gets, float32 of shape (n, height, width, 1)."""
        return (self.low + self.step * self.images[..., None].astype(float)).astype(np.float32)


class Network(NamedTuple):
    """One of the networks that the page compares."""

    what: str  # for people
    fn: Any
    args: tuple[Any, ...]  # as jp.export takes them
    quantize: str | None = None
    calibration: Any = None


def write(
    out: Path,
    networks: dict[str, Network],
    samples: Samples,
    accuracy: Callable[[Any], float],
    settings: dict[str, Any] | None = None,
) -> None:
    """Writes the folder.

    Args:
      out: the folder.
      networks: by name; the first one is what others are compared with.
      samples: the images that a person picks from.
      accuracy: of a function of images, in this process, from 0 to 1.
      settings: how the networks were made, kept in the folder.

    Raises:
      FileNotFoundError: where onnxruntime-web is not installed.
    """
    if not (DIST / ENGINE[0]).exists():
        raise FileNotFoundError(f"onnxruntime-web is not here: npm ci --prefix {HERE}")
    (out / "engine").mkdir(parents=True, exist_ok=True)
    for name in ENGINE:
        shutil.copy(DIST / name, out / "engine" / name)
    shutil.copytree(HERE / "page", out, dirs_exist_ok=True)
    rows = []
    for name, network in networks.items():
        runtime = jp.runtimes.onnx(quantize=network.quantize, calibration=network.calibration)
        stem = name.replace(" + ", "-")
        made = jp.export(network.fn, out / stem, *network.args, shapes="b, ...", runtime=runtime)
        rows.append(
            {"name": name, "what": network.what, "file": f"{stem}/model.onnx",
             "bytes": made.size, "accuracy": accuracy(made.fn)}
        )  # fmt: skip
    about = samples._asdict() | {
        "images": samples.images.reshape(len(samples.images), -1).tolist(),
        "size": samples.images.shape[1:],
        "networks": rows,
        "settings": settings or {},
    }
    (out / "about.json").write_text(json.dumps(about))


class Folder(NamedTuple):
    """A folder that was written."""

    about: dict[str, Any]
    runtime: str  # what its files are for, with versions
    functions: dict[str, Callable[[Any], Any]]  # of a batch of images, in ONNX Runtime
    inputs: np.ndarray

    @classmethod
    def read(cls, out: Path) -> Folder:
        """What the page of a folder shows, to be run in this process."""
        about = json.loads((out / "about.json").read_text())
        fields = {name: about[name] for name in Samples._fields}
        images = np.array(about["images"], np.uint8).reshape(-1, *about["size"])
        models = {
            row["name"]: jp.load_exported((out / row["file"]).parent) for row in about["networks"]
        }
        functions: dict[str, Callable[[Any], Any]] = {
            name: functools.partial(m.fn, m.params) for name, m in models.items()
        }
        first: Any = next(iter(models.values())).fn
        return cls(
            about, first.runtime.key, functions, Samples(**fields | {"images": images}).inputs
        )


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(out: Path) -> Iterator[str]:
    """The address of a folder that is served to this machine alone."""
    handler = functools.partial(_Quiet, directory=str(out))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
