"""The tables of studies that have one of their own; all others get :mod:`benchmarks.pages.generic`.

A table is a function ``(file, folder that links start in) -> Markdown``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import results, table
from benchmarks.pages import generic, markdown
from benchmarks.studies import self_supervision
from benchmarks.studies.browser import browser
from benchmarks.studies.effects import claims
from benchmarks.studies.images import images, thresholds
from benchmarks.studies.oneshot import report as oneshot_report
from benchmarks.studies.oneshot import structured as oneshot_structured
from benchmarks.studies.peers import same_weights
from benchmarks.studies.recovery import recovery
from benchmarks.studies.runtimes import int8, int8_pretrained, runtimes, searched
from benchmarks.studies.speech import report as speech_report
from benchmarks.studies.speed import accuracy
from benchmarks.studies.speed import native as native_study
from benchmarks.studies.strangers import strangers
from benchmarks.studies.text import text

ASKED = ("search 1.25 x", "search 1.5 x", "search 2 x", "search 3 x")
MEASURED = ("prefill", "predicted", "one token")
POINTS = (0.25, 0.5, 0.75)  # of structured pruning; the file has them all


def main(path: Path, at: Path) -> str:
    found = results.load(path)
    rows = [r for r in found["rows"] if r["pattern"] != "structured" or r["sparsity"] in POINTS]
    about, seeds = found["data"], found["settings"]["seeds"]
    many = "1 seed" if seeds == 1 else f"{seeds} seeds, ± half the range"
    stem = str(path.with_suffix(""))
    return "\n\n".join(
        [
            f"{about['name']} ({about['source']}), a residual CNN, {many}, "
            f"`{found['command']}`, {found['seconds'] / 60:.0f} minutes. More operating points and "
            "every raw timing are in the JSON.",
            table.markdown(rows),
            markdown.picture(
                Path(f"{stem}_accuracy_speedup.png"), at, "test accuracy against measured speed-up"
            ),
            markdown.picture(
                Path(f"{stem}_measured_theoretical.png"),
                at,
                "measured against theoretical speed-up",
            ),
        ]
    )


def speed(path: Path, at: Path) -> str:
    head = ["network", *(f"asked {name.split()[1]} x" for name in ASKED)]
    head += ["widths halved", "by hand", "masks at run time", "BCSR, 90 % removed"]
    networks = results.load(path)["networks"]
    rows = [_speed_row(name, network["rows"]) for name, network in networks.items()]
    return "\n\n".join(
        [
            "Measured speed-up over the dense network, medians of one interleaved run each; "
            "weights are random, time does not depend on them:",
            markdown.table(head, rows),
            markdown.picture(
                path.with_suffix(".png"), at, "measured speed-up of each way, per network"
            ),
        ]
    )


def _speed_row(name: str, rows: dict[str, Any]) -> list[str]:
    wanted = [*ASKED, "widths halved", "halved by hand", "masks at run time", "BCSR"]
    found = [next((r for n, r in rows.items() if n.startswith(w)), None) for w in wanted]
    return [name, *(f"{r['speedup']['median']:.2f} x" if r else "" for r in found)]


def speed_accuracy(path: Path, at: Path) -> str:
    shown = [accuracy.table(*each) for each in results.load(path)["networks"].items()]
    picture = markdown.picture(path.with_suffix(".png"), at, "accuracy against measured speed-up")
    return "\n\n".join([*map(markdown.from_rich, shown), picture])


def oneshot(path: Path, at: Path) -> str:
    found = results.load(path)
    return "\n\n".join(
        [
            oneshot_report.caption(found, str(Path(markdown.relative(path, at)))),
            oneshot_report.markdown(found),
            markdown.picture(path.with_suffix(".png"), at, "perplexity per method"),
        ]
    )


def oneshot_units(path: Path, at: Path) -> str:
    """Perplexities, and times of the device on which most rows were timed."""
    found = results.load(path)
    times = {file: results.load(file) for file in results.files("oneshot_structured_time")}
    file = max(times, key=lambda file: len(times[file]["rows"]))
    others = [markdown.link(other, at, markdown.device(times[other])) for other in times]
    dense = found["dense"]
    rows = [["none", "134.5 M", f"{dense['excerpt']:.1f}", f"{dense['glosses']:.1f}", *"111"]]
    rows += [_units_row(*row, times[file]["rows"]) for row in _ordered(found)]
    return "\n\n".join(
        [
            "SmolLM2-135M, perplexities, and the speed-up over the dense model at batch 1, "
            "measured and, of prefills, predicted from single operations on "
            f"{markdown.device(times[file])} (times: {', '.join(others)}).",
            markdown.table(["units that go", "parameters", "excerpt", "glosses", *MEASURED], rows),
            markdown.picture(file.with_suffix(".png"), at, "perplexity against measured speed-up"),
        ]
    )


def _ordered(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """By recipe, as the benchmark lists them; what the search found last, by speed."""
    names = list(oneshot_structured.ROWS)
    place = {name: k for k, name in enumerate(names)}
    return sorted(found["rows"].items(), key=lambda row: (place.get(row[0], len(names)), row[0]))


def _units_row(name: str, row: dict[str, Any], times: dict[str, Any]) -> list[str]:
    cells = [name, f"{row['params'] / 1e6:.1f} M"]
    cells += [_three_digits(row[text]) for text in ("excerpt", "glosses")]
    prefill, token = (times.get(name, {}).get(key, {}) for key in ("prefill", "one token"))
    speeds = [_speed(prefill), prefill.get("predicted"), _speed(token)]
    return cells + [f"{s:.2f} x" if s else "" for s in speeds]


def _speed(run: dict[str, Any]) -> float | None:
    return run["speedup"]["median"] if run else None


def _three_digits(x: float) -> str:
    return f"{x:.1f}" if x < 1000 else f"{x:.1e}"


def native(path: Path, at: Path) -> str:
    lines = [
        f"{name}\n{native_study.table(each)}"
        for name, each in results.load(path)["networks"].items()
    ]
    return "\n".join(["```text", *lines, "```"])


def effects(path: Path, at: Path) -> str:
    found = results.load(path)
    picture = path.with_name(f"{path.stem}_perceptron.png")
    drawn = [markdown.picture(picture, at, "accuracy of each method")] if picture.exists() else []
    return "\n\n".join([found["rule"], claims.markdown(found["effects"]), *drawn])


def pretrained(path: Path, at: Path) -> str:
    from benchmarks.studies import pretrained as study

    models = results.load(path)["models"]
    return "\n\n".join(
        markdown.from_rich(study.table(name, each["rows"])) for name, each in models.items()
    )


def _networks(shown: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], str]:
    """A table of what a file holds as "networks", from the study's own for terminals."""

    def written(path: Path, at: Path) -> str:
        tables = shown(results.load(path)["networks"])
        return "\n\n".join(
            map(markdown.from_rich, tables if isinstance(tables, list) else [tables])
        )

    return written


