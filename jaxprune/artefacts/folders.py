"""Several files of one artefact: each switched in one step, the certificate that digests them last.

Whoever reads between two switches finds files that are not those of the certificate, and is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxprune.artefacts import files, host, tensors

CERTIFICATE = "certificate.json"


def write(folder: str | Path, make: Callable[[Path], dict[str, Any]]) -> None:
    """Writes what ``make`` puts into an empty folder, and the certificate that it returns.

    Of several processes the first one writes, and all wait.
    """
    path, error = Path(folder) / CERTIFICATE, None
    if host.jax.process_index() == 0:
        try:
            _write(path, make)
        except BaseException as caught:
            error = caught
    host.agree(error, f"writing {path}")


def _write(path: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files._remove_leftovers(path)
    _remove_parts(path)
    with files._beside(path) as (file, temporary):
        parts = temporary.with_suffix(".parts")
        parts.mkdir()
        try:
            text = make(parts)
            file.write(sealed(text | {"files": digests(parts)}))
            file.flush()
            os.fsync(file.fileno())
            for part in sorted(parts.iterdir()):
                _sync(part)
                _switch(part, path.parent / part.name)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
    files._sync_folder(path.parent)


def _switch(new: Path, place: Path) -> None:
    if place.is_dir():  # A folder can't be replaced in one step.
        os.replace(place, new.parent / f".{place.name}.old")
    os.replace(new, place)


def _sync(path: Path) -> None:
    for part in [path, *path.rglob("*")]:
        if part.is_file():
            with open(part, "rb") as file:
                os.fsync(file.fileno())


def _remove_parts(path: Path) -> None:
    """Removes what killed writers have left: their file is gone."""
    mine = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.parts")
    for found in path.parent.iterdir():
        if mine.fullmatch(found.name) and not found.with_suffix(".tmp").exists():
            shutil.rmtree(found, ignore_errors=True)


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Path of each file below a folder -> its bytes and digest."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _digest(p)}
        for p in found
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(text: dict[str, Any]) -> bytes:
    """A certificate as JSON, with a digest of the rest of it."""
    return json.dumps(text | {"sha256": _seal(text)}, indent=1, allow_nan=False).encode() + b"\n"


def _seal(text: dict[str, Any]) -> str:
    plain = json.dumps({k: v for k, v in text.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def read(folder: str | Path) -> dict[str, Any]:
    """The certificate of a folder whose files are those that it was written for.

    Raises:
      FileNotFoundError: when there is none.
      ValueError: for files that are missing, damaged or changed.
    """
    path = Path(folder) / CERTIFICATE
    with files.naming(path):
        text = tensors.parse_json(path.read_bytes())
        if not isinstance(text, dict) or text.get("sha256") != _seal(text):
            raise ValueError("was damaged or changed: it doesn't have the digest written in it")
    for name, said in text["files"].items():
        with files.naming(path.parent / name), _missing(path.parent / name):
            found = {"bytes": os.stat(path.parent / name).st_size}
            found["sha256"] = _digest(path.parent / name)  # type: ignore[assignment]
            if found != said:
                raise ValueError(
                    f"has {found['bytes']} bytes, and is not the file of {said['bytes']} bytes "
                    f"that {CERTIFICATE} was written for: it was damaged or changed"
                )
    return text


@contextlib.contextmanager
def _missing(path: Path) -> Any:
    try:
        yield
    except FileNotFoundError:
        raise ValueError("is missing") from None
