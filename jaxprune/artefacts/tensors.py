"""The layout of a file: safetensors, whose first entry is a digest of all the rest.

``<8 bytes: length of the header> <header: JSON> <data>``. The header starts with
``{"__metadata__":{"sha256":"...","bytes":"...","jaxprune":"..."}``: the digest of all other
bytes, their number, and the plan as JSON. The header's other entries are the arrays, which any
reader of safetensors can read.

References:
  `The format <https://huggingface.co/docs/safetensors/en/index#format>`_.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxprune.artefacts.checks import Size, conform

CODES = {
    "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_BYTES = (  # The format has no code for these: they are written as bytes, along one more axis.
    "complex128", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz",
)  # fmt: skip
DTYPES = {name: np.dtype(name) for name in (*CODES, *_BYTES)}
OF_CODE = {code: name for name, code in CODES.items()}

START, MIDDLE = b'{"__metadata__":{"sha256":"', b'","bytes":"'
DIGEST = 8 + len(START)  # The digest stands here.
LENGTH = DIGEST + 64 + len(MIDDLE)  # The number of bytes stands here.
FIXED = LENGTH + 16  # So many bytes say what a file is.
_ENTRY = {"dtype": set(OF_CODE), "shape": [Size], "data_offsets": [Size]}


def pack(array: np.ndarray) -> np.ndarray:
    """An array as the format can hold it: types that it has no code for as bytes."""
    array = np.asarray(array, order="C")
    if array.dtype.name in CODES:
        return array
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


def unpack(array: np.ndarray, dtype: str) -> np.ndarray:
    """What :func:`pack` was given; raises ValueError for an array of another type."""
    wanted = DTYPES[dtype]
    if array.dtype == wanted:
        return array
    if dtype in CODES or array.dtype != np.uint8 or array.shape[-1:] != (wanted.itemsize,):
        raise ValueError(f"is {array.dtype.name}{list(array.shape)}, wanted {dtype}")
    return array.view(wanted).reshape(array.shape[:-1])


def head(text: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Everything before the data, with zeros in place of the digest."""
    entries, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        code, shape = CODES[array.dtype.name], list(array.shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    metadata = {"sha256": "0" * 64, "bytes": "0" * 16, "jaxprune": text}
    header = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    whole = bytearray(len(header).to_bytes(8, "little") + header)
    whole[LENGTH : LENGTH + 16] = f"{len(whole) + end:016d}".encode()
    return bytes(whole)


def in_order(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed arrays, those of large entries first, so that each is aligned."""
    packed = {name: pack(array) for name, array in arrays.items()}
    return dict(sorted(packed.items(), key=lambda item: -item[1].itemsize))


def parse(content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """The plan and the arrays of a file; raises ValueError that says what is wrong with it."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content) - 8:
        raise ValueError(f"has a header of {size} bytes in {len(content)}")
    header = parse_json(content[8 : 8 + size])
    conform(header, {str: dict}, "header")
    metadata = header.pop("__metadata__")
    conform(metadata, {"sha256": str, "bytes": str, "jaxprune": str}, "header['__metadata__']")
    return parse_json(metadata["jaxprune"].encode()), dict(_arrays(header, content, 8 + size))


def _arrays(
    header: Mapping[str, Any], content: bytes, end: int
) -> Iterator[tuple[str, np.ndarray]]:
    start = end
    for name, entry in header.items():
        conform(entry, _ENTRY, f"header[{name!r}]")
        dtype, shape = DTYPES[OF_CODE[entry["dtype"]]], entry["shape"]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [begin - start, end - start] or end > len(content):
            raise ValueError(f"has no place for {name!r}, {entry}")
        array = np.ndarray(shape, dtype, content, begin)
        if entry["dtype"] == "BOOL" and (array.view(np.uint8) > 1).any():
            raise ValueError(f"holds bytes that are no booleans in {name!r}")
        yield name, array
    if end != len(content):
        raise ValueError(f"has {len(content) - end} bytes that belong to no array")


def parse_json(text: bytes) -> Any:
    """As json.loads, without NaN and infinities; raises nothing but plain ValueErrors."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"holds no JSON that can be read ({error})") from None
