"""The gallery: notebooks as pages, and a card with a thumbnail for each."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any


def write(notebooks: Path, folder: Path) -> None:
    """Copies notebooks into the gallery's folder, and a picture of each where it has one."""
    pictures = folder / "thumbnails"
    pictures.mkdir(parents=True, exist_ok=True)
    for path in sorted(notebooks.glob("*.ipynb")):
        copy = folder / path.name
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)
        drawn = thumbnail(json.loads(path.read_text()))
        if drawn:
            (pictures / f"{path.stem}.png").write_bytes(drawn)


def thumbnail(notebook: dict[str, Any]) -> bytes | None:
    """Returns the last picture that a notebook shows."""
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", [])]
    drawn = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    return base64.b64decode("".join(drawn[-1])) if drawn else None
