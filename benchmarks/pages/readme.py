"""README's table of six tasks, and what its example printed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.pages import markdown

HEAD = ["task", "dense", "pruned", "measured speed", "quality: dense, pruned", "runtime"]
ROW = "FLAP + refit + bias -50%"  # of pretrained.json: half of the units, repaired
SEARCH = "search 1.25 x + stream"  # of SmolLM2's


def _last(study: str) -> tuple[dict[str, Any], Path]:
    path = results.files(study)[-1]
    return results.load(path), path


def _row(task: str, study: str, at: Path, cells: list[str], runtime: str) -> list[str]:
    page = results.ROOT / "docs" / "results" / f"{study}.md"
    return [markdown.link(page, at, task), *cells, runtime]


def _digits(at: Path) -> list[str]:
    found, _ = _last("example")
    dense, small = found["params"]
    before, after = found["accuracy"]
    cells = [f"{dense:,} weights", f"{small:,} weights", f"{found['speedup']['median']:.2f} x"]
    return _row("digits, the example", "example", at,
                [*cells, f"{100 * before:.1f} %, {100 * after:.1f} %"], "XLA")  # fmt: skip


def _pictures(at: Path) -> list[str]:
    found, _ = _last("recovery")
    seeds = found["networks"]["residual"].values()
    rows = [(s["dense"], r) for s in seeds for r in s["rows"] if _at_two(r)]
    after = statistics.fmean(r["repairs"]["tuned"]["after"] for _, r in rows)
    speeds = [r["speedup"] for _, r in rows]
    cells = [
        "308,074 weights",
        f"{statistics.fmean(r['params'] for _, r in rows):,.0f} weights",
        f"{min(speeds):.2f} to {max(speeds):.2f} x",
        f"{100 * statistics.fmean(d for d, _ in rows):.1f} %, {100 * after:.1f} % "
        f"({len(rows)} seeds)",
    ]
    return _row("pictures, residual CNN", "recovery", at, cells, "XLA")


def _at_two(row: dict[str, Any]) -> bool:
    wanted = {"of": "speedup", "asked": 2.0, "score": "taylor", "objective": "sum"}
    return wanted.items() <= row.items() and "tuned" in row.get("repairs", {})


def _browser(at: Path) -> list[str]:
    found, _ = _last("browser")
    dense, small = found["rows"]["dense"], found["rows"]["pruned + int8"]
    cells = [
        f"{dense['bytes'] / 1e3:,.0f} kB",
        f"{small['bytes'] / 1e3:,.0f} kB, int8",
        f"{small['speedup over the first']:.2f} x",
        f"{100 * dense['accuracy']:.1f} %, {100 * small['accuracy']:.1f} %",
    ]
    return _row("the same in a browser", "browser", at, cells, "onnxruntime-web, Chromium")


def _pretrained(
    at: Path, model: str, task: str, timing: str, quality: tuple[str, str]
) -> list[str]:
    rows = _last("pretrained")[0]["models"][model]["rows"]
    dense, small = rows["dense"], rows[ROW]
    key, text = quality
    cells = [
        f"{dense['params']:,} weights",
        f"{small['params']:,} weights",
        f"{small['timing'][timing]['speedup']['median']:.2f} x",
        text.format(100 * dense[key], 100 * small[key]),
    ]
    return _row(task, "pretrained", at, cells, "XLA")


def _language(at: Path) -> list[str]:
    found, _ = _last("oneshot_structured")
    times, _ = _last("oneshot_structured_time")
    row = found["rows"][SEARCH]
    speed = times["rows"][SEARCH]["prefill"]["speedup"]["median"]
    cells = [
        "134.5 M weights",
        f"{row['params'] / 1e6:.1f} M weights",
        f"{speed:.2f} x",
        f"perplexity {found['dense']['excerpt']:.1f}, {row['excerpt']:.1f}, not tuned",
    ]
    return _row("language, SmolLM2", "oneshot_structured", at, cells, "XLA")


def tasks(at: Path) -> str:
    """Returns six tasks: what was there, what is left, how fast it was measured, how good it is."""
    rows = [
        _digits(at),
        _pictures(at),
        _browser(at),
        _pretrained(at, "MiniLM", "text, MiniLM", "batch 32", ("accuracy", "{:.1f} %, {:.1f} %")),
        _pretrained(at, "Silero VAD", "speech, Silero VAD", "4 s",
                    ("agreement", "decides as the dense one in {1:.1f} % of frames")),
        _language(at),
    ]  # fmt: skip
    studies = "example", "recovery", "browser", "pretrained", "oneshot_structured_time"
    where = dict.fromkeys(markdown.device(_last(name)[0]) for name in studies)
    note = (
        f"All on processors: {', '.join(where)}. Devices, versions and raw times: each row's page."
    )
    return "\n\n".join([markdown.table(HEAD, rows, left=6), note])


def example(at: Path) -> str:
    """Returns what the example printed, where and when."""
    found, path = _last("example")
    said = f"{markdown.device(found)}, jax {found['versions']['jax']}, {found['date']}"
    head = f"It prints ({said}, {found['seconds']:.0f} seconds, {markdown.link(path, at)}):"
    return "\n".join([head, "```text", *found["printed"], "```"])
