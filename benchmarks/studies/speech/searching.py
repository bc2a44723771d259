"""What a search for measured time keeps, and how it is won back: the rows that are compact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks.common.machine import load_average
from benchmarks.studies.speech import recipes
from benchmarks.studies.speech.case import BATCH, SEARCHED, Case, Recognizer, loss
from benchmarks.studies.speed.accuracy import load

Units = dict[str, list[int]]  # dimension -> the units that stay


class Searcher:
    """A search on the time of a whole transcription; its tables of times serve all splits."""

    def __init__(self, first: Case, repeats: int):
        model = first.model
        self._search = jp.Search(
            model.paced, model.params, model.structure, first.measured, first.mels[:BATCH],
            dims=SEARCHED, minimum={"*": 0}, repeats=repeats, progress=False,
        )  # fmt: skip

    def plan(self, case: Case, speedup: float) -> dict[str, Any]:
        """The units that stay by a split's scores, and the speed that was measured with them."""
        try:
            found = self._search.stage(case.measured).plan(jp.Target(speedup=speedup))
        except ValueError as error:  # a speed that cannot be had
            return {"asked": speedup, "refused": str(error).splitlines()[0]}
        return {
            "units": {name: np.flatnonzero(v).tolist() for name, v in found.keep.items()},
            "asked": speedup,
            "measured": found.measured.get("speedup"),
            "predicted": found.predicted.get("speedup"),
            "notes": list(found.notes),
            "load_average": load_average(),
        }


def masks_of(model: Recognizer, units: Units) -> Any:
    dims = model.structure.dims
    keep = {n: np.isin(np.arange(dims[n].size), stay) for n, stay in units.items()}
    return model.structure.masks_of(keep)


def small(case: Case, units: Units) -> jp.typing.Compact:
    """The compact model, whose readers are refit."""
    pruned = recipes.cut(case, masks_of(case.model, units))
    return compact(case.model, pruned)


def compact(model: Recognizer, pruned: recipes.Pruned) -> jp.typing.Compact:
    return jp.compact(model.fn, pruned.params, pruned.masks, model.example)


def recovered(case: Case, cut: jp.typing.Compact, steps: int) -> jp.typing.Compact:
    """Distilled on the calibration half's sound."""
    return jp.recover(cut, loss, case.lessons, steps=steps, progress=False)


def about(cut: jp.typing.Compact) -> dict[str, Any]:
    """What a row says of a compact model."""
    said: dict[str, Any] = {
        "params": int(sum(leaf.size for leaf in jax.tree.leaves(cut.params))),
        "exact": cut.certificate.exact,
    }
    if cut.recovery is not None:
        said["stages"] = [stage._asdict() for stage in cut.recovery.stages]
        said["steps"] = cut.recovery.steps
    return said


def kept(path: Path, cut: jp.typing.Compact) -> jp.typing.Compact:
    """The same model with the params of a file."""
    return dataclasses.replace(cut, params=jax.tree.map(jnp.asarray, load(cut.params, path)))
