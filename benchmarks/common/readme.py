"""Writes tables and pictures of committed runs into README: ``python -m benchmarks.common.readme``.

The first section comes from ``results/<device>/main.json`` (``python -m benchmarks --full``), and
only where no device has one from ``main-quick.json``; the second from ``speed.json``, the third
from ``oneshot.json``. A test holds README and the files together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.common import results, table
from benchmarks.studies.oneshot import report as oneshot_report
from benchmarks.studies.oneshot import structured as oneshot_structured
from benchmarks.studies.oneshot import structured_time as oneshot_structured_time

README = results.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks.readme: begin -->", "<!-- benchmarks.readme: end -->"
SPEED_BEGIN, SPEED_END = "<!-- benchmarks.speed: begin -->", "<!-- benchmarks.speed: end -->"
UNITS_BEGIN, UNITS_END = (
    "<!-- benchmarks.oneshot_structured: begin -->",
    "<!-- benchmarks.oneshot_structured: end -->",
)
ONESHOT_BEGIN = "<!-- benchmarks.oneshot: begin -->"
ONESHOT_END = "<!-- benchmarks.oneshot: end -->"
ASKED = ("search 1.25 x", "search 1.5 x", "search 2 x", "search 3 x")
MEASURED = ("prefill", "predicted", "one token")
POINTS = (0.25, 0.5, 0.75)  # of structured pruning; the file has them all


def section() -> str:
    """Returns what stands between the two marks: for each device its table and pictures."""
    files = _files("main.json") or _files("main-quick.json")
    return "\n\n".join([BEGIN, *map(_device, files), END])


def update(text: str) -> str:
    """Returns README's text with its sections anew."""
    sections = (
        (BEGIN, END, section()),
        (SPEED_BEGIN, SPEED_END, speed_section()),
        (UNITS_BEGIN, UNITS_END, units_section()),
        (ONESHOT_BEGIN, ONESHOT_END, oneshot_section()),
    )
    for begin, end, new in sections:
        text = _between(begin, end, new, text)
    return text


def _between(begin: str, end: str, new: str, text: str) -> str:
    pattern = re.escape(begin) + ".*" + re.escape(end)
    return re.sub(pattern, lambda _: new, text, flags=re.S)


def speed_section() -> str:
    """Returns the measured speeds of ``python -m benchmarks speed``: for each device a table."""
    return "\n\n".join([SPEED_BEGIN, *map(_speeds, _files("speed.json")), SPEED_END])


def oneshot_section() -> str:
    """Returns the perplexities of ``python -m benchmarks oneshot``."""
    return "\n\n".join([ONESHOT_BEGIN, *map(_perplexities, _files("oneshot.json")), ONESHOT_END])


def _perplexities(path: Path) -> str:
    found, where = results.load(path), path.relative_to(README.parent)
    head = oneshot_report.caption(found, str(where))
    picture = f"![perplexity per method]({where.with_suffix('.png')})"
    return "\n\n".join([head, oneshot_report.markdown(found), picture])


def _speeds(path: Path) -> str:
    found = results.load(path)
    device, versions = found["device"], found["versions"]
    head = [*(f"asked {name.split()[1]} x" for name in ASKED), "widths halved", "by hand"]
    head += ["masks at run time", "BCSR, 90 % removed"]
    lines = [["network", *head], ["---", *["---:"] * len(head)]]
    lines += [_speed_row(name, network["rows"]) for name, network in found["networks"].items()]
    folder = path.parent.relative_to(README.parent)
    where = f"{device['processor']}, {device['cores']} cores"
    return "\n\n".join(
        [
            f"Measured speed-up over the dense network, {where}, jax {versions['jax']}, "
            f"{results.days(found, found['networks'].values())}, medians of one interleaved run "
            "each; weights are random, time "
            "does not depend on them "
            f"([speed.json]({folder}/{path.name})):",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            f"![measured speed-up of each way, per network]({folder}/{path.stem}.png)",
        ]
    )


def _speed_row(name: str, rows: dict[str, Any]) -> list[str]:
    wanted = [*ASKED, "widths halved", "halved by hand", "masks at run time", "BCSR"]
    found = [next((r for n, r in rows.items() if n.startswith(w)), None) for w in wanted]
    return [name, *(f"{r['speedup']['median']:.2f} x" if r else "" for r in found)]


def units_section() -> str:
    """Returns what ``python -m benchmarks oneshot_structured`` found, and times on each device."""
    files = _files("oneshot_structured.json")
    return "\n\n".join([UNITS_BEGIN, *map(_units, files), UNITS_END])


def _units(path: Path) -> str:
    """Perplexities, and times of the device on which most rows were timed."""
    found, dense = results.load(path), results.load(path)["dense"]
    times = {file: results.load(file) for file in _files("oneshot_structured_time.json")}
    file = max(times, key=lambda file: len(times[file]["rows"]))
    head = ["units that go", "parameters", "excerpt", "glosses", *MEASURED]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [["none", "134.5 M", f"{dense['excerpt']:.1f}", f"{dense['glosses']:.1f}"]]
    lines[-1] += ["1"] * len(MEASURED)
    lines += [_units_row(*row, times[file]["rows"]) for row in _ordered(found)]
    links = [_where(other, _short(times[other]["device"])) for other in times if other != file]
    others = f"; times of some rows on {', '.join(links)}" if links else ""
    return "\n\n".join(
        [
            f"SmolLM2-135M, perplexities ({results.days(found, found['rows'].values())}, "
            f"{_where(path, path.name)}), and the speed-up over the dense model at batch 1, "
            "measured on two cores and, of prefills, predicted from single operations "
            f"({_short(times[file]['device'])}, jax {times[file]['versions']['jax']}, "
            f"{times[file]['date']}, {_where(file, file.name)}{others}):",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            "![perplexity against measured speed-up]"
            f"({file.with_suffix('.png').relative_to(README.parent)})",
        ]
    )


def _ordered(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """By recipe, as the benchmark lists them; what the search found last, by speed."""
    names = list(oneshot_structured.ROWS)
    place = {name: k for k, name in enumerate(names)}
    return sorted(found["rows"].items(), key=lambda row: (place.get(row[0], len(names)), row[0]))


def _where(path: Path, text: str) -> str:
    return f"[{text}]({path.relative_to(README.parent)})"


def _short(device: dict[str, Any]) -> str:
    """Such as ``AMD EPYC`` or ``Intel Xeon``."""
    return re.sub(r"\(R\)| Processor", "", device["processor"])


def _units_row(name: str, row: dict[str, Any], times: dict[str, Any]) -> list[str]:
    cells = [name, f"{row['params'] / 1e6:.1f} M"]
    cells += [_three_digits(row[text]) for text in ("excerpt", "glosses")]
    runs = times.get(name, {})
    prefill = runs.get("prefill", {})
    speeds = [_speed(prefill), prefill.get("predicted"), _speed(runs.get("one token", {}))]
    return cells + [f"{s:.2f} x" if s else "" for s in speeds]


def _speed(run: dict[str, Any]) -> float | None:
    return run["speedup"]["median"] if run else None


def _three_digits(x: float) -> str:
    return f"{x:.1f}" if x < 1000 else f"{x:.1e}"


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


def pictures() -> None:
    """Draws anew what committed rows and times show."""
    for file in _files("oneshot.json"):
        oneshot_report.plot(results.load(file), file.with_suffix(".png"))
    cut = results.load(*_files("oneshot_structured.json"))
    for file in _files("oneshot_structured_time.json"):
        oneshot_structured_time.plot(cut, results.load(file)["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    README.write_text(update(README.read_text()))
    pictures()
