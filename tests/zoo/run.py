"""Models as others write them, halved at random: ``python -m tests.zoo``.

For each model every prunable dimension loses a random half of its units. The compact model is
held against its masked model in float32, and where that leaves it open in float64: in value, and
in the gradients of a random weighted sum of the outputs by parameters and by inputs.
Nothing is downloaded: all models are built small from their configuration, and all parameters
are drawn anew so that no zero or one hides an error. A model that fails is a row; a package that
is not installed is skipped.

Every group of models runs in a process of its own. Some groups come from packages that the
project does not depend on; the result names them with their versions.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import importlib.metadata
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import results
from tests.models.outside import GROUPS, PACKAGES
from tests.zoo import check as outside_check
from tests.zoo.check import Row

RESULTS = results.ROOT / "tests" / "results"
VERDICTS = {
    "equal": "certified exact, and equal",
    "refused": "equal; the certificate names units that stay",
    "undefined": "the masked model itself is not a number",
    "wrong": "differs",
    "crashed": "raises",
    "skipped": "not built",
}
COLOURS = {"equal": "green", "wrong": "bold red", "crashed": "bold red"}
MARK = "row "  # of a line of a group's process that is ours; models may print


def rows_of(group: str, names: str, seed: int, float64: bool) -> Iterator[tuple[str, Row]]:
    """Measures the models of a group in this process."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
    try:
        models = importlib.import_module(f"tests.models.outside.{group}").MODELS
    except ImportError as reason:
        yield group, {"status": "skipped", "why": str(reason)}
        return
    for name, build in models.items():
        if fnmatch.fnmatchcase(name, names):
            yield name, outside_check.row_of(build, seed, float64)
            jax.clear_caches()  # a hundred compiled models would fill the memory


def in_process(group: str, names: str, seed: int, float64: bool) -> Iterator[tuple[str, Row]]:
    """Measures the models of a group in a process of its own; its death is a row."""
    options = ["--group", group, "--filter", names, "--seed", str(seed)]
    options += ["--float64"] * float64
    command = [sys.executable, "-m", "tests.zoo", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                yield tuple(json.loads(line.removeprefix(MARK)))
    if process.returncode:
        yield f"{group}: process", {"status": "crashed", "why": f"exit {process.returncode}"}


def cells(name: str, row: Row) -> list[str]:
    """One line of the table."""
    colour = COLOURS.get(row["status"], "yellow")
    head = [name, f"[{colour}]{row['status']}[/]"]
    if "why" in row:
        return [*head, "", "", "", "", "", " ".join(row["why"].split())[:60]]
    errors = [row["error"][key] for key in ("value", "gradient", "input_gradient")]
    whys = [f"{kept} of {size} {name}" for name, (size, kept, _) in row["kept"].items()]
    return [
        *head,
        *("-" if e is None else f"{float(e):.0e}" for e in errors),
        f"{row['params_removed']:.0%}",
        f"{row['seconds']:.1f}",
        ("stay: " + ", ".join(whys))[:60] if whys else "",
    ]


def table(rows: dict[str, Row]) -> Table:
    headings = ("model", "verdict", "error", "gradient", "input gr.", "removed", "s", "notes")
    found = Table(*headings, title="Every prunable dimension halved", caption=caption(rows))
    for name, row in rows.items():
        found.add_row(*cells(name, row))
    return found


def caption(rows: dict[str, Row]) -> str:
    counts = Counter(row["status"] for row in rows.values())
    lines = [f"{counts[key]} {key}: {what}" for key, what in VERDICTS.items() if counts[key]]
    return "\n".join(lines)


def summary(rows: dict[str, Row]) -> dict[str, Any]:
    counts = Counter(row["status"] for row in rows.values())
    ran = [row for row in rows.values() if "params_removed" in row]
    return {
        "models": len(rows) - counts["skipped"],
        **{status: counts[status] for status in VERDICTS},
        "median_params_removed": median(r["params_removed"] for r in ran) if ran else None,
        "median_untouched": median(r["untouched"] for r in ran) if ran else None,
    }


def versions() -> dict[str, str]:
    """The versions of the packages that the models come from."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def finite(tree: Any) -> Any:
    """JSON has no infinity: such numbers become text."""
    if isinstance(tree, dict):
        return {k: finite(v) for k, v in tree.items()}
    return str(tree) if isinstance(tree, float) and not np.isfinite(tree) else tree


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--filter", default="*", help="names of models, with wildcards")
    parser.add_argument("--group", choices=GROUPS, help="only this one, here; a line a model")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--float64", action="store_true", help="always, not only where in doubt")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    if options.group:
        for name, row in rows_of(options.group, options.filter, options.seed, options.float64):
            print(MARK + json.dumps([name, finite(row)]), flush=True)
        return
    begin, rows, console = time.perf_counter(), {}, Console(width=150)
    for group in GROUPS:
        for name, row in in_process(group, options.filter, options.seed, options.float64):
            rows[name] = row
            console.print("  ".join(cell for cell in cells(name, row) if cell), highlight=False)
    console.print(table(rows))
    result = results.header("outside") | {"packages": versions(), "seed": options.seed}
    result |= {"seconds": round(time.perf_counter() - begin), "summary": summary(rows)}
    whole = options.filter == "*"
    path = options.json or (results.folder(RESULTS) / "outside.json" if whole else None)
    if path:
        results.save(result | {"models": rows}, path)


if __name__ == "__main__":
    main()
