"""How fast is a pruned network in a browser?

``python -m benchmarks browser --out FOLDER`` takes the trained residual network of ``recovery``,
prunes it to half of its FLOPs and recovers it as ``int8`` does, and writes a folder with the dense
network, the pruned one, and that in int8 as ONNX files, and a page that runs them by
onnxruntime-web, which ``npm ci`` in this study's folder installs. Serve the folder by any web
server, such as ``python -m http.server --directory FOLDER``. Where there is a Chromium, the page is
opened in it, and what it measured is saved with a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import studies
from benchmarks.common import data, results
from benchmarks.common.machine import load_average
from benchmarks.studies.browser import chromium, folder
from benchmarks.studies.recovery.recovery import QUICK as QUICKLY
from benchmarks.studies.recovery.recovery import Case
from benchmarks.studies.recovery.recovery import Settings as Training
from benchmarks.studies.runtimes import int8

NETWORK = "residual"
WIDTH = 1200  # of the picture, in CSS pixels


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; the whole of it goes into the result file."""

    seed: int = 1
    less: float = 2.0  # FLOPs
    each: int = 2  # images of each class to pick from
    calibration: int = 4  # batches of training images
    test_images: int = 10_000


def networks(case: Case, settings: Settings) -> dict[str, folder.Network]:
    """The trained network, pruned and recovered, and that in int8."""
    one, small = case.x[:1], int8.pruned(case, settings.less)
    calibration = [(x,) for x, _ in case.batches[: settings.calibration]]
    return {
        "dense": folder.Network("as it was trained", case.fn, (case.dense, one)),
        "pruned": folder.Network(f"1/{settings.less:g} of the FLOPs", small, (one,)),
        "pruned + int8": folder.Network(
            "the same, in 8-bit integers", small, (one,), "static", calibration
        ),
    }


def accuracy(fn: Any, images: data.Data, n: int, batch: int = 250) -> float:
    """Returns the share of the first test images that a function gets right."""
    right = [
        np.asarray(fn(images.test_x[i : min(i + batch, n)])).argmax(-1)
        == images.test_y[i : min(i + batch, n)]
        for i in range(0, n, batch)
    ]
    return float(np.concatenate(right).mean())


def measured(out: Path, picture: Path | None = None) -> dict[str, Any]:
    """What the page finds in Chromium, and a picture of it."""
    with folder.served(out) as address, chromium.page() as page:
        page.look(WIDTH)
        page.open(address)
        found = json.loads(page.evaluate("report.then(JSON.stringify)"))
        if picture:
            page.picture(picture)
        return {"chromium": page.version, **found}


def agreement(report: dict[str, Any], here: folder.Folder) -> dict[str, Any]:
    """By network: images of the same class as in this process, the largest relative difference."""
    rows = {}
    for name, fn in here.functions.items():
        wanted = np.concatenate([fn(x[None]) for x in here.inputs])
        got = np.array(report["networks"][name]["logits"], np.float32)
        rows[name] = {
            "images": len(wanted),
            "same class": int((wanted.argmax(-1) == got.argmax(-1)).sum()),
            "relative": float(np.abs(wanted - got).max() / np.abs(wanted).max()),
        }
    return rows


def save(out: Path, path: Path) -> dict[str, Any]:
    """Opens a folder in Chromium, and saves the numbers and a picture; returns the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    load, here = load_average(), folder.Folder.read(out)
    report = measured(out, path.with_suffix(".png"))
    same = agreement(report, here)
    about = {row["name"]: row for row in here.about["networks"]}
    rows = {}
    for name, found in report.pop("networks").items():
        del found["logits"]
        facts = {key: about[name][key] for key in ("bytes", "accuracy")}
        rows[name] = facts | found | {"agreement": same[name]}
    said = {"settings": here.about["settings"], "dataset": here.about["dataset"],
            "runtime": here.runtime, "load_average": load, **report}  # fmt: skip
    results.save(results.header("browser") | said | {"rows": rows}, path)
    return rows


# ------------------------------------------------------------------------------------- results


def table(rows: dict[str, Any]) -> Table:
    """A row for each network."""
    shown = Table("network", "ms per image", "quartiles", "× dense", "kB", "accuracy", "as in ORT")
    for name, row in rows.items():
        low, high = row["quartiles"]
        same = row["agreement"]
        shown.add_row(
            name, f"{row['milliseconds']:.3g}", f"{low:.3g} to {high:.3g}",
            f"{row['speedup over the first']:.2f}", f"{row['bytes'] / 1e3:.0f}",
            f"{row['accuracy']:.2%}", f"{same['same class']} of {same['images']}",
        )  # fmt: skip
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = studies.parser("browser", __doc__)
    parser.add_argument("--out", type=Path, help="the folder to serve; else it is not kept")
    parser.add_argument("--again", action="store_true", help="measure that folder as it is")
    parser.add_argument("--quick", action="store_true", help="a look: hardly trained")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    if args.out is None and chromium.path() is None:
        parser.error("no Chromium is here to measure in: --out FOLDER keeps the page to serve")
    if args.again and args.out is None:
        parser.error("--again measures a folder that is there: --out FOLDER")
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        if not args.again:
            write(out, args.weights, args.quick)
        if args.out:
            print(f"python -m http.server --directory {out}")
        if chromium.path():
            stem = "browser-quick" if args.quick else "browser"
            path = results.folder(args.results) / f"{stem}.json"
            Console(width=110).print(table(save(out, path)))
            print(path)


def write(out: Path, weights: Path, quick: bool) -> None:
    """Trains, unless that was done, prunes, and writes the folder."""
    training = QUICKLY if quick else Training()
    settings = Settings(test_images=500) if quick else Settings()
    stem = "recovery-quick" if quick else "recovery"
    case = Case(NETWORK, data.load(), training, settings.seed, weights / stem)
    n = min(settings.test_images, len(case.images.test_x))
    folder.write(
        out, networks(case, settings), folder.Samples.of(case.images, settings.each),
        lambda fn: accuracy(fn, case.images, n), dataclasses.asdict(settings),
    )  # fmt: skip
