"""Real images for the main job, from the first source that this machine has.

The order is: Fashion-MNIST already prepared by tensorflow-datasets, Fashion-MNIST from Debian's
package ``dataset-fashion-mnist``, Fashion-MNIST downloaded through tensorflow-datasets, and, with
none of these, the digits that scikit-learn embeds. Which one it was, and why not the ones before,
is part of the result.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import logging
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CONNECT_SECONDS = 3  # a machine with no network must not be kept waiting
DOWNLOAD_SECONDS = 300

Split = tuple[np.ndarray, np.ndarray]  # uint8 images of shape (n, height, width, 1), labels (n,)


class Unavailable(Exception):
    """A source that this machine does not have; the text says why and what would bring it."""


@dataclasses.dataclass(frozen=True)
class Data:
    """One data set: normalised float32 images, int32 labels, and where they came from."""

    name: str
    source: str
    train_x: np.ndarray  # (n, height, width, 1), zero mean and unit variance over the training set
    train_y: np.ndarray  # (n,)
    test_x: np.ndarray
    test_y: np.ndarray
    passed_over: tuple[str, ...] = ()  # the sources tried before, each with the reason

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def describe(self) -> str:
        """Returns one line: the name, the source, the sizes."""
        height, width = self.train_x.shape[1:3]
        sizes = f"{len(self.train_x):,} training and {len(self.test_x):,} test images"
        return (
            f"{self.name} from {self.source}: {sizes} of {height}x{width}, {self.classes} classes"
        )


def load(choice: str = "auto") -> Data:
    """Returns the data set of the first source in ``SOURCES`` that this machine has.

    Args:
      choice: ``"auto"``, or the name of one source to insist on.

    Raises:
      Unavailable: the one source insisted on is not to be had here.
    """
    if choice != "auto":
        return SOURCES[choice]()
    passed_over: list[str] = []
    for name, source in SOURCES.items():
        try:
            return dataclasses.replace(source(), passed_over=tuple(passed_over))
        except Unavailable as error:
            passed_over.append(f"{name}: {error}")
    raise Unavailable("; ".join(passed_over))


def from_tfds() -> Data:
    """Returns Fashion-MNIST as tensorflow-datasets has prepared it on this machine before."""
    builder = _tfds_builder()
    if not builder.is_prepared():
        raise Unavailable(f"nothing is prepared under {builder.data_dir}")
    try:  # needs no tensorflow
        rows = builder.as_data_source()
        batches = {name: _stack(rows[name]) for name in FILES}
    except NotImplementedError as error:
        if not importlib.util.find_spec("tensorflow"):
            message = "prepared in a format that only tensorflow reads: pip install tensorflow"
            raise Unavailable(message) from error
        import tensorflow_datasets as tfds

        batches = tfds.as_numpy(builder.as_dataset(batch_size=-1))
    train, test = ((batches[name]["image"], batches[name]["label"]) for name in FILES)
    return _make("Fashion-MNIST", "tensorflow-datasets, prepared on this machine", train, test)


def from_debian(folder: Path = DEBIAN_FOLDER) -> Data:
    """Returns Fashion-MNIST from the Debian package ``dataset-fashion-mnist``."""
    if not folder.is_dir():
        raise Unavailable(f"{folder} is not there: apt-get install dataset-fashion-mnist")
    paths = {split: [folder / name for name in names] for split, names in FILES.items()}
    train, test = (_read_idx(*paths[split]) for split in FILES)
    return _make("Fashion-MNIST", "the Debian package dataset-fashion-mnist", train, test)


def from_download() -> Data:
    """Returns Fashion-MNIST downloaded, and checked against its hashes, by tensorflow-datasets."""
    urls = list(_tfds_builder().url_infos)
    _require_connection(urls[0])
    # In a process of its own, so that a connection that stalls halfway can be given up.
    command = [sys.executable, "-c", "from benchmarks import data; data.download()"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the download took over {DOWNLOAD_SECONDS} s") from error
    if done.returncode:
        raise Unavailable(f"the download failed: {done.stderr.strip().splitlines()[-1]}")
    paths = {Path(urllib.parse.urlsplit(url).path).name: path for url, path in download().items()}
    train, test = (_read_idx(*(Path(paths[name]) for name in names)) for names in FILES.values())
    return _make("Fashion-MNIST", "tensorflow-datasets, downloaded", train, test)


def from_digits() -> Data:
    """Returns the 8x8 digits embedded in scikit-learn, with every fifth image for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] * 15).astype(np.uint8)
    test = np.arange(len(images)) % 5 == 0
    splits = ((images[pick], digits.target[pick]) for pick in (~test, test))
    return _make("digits", "scikit-learn (embedded)", *splits)


SOURCES: dict[str, Callable[[], Data]] = {
    "tfds": from_tfds,
    "debian": from_debian,
    "download": from_download,
    "digits": from_digits,
}


def download() -> dict[str, str]:
    """Fetches the four files through tensorflow-datasets' cache; returns url -> local path.

    Its ``download_and_prepare`` would need tensorflow to unpack and to encode; the verified files
    are all that is needed here.
    """
    import tensorflow_datasets as tfds

    builder = _tfds_builder()
    urls = {url: url for url in builder.url_infos}
    cache = Path(builder.data_dir).parents[1] / "downloads"
    manager = tfds.download.DownloadManager(
        download_dir=cache, url_infos=builder.url_infos, dataset_name="fashion_mnist"
    )
    return {url: str(path) for url, path in manager.download(urls).items()}


def _tfds_builder() -> Any:
    if not importlib.util.find_spec("tensorflow_datasets"):
        raise Unavailable("not installed: pip install tensorflow-datasets")
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns about every set not prepared yet
    # Off: at its first use tfds would ask its own bucket for the set, for minutes with no network.
    return tfds.builder("fashion_mnist", try_gcs=False)


def _require_connection(url: str) -> None:
    address = urllib.parse.urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    # In a process of its own: looking up a name obeys no timeout.
    reach = f"socket.create_connection({(address.hostname, port)}, timeout={CONNECT_SECONDS})"
    command = [sys.executable, "-c", f"import socket; {reach}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=CONNECT_SECONDS + 1)
    except subprocess.SubprocessError as error:
        raise Unavailable(f"{address.hostname} cannot be reached") from error


def _read_idx(images: Path, labels: Path) -> Split:
    """Reads one split in the idx format: a big-endian header, then the bytes row by row."""
    header = np.frombuffer(gzip.decompress(images.read_bytes()), ">i4", count=4)
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return pixels.reshape(*header[1:], 1), classes


def _stack(rows: Any) -> dict[str, np.ndarray]:
    picked = [rows[i] for i in range(len(rows))]
    return {key: np.stack([row[key] for row in picked]) for key in ("image", "label")}


def _make(name: str, source: str, train: Split, test: Split) -> Data:
    mean, deviation = train[0].mean(), train[0].std()

    def normalise(split: Split) -> Split:
        images, labels = split
        return ((images - mean) / deviation).astype(np.float32), labels.astype(np.int32)

    (train_x, train_y), (test_x, test_y) = normalise(train), normalise(test)
    # The files of some sources are sorted or nearly so: one fixed order for all.
    order = np.random.default_rng(0).permutation(len(train_x))
    return Data(name, source, train_x[order], train_y[order], test_x, test_y)
