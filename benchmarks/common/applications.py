"""Writes the tables of docs/applications.md: ``python -m benchmarks.common.applications``.

A section between two markers per study, from the newest committed result; a test holds the page and
the files together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import results

PAGE = results.ROOT / "docs" / "applications.md"
Rows = list[list[str]]


def text(found: dict[str, Any]) -> Iterator[str]:
    for task, seeds in found["networks"].items():
        yield f"{task}, dense {_dense(seeds, 'dense')}, {_count(len(seeds))}"
        rows = [
            [row["row"], _speeds(row.get("speedups", [])), _points(row["points_lost"]),
             ", ".join(f"{e:.2f}" for e in row["errors"])]
            for row in found["summary"][task]
        ]  # fmt: skip
        yield _table(["when, what", "measured", "points lost", "paired error"], rows)


def images(found: dict[str, Any]) -> Iterator[str]:
    for network, seeds in found["networks"].items():
        yield f"{network}, dense {_dense(seeds, 'dense')}, {_count(len(seeds))}"
        rows = [
            [f"{row['asked']:g} x", _speeds(row["speedups"]), _points(row["points_lost"]),
             _points(row["of_trained_on"])]
            for row in found["summary"][network]
        ]  # fmt: skip
        yield _table(["asked", "measured", "points lost", "of dense, trained on as long"], rows)


def thresholds(found: dict[str, Any]) -> Iterator[str]:
    seeds = found["networks"]["CNN"]
    yield f"CNN, dense {_dense(seeds, 'dense')}, {_count(len(seeds))}"
    rows = [
        [row["row"], f"{row['kept']:.1%}", _points(row["untuned_lost"]),
         _points(row["points_lost"])]
        for row in found["summary"]
    ]  # fmt: skip
    head = ["thresholds of convolutions, of dense layers", "weights kept", "points lost at once",
            "after training on"]  # fmt: skip
    yield _table(head, rows)


def self_supervision(found: dict[str, Any]) -> Iterator[str]:
    seeds = next(iter(found["networks"].values())).values()
    dense = {by: np.mean([each["dense"][by] for each in seeds]) for by in ("views", "labels")}
    yield (
        f"A linear probe of the dense encoder: {dense['views']:.1%} where it learned without labels"
        f", {dense['labels']:.1%} where it learned from them, {_count(len(seeds))}"
    )
    rows = [
        [row["row"], _points(row["untuned_lost"]), _points(row["points_lost"])]
        for row in found["summary"]
    ]
    yield _table(["when, by what", "a new probe alone", "trained on, points lost"], rows)


def effects(found: dict[str, Any]) -> Iterator[str]:
    for network in dict.fromkeys(row["network"] for row in found["effects"]):
        rows = [
            [f"{row['first']} {row['says']} {row['second']}", f"{row['sparsity']:.4g}",
             _difference(row), "yes" if row["appears"] else "no"]
            for row in found["effects"] if row["network"] == network
        ]  # fmt: skip
        yield f"{network}"
        yield _table(["claim", "at", "difference ± standard error", "appears"], rows)


def peers(found: dict[str, Any]) -> Iterator[str]:
    for network, seeds in found["networks"].items():
        yield f"{network}, dense {_dense(seeds, 'dense')}, {_count(len(seeds))}"
        rows = [
            [f"{row['asked']:g} x", row["way"], _speeds(row["speedups"]),
             f"{row['accuracy']:.2%} ± {row['standard_error']:.2%}",
             ", ".join(f"{ms:.2f} in {engine}" for engine, ms in row["milliseconds"].items())]
            for row in found["summary"][network]
        ]  # fmt: skip
        head = ["asked", "cut by", "measured, over own dense", "accuracy", "milliseconds"]
        yield _table(head, rows)


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "text": text, "images": images, "thresholds": thresholds, "peers": peers,
    "self_supervision": self_supervision, "effects": effects, "effects_units": effects,
}  # fmt: skip


def _dense(seeds: dict[str, Any], key: str) -> str:
    return f"{np.mean([each[key] for each in seeds.values()]):.1%}"


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _speeds(found: Sequence[float]) -> str:
    return ", ".join(f"{speed:.2f}" for speed in found) + (" x" if found else "")


def _points(found: Sequence[float]) -> str:
    """The mean, and every seed where there are several."""
    if not found:
        return ""
    each = ", ".join(f"{p:.2f}" for p in found)
    return f"{np.mean(found):.2f} ({each})" if len(found) > 1 else each


def _difference(row: dict[str, Any]) -> str:
    if "collapsed_layers" in row:
        return ", ".join(f"{m}: {max(n)} layers lost" for m, n in row["collapsed_layers"].items())
    return f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}"


def _table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def newest(name: str, root: Path = results.FOLDER) -> Path | None:
    """The result of a study that was begun last, on whatever device."""
    paths = sorted(root.glob(f"*/{name}.json"), key=lambda path: results.load(path)["date"])
    return paths[-1] if paths else None


def section(name: str, root: Path = results.FOLDER) -> str:
    """What stands between the markers of a study."""
    path = newest(name, root)
    if path is None:
        return f"No whole run yet: `python -m benchmarks {name}`."
    found = results.load(path)
    device = found["device"]
    where = f"../benchmarks/results/{path.parent.name}/{path.name}"
    source = (
        f"`python -m benchmarks {name}`, {device['processor']}, {device['cores']} cores, "
        f"jax {found['versions']['jax']}, {found['date']}, [{path.name}]({where})"
    )
    return "\n\n".join([*SECTIONS[name](found), f"({source})"])


def marked(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def written(page: str) -> str:
    """The page with all sections as the results have them."""
    for name in SECTIONS:
        begin, end = marked(name)
        if begin not in page or end not in page:
            raise ValueError(f"the page has no place for {name}: {begin} ... {end}")
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n\n{section(name)}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
