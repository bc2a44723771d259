"""What has been done of a stream, on disk beside its result.

``stream.json`` says of which source and with which settings the result is made, and which parts are
complete; it is switched in one step, after what it tells of is on the disk. Hidden states before
the next block stand beside it, so that a stream that was cut short goes on there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.artefacts import files
from jaxprune.artefacts.tensors import CODES, OF_CODE, parse_json
from jaxprune.streaming import shards
from jaxprune.streaming.seen import is_same, look

FILE, HIDDEN = "stream.json", "stream.{}.safetensors"
FORMAT = {"format": "jaxprune stream", "version": 1}
ANEW = "remove {} to begin anew"


class State:
    """The state of one stream; :meth:`open` it."""

    def __init__(self, folder: Path, text: dict[str, Any]):
        self.folder, self._text = folder, text

    @classmethod
    def open(cls, folder: Path, source: Path, paths: Sequence[Path], settings: Any) -> State:
        """The state of a folder, a new one where there is none.

        ``paths``: the files of the source. ``settings``: name -> digest.

        Raises:
          ValueError: for one of another source or of other settings, one that is damaged, or a
            finished part that has changed.
        """
        path = folder / FILE
        if not path.exists():
            _check_empty(folder)
            seen = {str(p.relative_to(source)): look(p) for p in paths}
            told = {"source": seen, "settings": settings, "parts": {}, "hidden": {}}
            state = cls(folder, FORMAT | told)
            state._save()
            return state
        state = cls(folder, _read(path))
        state.check_source(source, {str(p.relative_to(source)) for p in paths})
        state._check_settings(settings)
        state._check_written()
        return state

    def is_done(self, part: str) -> bool:
        return part in self._text["parts"]

    def about(self, part: str) -> Any:
        """What was told of a part when it was done."""
        return self._text["parts"][part]["about"]

    def written(self) -> list[Path]:
        """The files of all parts that are done, in their order."""
        parts = self._text["parts"].values()
        return [self.folder / name for part in parts for name in part["files"]]

    def done(self, part: str, paths: Iterable[Path], about: Any, hidden: Iterable[Path]) -> None:
        """Notes that a part is on the disk, and with which hidden states the next one begins."""
        named = {str(p.relative_to(self.folder)): look(p) for p in paths}
        self._text["parts"][part] = {"files": named, "about": about}
        self._text["hidden"] = {p.name: look(p) for p in hidden}
        self._save()
        self.tidy()

    def finish(self) -> None:
        """Leaves what tells of the result; the same result has the same file."""
        self._text["hidden"] = {}
        every = [part["files"] for part in self._text["parts"].values()]
        for seen in (self._text["source"], *every):
            for one in seen.values():
                one.pop("stamp", None)
        self._save()
        self.tidy()

    def tidy(self) -> None:
        """Removes hidden states of which the state doesn't tell."""
        for path in self.folder.glob(HIDDEN.format("*")):
            if path.name not in self._text["hidden"]:
                path.unlink()

    def _save(self) -> None:
        with files.replacing(self.folder / FILE) as file:
            file.write(json.dumps(self._text, indent=1).encode() + b"\n")

    # ------------------------------------------------------------------------- hidden states

    def save_hidden(self, block: int, kind: str, states: list[Any]) -> Path:
        """Writes the hidden states before a block."""
        path = self.folder / HIDDEN.format(f"{kind}.{block}")
        leaves = [np.asarray(x) for x in jax.tree.leaves(states)]
        rows = [
            (str(k), CODES[x.dtype.name], x.shape, x.nbytes, [shards.raw(x)])
            for k, x in enumerate(leaves)
        ]
        shards.write(path, rows, {})
        return path

    def hidden(self, block: int, kind: str, like: Any) -> list[Any]:
        """The hidden states before a block, a tree like ``like``; raises ValueError if changed."""
        path = self.folder / HIDDEN.format(f"{kind}.{block}")
        seen = self._text["hidden"].get(path.name)
        if seen is None or not is_same(path, seen):
            raise ValueError(
                f"the hidden states in {path} are missing or have changed since they were written, "
                f"and block {block} can't go on without; {ANEW.format(self.folder)}"
            )
        tensors = shards.header(path)[1]
        found = (tensors[str(k)] for k in range(len(tensors)))
        return jax.tree.unflatten(jax.tree.structure(like), map(_array, found))

    # -------------------------------------------------------------------------------- checks

    def check_source(self, source: Path, names: Set[str] | None = None) -> None:
        """Raises ValueError where the source is no more what it was when the stream was begun."""
        told = self._text["source"]
        other = sorted(told.keys() ^ (names or told.keys()))
        other += [name for name, seen in told.items() if not is_same(source / name, seen)]
        if other:
            raise ValueError(
                f"{source / other[0]} has changed since the stream to {self.folder} was begun; put "
                f"back what it was and make the same call again, or {ANEW.format(self.folder)}"
            )

    def _check_settings(self, settings: Mapping[str, str]) -> None:
        told = self._text["settings"]
        other = [n for n in {**settings, **told} if settings.get(n) != told.get(n)]
        if other:
            raise ValueError(
                f"{self.folder} was begun with another {', '.join(other)}; pass what it was begun "
                f"with, or {ANEW.format('it')}. Functions are compared by their code and what it "
                "reads; settings= says in their place what decides"
            )

    def _check_written(self) -> None:
        for part in self._text["parts"].values():
            for name, seen in part["files"].items():
                if not is_same(self.folder / name, seen):
                    raise ValueError(
                        f"{self.folder / name} is missing or has changed since it was written; "
                        f"{ANEW.format(self.folder)}"
                    )


def _array(tensor: shards.Tensor) -> jax.Array:
    return jax.device_put(shards.read(tensor).view(OF_CODE[tensor.code]).reshape(tensor.shape))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = parse_json(path.read_bytes())
        if not isinstance(text, dict) or not FORMAT.items() <= text.items():
            raise ValueError(f"is no state of version {FORMAT['version']}")
    except ValueError as error:
        raise ValueError(f"{path} {error}; {ANEW.format(path.parent)}") from None
    return text


def _check_empty(folder: Path) -> None:
    """Raises FileExistsError where a result would mix with another checkpoint."""
    ours = [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("_METADATA")]
    if ours:
        raise FileExistsError(
            f"{folder} holds {ours[0].name}, and no {FILE}: it is no stream that was cut short; "
            "pass another folder as target, or remove what is there"
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder; raises RuntimeError while another call does."""
    if files.fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            files.fcntl.flock(descriptor, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another call streams to {folder}; wait for it, or pass another target"
            ) from None
        yield
    finally:
        os.close(descriptor)
