"""``python -m benchmarks``: trains, prunes, compacts and times a real network on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import data, plots, results, table
from benchmarks.studies.main import run


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Trains a residual CNN on real images, prunes it with unstructured masks, 2:4 "
        "masks and whole channels at several operating points, compacts what can be compacted, "
        "and measures accuracy, size, FLOPs and time against the dense network in one run.",
        epilog="Writes DIR/<device>/main-quick.json (--full: main.json), with every raw timing, "
        "and two pictures beside it. For README's table: python -m benchmarks.pages.",
    )
    parser.add_argument(
        "--full", action="store_true", help="all operating points, longer training and 3 seeds"
    )
    parser.add_argument(
        "--data",
        choices=["auto", *data.SOURCES],
        default="auto",
        help="where the images come from; auto takes the first of the others that is there",
    )
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, metavar="DIR", help="default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    settings = run.FULL if args.full else run.QUICK
    # A pipe has no width of its own: one that fits the table.
    console = Console() if Console().is_terminal else Console(width=180)
    begin = time.perf_counter()
    images = data.load(args.data)
    for reason in images.passed_over:
        console.print(f"[yellow]not used:[/] {reason}", highlight=False)
    console.print(f"[bold]Data:[/] {images.describe()}", highlight=False)
    rows = _rows(images, settings, console)
    stem = "main" if args.full else "main-quick"
    folder = results.folder(args.results)
    seconds = time.perf_counter() - begin
    results.save(_result(images, settings, rows, seconds), folder / f"{stem}.json")
    title = f"{images.name}, residual CNN, {results.device_name()}"
    console.print(table.rich_table(rows, title))
    written = [folder / f"{stem}.json", *plots.save(rows, title, folder, stem)]
    console.print(f"{seconds:.0f} s. Written:", *written, sep="\n  ", highlight=False)


def _rows(images: data.Data, settings: run.Settings, console: Console) -> list[table.Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("steps"), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=run.count_steps(settings))

        def advance(what: str) -> Any:
            progress.update(bar, description=f"{what:<50}")
            return lambda: progress.advance(bar)

        return list(run.rows(images, settings, advance))


def _result(
    images: data.Data, settings: run.Settings, rows: list[table.Row], seconds: float
) -> dict[str, Any]:
    tested = min(len(images.test_x), settings.test_images)
    about = {"name": images.name, "source": images.source, "passed_over": images.passed_over}
    return results.header("main") | {
        "command": "python -m benchmarks" + (" --full" if settings.mode == "full" else ""),
        "seconds": round(seconds, 1),
        "data": about | {"train_images": len(images.train_x), "test_images": tested},
        "model": repr(run.build(images, settings)),
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }
