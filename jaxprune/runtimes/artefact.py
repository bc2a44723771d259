"""Artefacts: a function in an engine's file, beside it a certificate of what it is and equals."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxprune.runtimes as runtimes
from jaxprune._progress import Progress
from jaxprune.artefacts import files, folders, trees
from jaxprune.artefacts.checks import Size, conform
from jaxprune.artefacts.export import FILE as PROGRAM
from jaxprune.artefacts.export import load_exported
from jaxprune.compaction.checking import draw
from jaxprune.compaction.model import Compact
from jaxprune.measuring import Timing, benchmark, environment
from jaxprune.runtimes._runtime import (
    Compiled,
    Engine,
    Options,
    Runtime,
    compiled,
    frozen_for,
    parts,
)
from jaxprune.runtimes.comparing import SAME
from jaxprune.runtimes.freezing import Signature
from jaxprune.runtimes.reference import Reference
from jaxprune.runtimes.state import check_constant, stateful

Fn = Callable[..., Any]
FORMAT, VERSION = "jaxprune artefact", 1
INPUTS = 3  # So many random inputs does an export compare on.
SCHEMA = {
    "format": str,
    "version": Size,
    "engine": str,
    "quantize": {"", "dynamic", "static"},
    "threads": Size,
    "keep_float": [str],
    "versions": {str: str},
}


class Artefact:
    """What :func:`jaxprune.export` wrote.

    Attributes:
      folder: where it is.
      runtime: the engine with its options.
      fn: the function in the engine, of the arguments after params.
    """

    def __init__(
        self, folder: str | Path, runtime: Runtime, fn: Fn, source: tuple[Any, tuple[Any, ...]],
        certificate: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.folder, self.runtime, self.fn = Path(folder), runtime, fn
        self._source, self._written = source, certificate

    @functools.cached_property
    def certificate(self) -> dict[str, Any]:
        """What was removed and why it equals; digests; for an engine ``certificate.json``."""
        if self._written is not None:
            return self._written
        found = folders.digests(self.folder)
        files = {name: file for name, file in found.items() if name == PROGRAM}
        return {"engine": "xla", "model": self._reference.model(), "files": files}

    @functools.cached_property
    def _reference(self) -> Reference:
        return Reference.of(*self._source)

    @property
    def _args(self) -> tuple[Any, ...]:
        return parts(*self._source)[1]

    @property
    def size(self) -> int:
        """Bytes of the engine's files."""
        return sum(file["bytes"] for file in self.certificate["files"].values())

    def check(self, n: int = 1, seed: int = 0) -> float:
        """Returns the largest relative difference from the masked model, run in the engine.

        Both get ``n`` random inputs of the given types: floats are drawn from a normal
        distribution, other arrays are as they were given. Where the masked model is gone, the
        compact model stands for it; :attr:`against` says so.

        Raises:
          ValueError: for n < 1.
        """
        if n < 1:
            raise ValueError(f"check wants n >= 1 random inputs, got {n}")
        return self._reference.difference(self.fn, self._args, n, seed)

    @property
    def against(self) -> str:
        """What :meth:`check` compares with, "the masked model"."""
        return self._reference.name

    def benchmark(self, repeats: int = 15, progress: Progress = None) -> Timing:
        """Returns how long one call in the engine takes, from NumPy arrays to NumPy arrays."""
        fn, args = self.timed()
        return benchmark(fn, *args, repeats=repeats, progress=progress)

    def timed(self) -> tuple[Fn, tuple[Any, ...]]:
        """The function and random arguments, an entry of :func:`jp.compare`."""
        args = draw(jax.random.key(0), self._args, None)
        if self.runtime.engine is not None:
            return self.fn, args
        model = load_exported(self.folder)
        return model.fn, (model.params, *args)

    def __repr__(self) -> str:
        return f"<artefact {self.folder} for {self.runtime.name}, {self.size:,} bytes>"


def write(
    fn: Any, folder: str | Path, args: Any, shapes: Any, runtime: Runtime,
    state: str | Sequence[str] | None = None,
) -> Artefact:  # fmt: skip
    """Writes a function for an engine, runs it there beside what it must equal, and keeps it.

    Raises:
      ValueError: when the engine gives other results.
    """
    if state is not None:
        fn, args = stateful(fn, args, state)
    held, rest, _ = parts(fn, args)
    frozen, reference = frozen_for(runtime, fn, args, shapes), Reference.of(fn, args)
    if held or isinstance(fn, Compact):
        check_constant(fn.params if isinstance(fn, Compact) else held[0], frozen.results)

    def make(parts: Path) -> dict[str, Any]:
        run = compiled(runtime, frozen, parts)
        found = reference.difference(run, rest, INPUTS, seed=0)
        if runtime.options.quantize is None and not found <= SAME and not reference.is_nan(rest):
            raise ValueError(
                f"the file for {runtime.name} gives other results than {reference.name}: they "
                f"differ by {found:.2g} of the largest one; nothing was written"
            )
        return _certificate(runtime, frozen, reference, found)

    folders.write(folder, make)
    (Path(folder) / PROGRAM).unlink(missing_ok=True)
    engine, options, signature, text = _read(folder)
    run = Compiled(runtime, signature, engine.read(Path(folder) / engine.file, options))
    return Artefact(folder, runtime, run, (fn, args), text)


def _certificate(runtime: Runtime, frozen: Any, reference: Reference, found: float) -> Any:
    assert runtime.engine is not None
    return {
        "format": FORMAT,
        "version": VERSION,
        "engine": runtime.engine.name,
        "quantize": runtime.options.quantize or "",
        "threads": runtime.options.threads or 0,
        "keep_float": list(runtime.options.keep_float),
        "versions": runtime.engine.versions(),
        "arguments": trees.describe(frozen.args, "the arguments"),
        "results": trees.describe(frozen.results, "the results"),
        "residual": {
            "against": reference.name,
            "relative": found if math.isfinite(found) else None,
            "inputs": INPUTS,
            "seed": 0,
        },
        "model": reference.model(),
        "environment": environment(),
    }


def load(folder: str | Path) -> Fn:
    """The function of an artefact; ``fn(params, *args)``, whose params are in the file."""
    engine, options, signature, text = _read(folder)
    now = engine.versions()
    others = [
        f"{name} {was}, and {now[name]} is here"
        for name, was in text["versions"].items()
        if name in now and now[name] != was
    ]
    if others:
        warnings.warn(
            f"{Path(folder)} was written and checked with {'; '.join(others)}: export it anew, or "
            "compare its results",
            stacklevel=3,
        )
    run = engine.read(Path(folder) / engine.file, options)
    return Compiled(Runtime(engine, options), signature, run, ({},))


def _read(folder: str | Path) -> tuple[Engine, Options, Signature, dict[str, Any]]:
    """What a certificate says, once it and the files are found to be what was written."""
    text = folders.read(folder)
    with files.naming(Path(folder) / folders.CERTIFICATE):
        known = {"keep_float": []} | {key: text[key] for key in SCHEMA if key in text}
        conform(known, SCHEMA, "its certificate")
        if (text["format"], text["version"]) != (FORMAT, VERSION):
            raise ValueError(f"is {text['format']} {text['version']}, wanted {FORMAT} {VERSION}")
        results = jax.tree.structure(trees.restore(text["results"]))
        signature = Signature(trees.restore(text["arguments"]), results)
        kept = tuple(known["keep_float"])
        options = Options(text["quantize"] or None, None, text["threads"] or None, kept)
        return runtimes.engine(text["engine"]), options, signature, text
