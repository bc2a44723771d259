"""All studies with what they claim, their commands, minutes and results: one source of tables.

``python -m benchmarks --list``, ``docs/results/index.md`` and ``docs/reviewing.md`` show the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import results
from benchmarks.pages import markdown
from benchmarks.pages.findings import FINDINGS
from benchmarks.studies import STUDIES as STUDIES

MINUTES = "minutes.json"  # of each study's last whole run, beside its results
NONE = "no result is committed yet"


class Fact(NamedTuple):
    """One study as a reviewer asks for it."""

    study: str
    question: str
    claim: str  # empty where nothing is claimed
    result: str  # the numbers of the file measured last, in words
    minutes: str  # of whole runs, on each device that noted one
    quick: bool  # whether ``--quick`` gives a look
    files: list[Path]


def facts(root: Path = results.FOLDER) -> list[Fact]:
    """Returns a fact for each study, in the order of its table."""
    return [_fact(name, root) for name in STUDIES]


def _fact(name: str, root: Path) -> Fact:
    study, files = STUDIES[name], results.files(name, root)
    claim, result = "", NONE
    if files:
        result = "see its page"
        if name in FINDINGS:
            claim = FINDINGS[name].claim
            result = FINDINGS[name].result(results.load(files[-1]))
    minutes = ", ".join(_minutes(name, root, files)) or "not recorded"
    return Fact(name, study.question, claim, result, minutes, study.quick is not None, files)


def _minutes(name: str, root: Path, files: list[Path]) -> Iterator[str]:
    """Minutes that the command noted; else the seconds that a file itself holds."""
    noted = [results.load(path) for path in sorted(root.glob(f"*/{MINUTES}"))]
    if any(name in found for found in noted):
        yield from (f"{found[name]['minutes']:g}" for found in noted if name in found)
        return
    for found in map(results.load, files):
        each = [found, *(n for n in found.get("networks", {}).values() if isinstance(n, dict))]
        seconds = [e["seconds"] for e in each if isinstance(e.get("seconds"), float)]
        if seconds:
            yield f"{sum(seconds) / 60:.0f}"


def index(at: Path) -> str:
    """Returns the table of docs/results/index.md."""
    rows = [
        [f"[{f.study}]({f.study}.md)", f.question, (f.claim and f"**{f.claim}.** ") + f.result]
        for f in facts()
    ]
    return markdown.table(["study", "question", "what is committed"], rows, left=3)


def claims(at: Path) -> str:
    """Returns the table of docs/reviewing.md."""
    rows = [
        [
            f.claim or f.question,
            f"`python -m benchmarks{'' if f.study == 'main' else f' {f.study}'}`",
            f.minutes,
            "yes" if f.quick else "no",
            f.result,
            ", ".join(_result(path, at) for path in f.files),
        ]
        for f in facts()
    ]
    head = ["what is claimed", "command", "minutes", "`--quick`", "committed result", "file"]
    return markdown.table(head, rows, left=6)


def _result(path: Path, at: Path) -> str:
    found = results.load(path)
    return f"{markdown.link(path, at)} ({markdown.device(found)}, {markdown.days(found)})"


def versions(at: Path) -> str:
    """Returns which devices and versions the committed files name."""
    every = [results.load(p) for p in sorted(results.FOLDER.glob("*/*.json")) if p.name != MINUTES]
    devices = sorted({markdown.device(found) for found in every if "device" in found})
    jax = sorted(
        {found["versions"]["jax"] for found in every if "jax" in found.get("versions", {})}
    )
    return f"Committed results come from {', '.join(devices)}, with jax {', '.join(jax)}."


def correctness(at: Path) -> str:
    """Returns what random programs and networks by others have shown."""
    (path,) = (results.ROOT / "tests" / "results").glob("*/fuzz.json")
    found = results.load(path)
    counts = found["counts"]
    return (
        "`python -m tests.fuzz` compacts random programs under random masks and compares them with "
        "the masked model in float64, cuts other functions of their parameters by `small.cut`, and "
        "checks the laws of `restrict`, `expand` and the certificate in each. The committed run "
        f"({markdown.link(path, at)}, {markdown.device(found)}, {found['date']}): "
        f"{counts['programs']:,} programs under {counts['masks']:,} masks, "
        f"{counts['silent_differences']} silent differences, {counts['crashes']} crashes, "
        f"{len(counts['laws_broken'])} laws broken; largest relative error "
        f"{counts['largest_relative_error']:.0e}."
    )