def in_browser(path: Path, at: Path) -> str:
    shown = markdown.from_rich(browser.table(results.load(path)["rows"]))
    return "\n\n".join([shown, markdown.picture(path.with_suffix(".png"), at, "the page")])


def speech(path: Path, at: Path) -> str:
    return markdown.from_rich(speech_report.table(results.load(path)))


TABLES: dict[str, Callable[[Path, Path], str]] = {
    "main": main,
    "speed": speed,
    "speed_accuracy": speed_accuracy,
    "oneshot": oneshot,
    "oneshot_structured": oneshot_units,
    "native": native,
    "effects": effects,
    "effects_units": effects,
    "strangers": _networks(lambda found: [strangers.table(*each) for each in found.items()]),
    "text": _networks(lambda found: [text.table(*each) for each in found.items()]),
    "images": _networks(lambda found: [images.table(*each) for each in found.items()]),
    "thresholds": _networks(lambda found: [thresholds.table(each) for each in found.values()]),
    "self_supervision": _networks(
        lambda found: [self_supervision.table(each) for each in found.values()]
    ),
    "peers": _networks(lambda found: [same_weights.table(*each) for each in found.items()]),
    "whisper": speech,
    "pretrained": pretrained,
    "recovery": _networks(lambda found: [recovery.table(*each) for each in found.items()]),
    "runtimes": _networks(runtimes.table),
    "runtimes_search": _networks(searched.tables),
    "int8": _networks(int8.table),
    "int8_pretrained": _networks(int8_pretrained.table),
    "browser": in_browser,
}


def of(study: str, path: Path, at: Path) -> str:
    """Returns what a study's file shows."""
    if study in TABLES:
        return TABLES[study](path, at)
    return generic.tables(results.load(path))
