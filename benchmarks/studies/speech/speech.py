"""``python -m benchmarks whisper``: what pruning costs speech recognition, and what it gains.

Whisper tiny.en transcribes prompts with known words, put together to chunks of 30 s. Three splits:
recipes see the sound of one half of the prompts, and words are counted on the other. Rows without
training come first (``recipes.py``); then ``jp.search`` asks for 1.3 and 1.6 times the measured
speed of a whole transcription, and ``jp.recover`` distils what it found (``searching.py``).

It goes on where it was interrupted. The stages ``search`` and ``time`` want the machine for
themselves; ``time`` takes all compact models of the first split in one interleaved run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from benchmarks import studies
from benchmarks.common import results
from benchmarks.common.machine import load_average
from benchmarks.models import whisper
from benchmarks.studies.speech import prompts, recipes, report, searching
from benchmarks.studies.speech.case import BATCH, Case, Recognizer
from benchmarks.studies.speed.accuracy import save

STAGES = ("rows", "search", "cut", "recover", "time")
TIMED = (  # beside what was searched for
    "encoder FFN -30 %, FLAP", "encoder heads -1/3, energy", "all heads -1/3, energy",
    "an encoder layer", "a decoder layer",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything; all of it but the rows, which say so, goes into the result file."""

    splits: int = 3
    chunks: int = 99  # of each half at most
    rows: tuple[str, ...] = tuple(recipes.ROWS)
    speedups: tuple[float, ...] = (1.3, 1.6)
    steps: int = 60  # of recovery
    repeats: int = 3  # samples of each time in a search
    rounds: int = 7  # of the last timing
    batch: int = BATCH


QUICK = Settings(
    splits=1, chunks=4, rows=("encoder FFN -30 %, FLAP",), speedups=(1.3,), steps=4, repeats=1,
    rounds=2,
)  # fmt: skip


class Job:
    """The recognizer, its splits, and what was found so far."""

    def __init__(
        self, settings: Settings, found: dict[str, Any], weights: Path, splits: Sequence[int]
    ):
        self.settings, self.found, self.weights, self.splits = settings, found, weights, splits
        self.model = Recognizer.load()
        self.clips = prompts.clips()

    @functools.cached_property
    def searcher(self) -> searching.Searcher:
        return searching.Searcher(self.case(0), self.settings.repeats)

    @functools.lru_cache(None)  # noqa: B019 - it lives as long as the study
    def case(self, split: int) -> Case:
        return Case(self.model, self.clips, split, self.settings.chunks, self.weights)

    def run(self, stage: str) -> Iterator[str]:
        """Does what is missing of a stage; yields whenever something new is worth saving."""
        dense = functools.partial(self._judged, "dense")
        yield from self._each(
            "dense", lambda case: dense(case, self.model.jitted, self.model.params)
        )
        if stage == "rows":
            for name in self.settings.rows:
                yield from self._each(name, functools.partial(self._row, name))
        elif stage == "time":
            yield from self._time()
        else:
            does = {"search": self._plan, "cut": self._cut, "recover": self._recovered}[stage]
            names = {"search": "", "cut": "", "recover": ", recovered"}[stage]
            for speedup in self.settings.speedups:
                if stage != "search" and not self._planned(speedup):
                    continue
                key = f"{'plan' if stage == 'search' else 'search'} {speedup:g} x{names}"
                yield from self._each(key, functools.partial(does, speedup))

    def _planned(self, speedup: float) -> bool:
        plans = [self.found[str(split)].get(f"plan {speedup:g} x", {}) for split in self.splits]
        return all("units" in plan for plan in plans)

    def _each(self, key: str, do: Callable[[Case], dict[str, Any]]) -> Iterator[str]:
        """What a row says, for each split where it isn't known."""
        for split in self.splits:
            rows = self.found.setdefault(str(split), {})
            if key not in rows:
                begin = time.perf_counter()
                rows[key] = do(self.case(split))
                rows[key] |= {
                    "seconds": round(time.perf_counter() - begin, 1),
                    "date": results.today(),
                }
                yield f"{key}, split {split}"

    def _judged(self, name: str, case: Case, fn: Any, params: Any) -> dict[str, Any]:
        heard = case.judged(fn, params)
        print(f"  {name}, split {case.seed}: {prompts.rate(heard):.2f} %", flush=True)
        return {"heard": heard}

    def _row(self, name: str, case: Case) -> dict[str, Any]:
        pruned = recipes.ROWS[name](case)
        return self._judged(name, case, self.model.jitted, pruned.params) | {"program": "masked"}

    # ---- compact models --------------------------------------------------------------------------

    def _plan(self, speedup: float, case: Case) -> dict[str, Any]:
        return self.searcher.plan(case, speedup)

    def _small(self, speedup: float, case: Case) -> jp.typing.Compact:
        units = self.found[str(case.seed)][f"plan {speedup:g} x"]["units"]
        return searching.small(case, units)

    def _cut(self, speedup: float, case: Case) -> dict[str, Any]:
        return self._compact_row(f"search {speedup:g} x", case, self._small(speedup, case))

    def _recovered(self, speedup: float, case: Case) -> dict[str, Any]:
        tuned = searching.recovered(case, self._small(speedup, case), self.settings.steps)
        return self._compact_row(f"search {speedup:g} x, recovered", case, tuned)

    def _compact_row(self, name: str, case: Case, cut: jp.typing.Compact) -> dict[str, Any]:
        save(cut.params, self._file(name, case))
        said = self._judged(name, case, jax.jit(cut.fn), cut.params)
        return said | searching.about(cut) | {"program": "compact"}

    def _file(self, name: str, case: Case) -> Path:
        return self.weights / f"{name.replace(' ', '-')}-{case.seed}.npz"

    # ---- times -----------------------------------------------------------------------------------

    def _time(self) -> Iterator[str]:
        """Whole transcription, encoder and decoder, dense and compact, of the first split."""
        case = self.case(0)
        names = [name for name in self.found["0"] if name.startswith("search")]
        cuts = {name: self._of_file(name, case) for name in names}
        for name in set(TIMED) & set(self.settings.rows):
            cuts[name] = searching.compact(self.model, recipes.ROWS[name](case))
        for at, (make, batch) in PARTS.items():
            if at not in self.found.setdefault("times", {}):
                entries = dict(make(self.model, cuts, case.mels[:batch]))
                self.found["times"][at] = _compared(entries, self.settings.rounds)
                yield f"times of {at}"

    def _of_file(self, name: str, case: Case) -> jp.typing.Compact:
        units = self.found["0"]["plan " + " ".join(name.split(",")[0].split()[1:])]["units"]
        bare = recipes.Pruned(self.model.params, searching.masks_of(self.model, units))
        return searching.kept(self._file(name, case), searching.compact(self.model, bare))


