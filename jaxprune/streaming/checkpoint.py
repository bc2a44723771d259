"""A checkpoint on disk, of which only what is asked for is read."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.streaming import shards, zarrs
from jaxprune.typing import Params, PyTree, path_str


@dataclass(frozen=True)
class Transposed:
    """A tensor that is the transpose of a leaf, as (out, in) is of a kernel (in, out).

    Attributes:
      name: the tensor's.
    """

    name: str


class Checkpoint:
    """Tensors by name, in safetensors or as Orbax writes them; opening it reads no tensor.

    Args:
      path: a folder with ``model.safetensors`` or ``model.safetensors.index.json`` and its shards,
        one safetensors file, or a folder that Orbax wrote.

    Attributes:
      names: of all tensors; those of Orbax are joined by dots, ``blocks.0.q``.

    Raises:
      FileNotFoundError: where there is none, or a shard is missing.
      ValueError: for a file that is cut off or damaged, or a tensor that stands in two shards.
      ImportError: for Orbax without TensorStore.

    Example:
      >>> import pathlib, tempfile, numpy as np, jaxprune as jp
      >>> from safetensors.numpy import save_file
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> save_file({"up.weight": np.ones((8, 3), np.float32)}, file)
      >>> checkpoint = jp.oneshot.Checkpoint(file)
      >>> checkpoint.shapes({"up": jp.oneshot.Transposed("up.weight")})
      {'up': ShapeDtypeStruct(shape=(3, 8), dtype=float32)}
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.store = _opened(self.path)
        self.names = tuple(self.store.tensors)

    def shapes(self, names: PyTree) -> PyTree:
        """Returns the shapes of tensors, as ``jax.ShapeDtypeStruct``; a tree like ``names``.

        Args:
          names: any pytree of names, or of :class:`Transposed`.

        Raises:
          ValueError: for a name that is not there.
        """
        self.check_names(names)
        return jax.tree.map(self._shape, names)

    def load(self, names: PyTree) -> Params:
        """Returns tensors as arrays; a tree like ``names``.

        Args:
          names: any pytree of names, or of :class:`Transposed`.

        Raises:
          ValueError: for a name that is not there, or 64 bits where JAX has them switched off.
        """
        self.check_names(names)
        return jax.tree.map(self._array, names)

    def _shape(self, name: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = self.store.type(plain(name))
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"the tensor {plain(name)} is {dtype.name}, and JAX has 64 bits switched off; "
                "write with jax.enable_x64(True): ... around the call"
            )
        return jax.ShapeDtypeStruct(shape[::-1] if name != plain(name) else shape, dtype)

    def _array(self, name: Any) -> jax.Array:
        self._shape(name)
        found = self.store.read(plain(name))
        return jax.device_put(np.ascontiguousarray(found.T) if name != plain(name) else found)

    def check_names(self, names: PyTree) -> None:
        """Raises ValueError for a leaf that names no tensor."""
        for path, name in jax.tree_util.tree_leaves_with_path(names):
            if not isinstance(name, str | Transposed):
                raise TypeError(
                    f"names hold {name!r:.60} at {path_str(path)}; wanted the name of a tensor, "
                    "or jp.oneshot.Transposed(name)"
                )
            if plain(name) not in self.store.tensors:
                near = difflib.get_close_matches(plain(name), self.names, 3, 0.3)
                raise ValueError(
                    f"{self.path} holds no tensor {plain(name)!r}, wanted at {path_str(path)}; "
                    f"near names: {near or list(self.names[:3])}"
                )


def plain(name: str | Transposed) -> str:
    """The name of a tensor."""
    return name if isinstance(name, str) else name.name


def _opened(path: Path) -> Any:
    if path.is_file() or any((path / n).exists() for n in (shards.INDEX, shards.SINGLE)):
        return shards.Shards(path)
    if (path / zarrs.TREE).exists():
        return zarrs.Zarrs(path)
    raise FileNotFoundError(
        f"no checkpoint at {path}: it is no file, and no folder with {shards.INDEX}, "
        f"{shards.SINGLE} or Orbax's {zarrs.TREE}"
    )
