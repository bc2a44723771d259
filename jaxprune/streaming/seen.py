"""What a file was when it was looked at, and whether it still is that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Seen = Mapping[str, Any]  # {"bytes": length, "sha256": digest, "stamp": what changes at each write}


def look(path: Path) -> dict[str, Any]:
    """Returns the length, the digest and the stamp of a file."""
    stamp = _stamp(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest, "stamp": stamp}


def is_same(path: Path, seen: Seen) -> bool:
    """Whether a file holds what it held; its content is read only where its stamp is another."""
    if not path.is_file() or path.stat().st_size != seen["bytes"]:
        return False
    return _stamp(path) == seen.get("stamp") or look(path)["sha256"] == seen["sha256"]


def _stamp(path: Path) -> list[int]:
    told = path.stat()
    return [told.st_mtime_ns, told.st_ctime_ns, told.st_ino]
