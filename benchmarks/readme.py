"""Writes the table and pictures of the committed run into README: ``python -m benchmarks.readme``.

They come from ``results/<device>/main.json`` (``python -m benchmarks --full``), and only where no
device has one from ``main-quick.json``. A test holds README and the files together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import results, table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks.readme: begin -->", "<!-- benchmarks.readme: end -->"
POINTS = (0.25, 0.5, 0.75)  # of structured pruning; the file has them all


def section() -> str:
    """Returns what stands between the two marks: for each device its table and pictures."""
    files = _files("main.json") or _files("main-quick.json")
    return "\n\n".join([BEGIN, *map(_device, files), END])


def update(text: str) -> str:
    """Returns README's text with the section anew."""
    pattern = re.escape(BEGIN) + ".*" + re.escape(END)
    return re.sub(pattern, lambda _: section(), text, flags=re.S)


def _files(name: str) -> list[Path]:
    return sorted(results.FOLDER.glob(f"*/{name}"))


def _device(path: Path) -> str:
    found = results.load(path)
    rows = [r for r in found["rows"] if r["pattern"] != "structured" or r["sparsity"] in POINTS]
    folder, stem = path.parent.relative_to(README.parent), path.stem
    return "\n\n".join(
        [
            _heading(found, path),
            table.markdown(rows),
            f"![test accuracy against measured speed-up]({folder}/{stem}_accuracy_speedup.png)",
            f"![measured against theoretical speed-up]({folder}/{stem}_measured_theoretical.png)",
        ]
    )


def _heading(found: dict[str, Any], path: Path) -> str:
    device, data, versions = found["device"], found["data"], found["versions"]
    where = f"{device['processor']}, {device['cores']} cores"
    if device["platform"] != "cpu":
        where = device["kind"]
    seeds = found["settings"]["seeds"]
    many = "1 seed" if seeds == 1 else f"{seeds} seeds, ± half the range"
    return (
        f"{data['name']} ({data['source']}), a residual CNN, {where}, jax {versions['jax']}, "
        f"Python {versions['python']}, {found['date']}, {many}: `{found['command']}`, "
        f"{found['seconds'] / 60:.0f} minutes. More operating points and every raw timing: "
        f"[{path.name}]({path.relative_to(README.parent)})."
    )


if __name__ == "__main__":
    README.write_text(update(README.read_text()))
