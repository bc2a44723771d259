"""One file for each model, written beside its place and put there in one step.

A reader sees the old file or the new one, whatever happens to the writer: the new one is complete
and on the disk before its name is switched. The digest in it tells any other change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxprune.artefacts import host, tensors

try:
    import fcntl
except ImportError:  # Windows: a file that is open can't be removed there
    fcntl = None  # type: ignore[assignment]

# ----------------------------------------------------------------------------------- writing


def write(folder: str | Path, name: str, text: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``folder/name`` in one step; of several processes the first one writes, all wait."""
    path, error = Path(folder) / name, None
    if host.jax.process_index() == 0:
        try:
            plan = json.dumps(text, allow_nan=False, default=operator.index)  # NumPy's integers
            _write(path, plan, tensors.in_order(arrays))
        except BaseException as caught:  # others wait for this process: it tells them first
            error = caught
    host.agree(error, f"writing {path}")


def _write(path: Path, text: str, arrays: Mapping[str, np.ndarray]) -> None:
    missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        _fill(file, tensors.head(text, arrays), arrays)
    for changed in [p.parent for p in missing]:
        _sync_folder(changed)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes its place in one step once it is complete and on the disk."""
    _remove_leftovers(path)
    with _beside(path) as (file, temporary):
        yield file
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(temporary, path)
    _sync_folder(path.parent)


def _fill(file: BinaryIO, head: bytes, arrays: Mapping[str, np.ndarray]) -> None:
    digest = _without_digest(head)
    file.write(head)
    for array in arrays.values():
        data = array.reshape(-1).view(np.uint8).data
        digest.update(data)
        file.write(data)
    file.seek(tensors.DIGEST)
    file.write(digest.hexdigest().encode())


def _without_digest(start: bytes | memoryview) -> Any:
    """The digest of all but the 64 characters that it is written in."""
    digest = hashlib.sha256(start[: tensors.DIGEST])
    digest.update(start[tensors.DIGEST + 64 :])
    return digest


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file in the same folder, gone afterwards unless it was renamed."""
    file, temporary = _new(path)
    try:
        with file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _new(path: Path) -> tuple[BinaryIO, Path]:
    """An empty file of a new name; its lock tells other savers that its writer lives."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115  (the caller closes it)
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:  # else taken for a leftover before it was locked
            return file, temporary
        file.close()


def _lock(file: Any, wait: bool) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(path: Path) -> None:
    """Removes what killed savers of this file have left; what a living one writes is locked."""
    mine = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.tmp")
    for found in path.parent.iterdir():
        if mine.fullmatch(found.name):
            with contextlib.suppress(OSError), open(found, "rb") as file:
                _lock(file, wait=False)
                found.unlink()


def _sync_folder(folder: Path) -> None:
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------- reading

OLD = "plan.json", "export.json"
AGAIN = "restore it from a copy, or write the model anew with jp.save or jp.export"


def read(folder: str | Path, name: str, format: str, version: int) -> tuple[Any, Any]:
    """The plan and the arrays of ``folder/name``.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: naming the file and what is wrong with it.
    """
    path = Path(folder) / name
    with naming(path):
        text, arrays = tensors.parse(_content(path))
        found = (text.get("format"), text.get("version")) if isinstance(text, dict) else None
        if found != (format, version):
            raise ValueError(f"is {found}, wanted {(format, version)}")
    return text, arrays


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Every error that comes out names the file, and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} {error}; {AGAIN}") from None


def _missing(path: Path) -> Exception:
    old = [name for name in OLD if (path.parent / name).exists()]
    if old:
        return ValueError(
            f"{path.parent / old[0]} was written by an older version of jaxprune, which this one "
            "can't read: load it with that version and save the model anew with this one"
        )
    return FileNotFoundError(f"no saved model at {path.parent}: {path.name} is missing")


def _content(path: Path) -> bytes:
    """All bytes of a file whose length and digest are what it says."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("is no regular file")
    with open(path, "rb") as file:
        length, digest = _said(file.read(tensors.FIXED))
        size = os.fstat(file.fileno()).st_size
        if size != length:
            raise ValueError(f"has {size} bytes, {length} were written: it was cut off or changed")
        file.seek(0)
        content = file.read()
    if _without_digest(memoryview(content)).hexdigest() != digest:
        raise ValueError("was damaged or changed: its bytes don't have the digest written in it")
    return content


def _said(start: bytes) -> tuple[int, str]:
    """The length and the digest that a file says it has."""
    known = (
        re.escape(tensors.START) + b"([0-9a-f]{64})" + re.escape(tensors.MIDDLE) + b"([0-9]{16})"
    )
    found = re.fullmatch(known, start[8:])
    if not found:
        raise ValueError("is cut off, or no file that jaxprune wrote, or damaged at its start")
    return int(found[2]), found[1].decode()
