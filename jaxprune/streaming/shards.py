"""Files in the layout of safetensors, of which single tensors are read, copied and written.

``<8 bytes: length of the header> <header: JSON> <data>``, see :mod:`jaxprune.artefacts.tensors`.
Nothing is mapped into memory: what was read is all that a process holds.

References:
  `The format <https://huggingface.co/docs/safetensors/en/index#format>`_.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.artefacts import files
from jaxprune.artefacts.checks import Size, conform
from jaxprune.artefacts.tensors import CODES, OF_CODE, parse_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 2**23  # Bytes that are copied at once.
ALIGNED = 64  # Bytes: XLA's buffers on the host begin at multiples of it.
_ENTRY = {"dtype": str, "shape": [Size], "data_offsets": [Size]}


class Tensor(NamedTuple):
    """Where a tensor stands."""

    code: str  # the format's name of its dtype
    shape: tuple[int, ...]
    file: Path
    begin: int  # in bytes, from the start of the file
    size: int  # in bytes


class Shards:
    """A checkpoint of one file or of several, as Hugging Face writes them.

    Attributes:
      folder: where they stand.
      files: all that is read.
      tensors: name -> :class:`Tensor`.

    Raises:
      FileNotFoundError: for a shard that the index names and that is missing.
      ValueError: for a file that is cut off or damaged, a tensor that stands in two shards, or one
        that is not where the index says.
    """

    def __init__(self, path: Path):
        self.folder = path.parent if path.is_file() else path
        index = self.folder / INDEX
        self.index = None if path.is_file() or not index.exists() else _read_index(index)
        self.files = [path] if path.is_file() else [self.folder / n for n in self._names()]
        self.metadata: dict[Path, dict[str, str]] = {}
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            self._add(file)
        self._check_index()
        if self.index is not None:
            self.files = [index, *self.files]

    def _names(self) -> list[str]:
        return [SINGLE] if self.index is None else sorted(set(self.index["weight_map"].values()))

    def _add(self, file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError(
                f"the shard {file.name} is missing in {file.parent}, and {INDEX} names it; "
                "download it again, or write the checkpoint anew"
            )
        self.metadata[file], found = header(file)
        for name, tensor in found.items():
            if name in self.tensors:
                raise ValueError(
                    f"the tensor {name} stands in two shards, {self.tensors[name].file.name} and "
                    f"{file.name} of {file.parent}; write the checkpoint anew with each tensor once"
                )
            self.tensors[name] = tensor

    def _check_index(self) -> None:
        for name, file in (self.index or {"weight_map": {}})["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ValueError(
                    f"{INDEX} says that {name} stands in {file}, which holds no such tensor; "
                    "download the checkpoint again, or write it anew"
                )

    def type(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and dtype of a tensor."""
        tensor = self.tensors[name]
        if tensor.code not in OF_CODE:
            raise ValueError(
                f"the tensor {name} in {tensor.file.name} is of the type {tensor.code}, which "
                f"arrays can't have; known are {', '.join(OF_CODE)}"
            )
        return tensor.shape, np.dtype(OF_CODE[tensor.code])

    def read(self, name: str) -> np.ndarray:
        """The content of a tensor."""
        (shape, dtype), tensor = self.type(name), self.tensors[name]
        return read(tensor).view(dtype).reshape(shape)

    # ------------------------------------------------------------------------------- writing

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """What is copied at once: the tensors of one shard."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        return list(by_file.values())

    def write(
        self, folder: Path, part: int, parts: int, arrays: Mapping[str, np.ndarray], old: str
    ) -> list[Path]:
        """Writes arrays as one shard, with the metadata of that of the tensor ``old``."""
        ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
        rows = [
            (name, CODES[x.dtype.name], x.shape, x.nbytes, [raw(x)]) for name, x in ordered
        ]  # fmt: skip
        return [self._write(folder, part, parts, rows, old)]

    def copy(self, folder: Path, part: int, parts: int, names: Sequence[str]) -> list[Path]:
        """Writes tensors as one shard, as they are."""
        ordered = sorted((self.tensors[name].begin, name) for name in names)
        found = [(name, self.tensors[name]) for _, name in ordered]
        rows = [(name, t.code, t.shape, t.size, _chunks(t)) for name, t in found]
        return [self._write(folder, part, parts, rows, names[0])]

    def _write(self, folder: Path, part: int, parts: int, rows: list[Any], old: str) -> Path:
        path = folder / f"model-{part + 1:05}-of-{parts:05}.safetensors"
        write(path, rows, self.metadata[self.tensors[old].file])
        return path

    def finish(self, folder: Path, written: Sequence[Path]) -> None:
        """Writes the index of all shards that were written."""
        found = {path.name: header(path)[1] for path in written}
        placed = {name: file for file, tensors in found.items() for name in tensors}
        size = sum(tensor.size for tensors in found.values() for tensor in tensors.values())
        told = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        with files.replacing(folder / INDEX) as file:
            file.write(json.dumps(told, indent=2).encode() + b"\n")


def read(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, at a place in memory where JAX takes them without a copy."""
    space = np.empty(tensor.size + ALIGNED, np.uint8)
    found = space[-space.ctypes.data % ALIGNED :][: tensor.size]
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.begin)
        done = 0
        while done < tensor.size and (count := file.readinto(found[done:].data)):
            done += count
    if done < tensor.size:
        raise cut_off(tensor.file, tensor.begin + tensor.size)
    return found


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array."""
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _chunks(tensor: Tensor) -> Iterator[bytes]:
    with open(tensor.file, "rb") as file:
        file.seek(tensor.begin)
        left = tensor.size
        while left:
            found = file.read(min(CHUNK, left))
            if not found:
                raise cut_off(tensor.file, tensor.begin + tensor.size)
            left -= len(found)
            yield found


def write(path: Path, rows: Sequence[tuple[Any, ...]], metadata: Mapping[str, str]) -> None:
    """Writes a file in one step; rows are (name, code, shape, bytes, chunks of its content)."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, code, shape, size, _ in rows:
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end := end + size]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with files.replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for row in rows:
            for chunk in row[-1]:
                file.write(chunk)