Entries = Iterator[tuple[str, tuple[Any, tuple[Any, ...]]]]
Cuts = dict[str, jp.typing.Compact]


def _whole(model: Recognizer, cuts: Cuts, mels: np.ndarray) -> Entries:
    yield "dense", (model.jitted, (model.params, mels))
    for name, cut in cuts.items():
        yield name, (jax.jit(cut.fn), (cut.params, mels))


def _encoder(model: Recognizer, cuts: Cuts, mels: np.ndarray) -> Entries:
    yield "dense", (jax.jit(whisper.encode), (model.params, mels))
    for name, cut in cuts.items():
        yield name, (jax.jit(cut.cut(whisper.encode, mels)), (cut.params, mels))


def _decoder(model: Recognizer, cuts: Cuts, mels: np.ndarray) -> Entries:
    states = jax.jit(whisper.encode)(model.params, mels)
    yield "dense", (jax.jit(model.greedy), (model.params, states))
    for name, cut in cuts.items():
        states = jax.jit(cut.cut(whisper.encode, mels))(cut.params, mels)
        yield name, (jax.jit(cut.cut(model.greedy, states)), (cut.params, states))


PARTS = {
    "transcription, batch 4": (_whole, BATCH),
    "encoder, batch 4": (_encoder, BATCH),
    "decoder, batch 4": (_decoder, BATCH),
    "transcription, batch 1": (_whole, 1),
}


def _compared(entries: dict[str, Any], rounds: int) -> dict[str, Any]:
    before = load_average()
    found = jp.compare(entries, repeats=rounds)
    rows = {
        name: timing.to_json() | {"speedup": found.ratios[name]._asdict()}
        for name, timing in found.timings.items()
    }
    return {"rows": rows, "load_average": {"before": before, "after": load_average()}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = studies.parser("whisper", __doc__)
    parser.add_argument("--quick", action="store_true", help="a look: four chunks, hardly trained")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rows", nargs="+", choices=list(recipes.ROWS), help="to add")
    parser.add_argument("--splits", nargs="+", type=int, help="of all, to add")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--weights", type=Path, default=Path.home() / ".cache" / "jaxprune")
    args = parser.parse_args(argv)
    settings, stem = (QUICK, "whisper-quick") if args.quick else (Settings(), "whisper")
    path = results.folder(args.results) / f"{stem}.json"
    about = {k: v for k, v in dataclasses.asdict(settings).items() if k != "rows"}
    head = results.header("whisper") | {"settings": about}
    found = results.continued(path, head["settings"])
    chosen = dataclasses.replace(settings, rows=tuple(args.rows or settings.rows))
    splits = args.splits or range(settings.splits)
    job = Job(chosen, found, args.weights / stem, splits)
    for stage, done in ((s, d) for s in args.stages for d in job.run(s)):
        summary = report.summary(found, settings.splits)
        results.save(head | {"networks": found, "summary": summary}, path)
        print(f"{stage}: {done}", flush=True)
    report.show(results.load(path))
    print(report.picture(results.load(path), path.with_suffix(".png")))
    print(path)
