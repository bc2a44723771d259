"""Checkpoints of Orbax: each leaf is read by itself, and written as a zarr array of its own.

Leaves are named as Orbax names them, ``blocks.0.attention.q``. They are read by TensorStore, from
OCDBT or plain folders, and written as plain folders, which Orbax reads as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.artefacts import files
from jaxprune.artefacts.tensors import parse_json
from jaxprune.streaming.shards import raw

TREE = "_METADATA"
COPIED = ("_CHECKPOINT_METADATA", "_sharding", "commit_success.txt")


class Zarrs:
    """A checkpoint that Orbax wrote; the attributes are those of ``Shards``.

    Raises:
      ImportError: without TensorStore.
      ValueError: for a damaged tree of names, or a leaf that can't be read.
    """

    def __init__(self, path: Path):
        self.folder = path
        self.files = sorted(p for p in path.rglob("*") if p.is_file())
        try:
            self.tree = parse_json((path / TREE).read_bytes())
            keys = [row["key_metadata"] for row in self.tree["tree_metadata"].values()]
            self.tensors = {".".join(str(k["key"]) for k in row): None for row in keys}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / TREE} is damaged ({error}); write it anew") from None
        self._spec = _specs(path, self.tree)

    def _open(self, name: str) -> Any:
        try:
            return _tensorstore().open(self._spec(name), read=True).result()
        except ValueError as error:
            raise ValueError(
                f"the leaf {name} of {self.folder} can't be read; write the checkpoint anew "
                f"({str(error).splitlines()[0]:.200})"
            ) from None

    def type(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and dtype of a leaf."""
        found = self._open(name)
        return tuple(found.shape), np.dtype(found.dtype.numpy_dtype)

    def read(self, name: str) -> np.ndarray:
        """The content of a leaf."""
        return np.asarray(self._open(name).read().result())

    # ------------------------------------------------------------------------------- writing

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """What is copied at once: a leaf."""
        return [[name] for name in names]

    def write(
        self, folder: Path, part: int, parts: int, arrays: Mapping[str, np.ndarray], old: str
    ) -> list[Path]:
        """Writes arrays, each as a folder with its bytes in one chunk."""
        return [path for name, x in arrays.items() for path in _write(folder / name, x)]

    def copy(self, folder: Path, part: int, parts: int, names: Sequence[str]) -> list[Path]:
        """Writes leaves as they are."""
        return [path for name in names for path in _write(folder / name, self.read(name))]

    def finish(self, folder: Path, written: Sequence[Path]) -> None:
        """Writes the tree of all leaves that were written; what is only copied stands before it."""
        for name in COPIED:
            if (self.folder / name).exists():
                with files.replacing(folder / name) as file:
                    file.write((self.folder / name).read_bytes())
        shapes = {
            path.parent.name: parse_json(path.read_bytes())["shape"]
            for path in written
            if path.name == ".zarray"
        }
        rows = self.tree["tree_metadata"]
        for row in rows.values():
            name = ".".join(str(k["key"]) for k in row["key_metadata"])
            row["value_metadata"]["write_shape"] = shapes[name]
        told = self.tree | {"tree_metadata": rows, "use_ocdbt": False, "use_zarr3": False}
        with files.replacing(folder / TREE) as file:
            file.write(json.dumps(told).encode())


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            "checkpoints of Orbax are read by TensorStore: pip install 'jaxprune[orbax]'"
        ) from error
    return tensorstore


def _specs(path: Path, tree: Mapping[str, Any]) -> Any:
    driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    base = f"file://{path.resolve()}/"

    def spec(name: str) -> dict[str, Any]:
        if tree.get("use_ocdbt"):
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{path.resolve()}/{name}/"}
        return {"driver": driver, "kvstore": store}

    return spec


def _write(folder: Path, array: np.ndarray) -> list[Path]:
    array = np.asarray(array, order="C")
    folder.mkdir(exist_ok=True)
    name = array.dtype.name
    told = {
        "chunks": [max(n, 1) for n in array.shape], "compressor": None, "dimension_separator": ".",
        "dtype": name if name == "bfloat16" else array.dtype.str, "fill_value": None,
        "filters": None, "order": "C", "shape": array.shape, "zarr_format": 2,
    }  # fmt: skip
    paths = [folder / ".".join("0" * max(array.ndim, 1)), folder / ".zarray"]
    contents: list[Any] = [raw(array), json.dumps(told).encode()]
    for path, content in zip(paths, contents, strict=True):
        with files.replacing(path) as file:
            file.write(content)
    return paths
