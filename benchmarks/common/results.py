"""Where results go: one JSON per job and device, with all that is needed to judge a number."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "jaxprune")


def device() -> dict[str, Any]:
    """Returns what was measured on: JAX's device, and the processor behind it."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.platform(terse=True),
    }


def device_name() -> str:
    """Returns the device in words, such as ``AMD EPYC, 2 cores``."""
    here = device()
    on_cpu = here["platform"] == "cpu"
    return f"{here['processor']}, {here['cores']} cores" if on_cpu else here["kind"]


def folder(root: Path = FOLDER) -> Path:
    """Returns the folder of this device's results, such as ``results/cpu-amd-epyc-2-cores``."""
    name = f"{device()['platform']} {device_name()}"
    return root / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def begun(name: str, root: Path = FOLDER) -> Path:
    """Returns a file of numbers that no device changes: that of the device that began it.

    Rows of several devices stand in it, each with its own.
    """
    return next(iter(sorted(root.glob(f"*/{name}"))), folder(root) / name)


# Studies whose rows stand in files of other names; the first that is there counts.
NAMES = {"main": ("main", "main-quick"), "oneshot_search": ("oneshot_structured",)}


def files(study: str, root: Path | None = None) -> list[Path]:
    """Returns a study's committed files, one per device; the one measured last comes last."""
    for name in NAMES.get(study, (study,)):
        found = sorted((root or FOLDER).glob(f"*/{name}.json"))
        if found:
            return sorted(found, key=lambda path: (load(path)["date"], path))
    return []


def header(job: str) -> dict[str, Any]:
    """Returns the facts that every result file opens with."""
    return {
        "job": job,
        "date": today(),
        "device": device(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def today() -> str:
    return datetime.date.today().isoformat()


def days(found: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """Returns when the rows of a file were measured: a row without a date when the file was."""
    dates = sorted({row.get("date", found["date"]) for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


# Where a machine keeps its packages and this checkout: no business of a result.
PLACES = re.compile(rf'[^\s"]*site-packages/|{re.escape(str(ROOT))}/')


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    # Raw timings one list a line: the file stays readable and its diffs small.
    text = re.sub(r"\[\s+(-?[\d.eE+-]+(?:,\s+-?[\d.eE+-]+)*)\s+\]", _one_line, text)
    path.write_text(re.sub(PLACES, "", text) + "\n")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def continued(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what an interrupted job with the same settings has found, by network."""
    found = load(path) if path.exists() else {}
    same = json.loads(json.dumps(settings)) == found.get("settings")
    return found["networks"] if same else {}


def _one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", match[1]) + "]"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.machine()
