"""Runs the example that README and the site open with, and keeps what it printed.

The code is README's first Python block, as it stands there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average


def code() -> str:
    """Returns README's first Python block."""
    found = re.search(r"```python\n(.*?)```", (results.ROOT / "README.md").read_text(), re.S)
    assert found, "README has no Python block"
    return found[1]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run(text: str, folder: Path) -> dict[str, Any]:
    """Returns what the example printed, and its numbers, from the names that it leaves."""
    names: dict[str, Any] = {}
    printed, before, here = io.StringIO(), load_average(), Path.cwd()
    begin = time.monotonic()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README.md", "exec"), names)
    finally:
        os.chdir(here)
    dense, small = names["params"], names["tuned"].params
    compared = names["timing"]
    return {
        "code": digest(text),
        "seconds": round(time.monotonic() - begin, 1),
        "load_average": before,
        "printed": printed.getvalue().splitlines(),
        "params": [jp.cost(names["fn"], dense, names["x"]).params,
                   jp.cost(names["tuned"].fn, small, names["x"]).params],
        "accuracy": [names["accuracy"](names[name]) for name in ("net", "module")],
        "speedup": compared.ratios["small"]._asdict(),
        "timings": {name: timing.to_json() for name, timing in compared.timings.items()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("example", __doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = run(code(), Path(folder))
    path = results.folder(args.results) / "example.json"
    results.save(results.header("example") | found, path)
    print("\n".join(found["printed"]))
    print(path)