def header(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file.

    Raises:
      ValueError: for a file that is cut off, damaged, or no safetensors file.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > length - 8:
            raise cut_off(path, 8 + size)
        text = file.read(size)
    try:
        told = parse_json(text)
        conform(told, {str: dict}, "header")
        metadata = told.pop("__metadata__", {})
        tensors = {name: _tensor(path, name, entry, 8 + size) for name, entry in told.items()}
    except ValueError as error:
        raise ValueError(
            f"{path} is no safetensors file, or damaged: its {error}; download it again"
        ) from None
    _check_filled(path, 8 + size, length, tensors)
    return metadata, tensors


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    conform(entry, _ENTRY, f"header[{name!r}]")
    begin, *end = entry["data_offsets"]
    if len(end) != 1 or end[0] < begin:
        raise ValueError(f"header[{name!r}] has the offsets {entry['data_offsets']}")
    shape, code, size = tuple(entry["shape"]), entry["dtype"], end[0] - begin
    if code in OF_CODE and size != math.prod(shape) * np.dtype(OF_CODE[code]).itemsize:
        raise ValueError(f"header[{name!r}] has {size} bytes for {code}{list(shape)}")
    return Tensor(code, shape, path, start + begin, size)


def _check_filled(path: Path, start: int, length: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the tensors fill the file, one after another."""
    place = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.size)):
        if tensor.begin != place:
            raise ValueError(
                f"{path} is damaged: a tensor begins at byte {tensor.begin}, and the one before it "
                f"ends at {place}; download it again"
            )
        place += tensor.size
    if place > length:
        raise cut_off(path, place)
    if place < length:
        raise ValueError(
            f"{path} is damaged: {length - place} of its {length} bytes belong to no tensor; "
            "download it again"
        )


def cut_off(path: Path, wanted: int) -> ValueError:
    """The error for a file that is too short."""
    return ValueError(
        f"{path} is cut off: it has {path.stat().st_size} bytes, and its header tells of "
        f"{wanted}; download it again, or write the checkpoint anew"
    )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        told = parse_json(path.read_bytes())
        conform({"weight_map": told.get("weight_map")}, {"weight_map": {str: str}}, "index")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its {error}; download it again") from None
    return told
