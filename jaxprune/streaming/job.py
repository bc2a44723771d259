"""One stream from a checkpoint to a folder, part by part."""

from __future__ import annotations

import contextlib
import errno
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._progress import Progress, track
from jaxprune.compaction.api import compact
from jaxprune.masks import apply_masks, density, filled
from jaxprune.oneshot._walk import Block, Prune, Walk, checked
from jaxprune.streaming.checkpoint import Checkpoint, Transposed, plain
from jaxprune.streaming.embedding import Hidden, struct
from jaxprune.streaming.memory import give_back
from jaxprune.streaming.state import FILE, State, alone
from jaxprune.typing import Masks, Params, PyTree, named_leaves

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Job:
    """What :func:`jp.oneshot.stream` was asked for; :meth:`run` does what is left of it."""

    checkpoint: Checkpoint
    target: Path
    block: Block
    blocks: list[PyTree]
    hidden: Hidden
    walk: Walk
    prune: Prune | None
    masks: Sequence[Masks] | None
    repair: Callable[..., Params] | None
    cut: bool
    added: Callable[[int, str], str] | None
    needs_dense: bool  # error propagation compares with the dense network
    progress: Progress

    def run(self, settings: Mapping[str, str]) -> list[float]:
        """Streams what is not done yet; the densities of all blocks."""
        store = self.checkpoint.store
        self._owned = self._names()
        others = [name for name in store.tensors if name not in self._owned]
        self._rest = store.groups(others)
        if self.target.resolve() == store.folder.resolve():
            raise ValueError(f"target is the source's folder, {self.target}; pass another one")
        self.target.mkdir(parents=True, exist_ok=True)
        with alone(self.target), _room(self.target):
            self._state = State.open(self.target, store.folder, store.files, settings)
            self._blocks()
            self._copies()
            store.finish(self.target, self._state.written())
            self._state.finish()
        return [self._state.about(f"block {k}") for k in range(len(self.blocks))]

    def _names(self) -> dict[str, int]:
        """Tensor -> number of its block; raises ValueError for one in two blocks."""
        owned: dict[str, int] = {}
        for k, names in enumerate(self.blocks):
            for name in map(plain, jax.tree.leaves(names)):
                if name in owned:
                    raise ValueError(
                        f"stream: blocks[{owned[name]}] and blocks[{k}] both name the tensor "
                        f"{name}; each is pruned once"
                    )
                owned[name] = k
        return owned

    # ---------------------------------------------------------------------------- the blocks

    def _blocks(self) -> None:
        done = [self._state.is_done(f"block {k}") for k in range(len(self.blocks))]
        if all(done):
            return
        states, dense_states = self._states(done.index(False))
        left = range(done.index(False), len(self.blocks))
        for k in track(left, "streaming blocks", self.progress):
            states, dense_states = self._one(k, states, dense_states)
        missing = [k for k in left if not self._state.is_done(f"block {k}")]
        if missing:
            raise RuntimeError(
                f"stream: progress passed on {len(left) - len(missing)} of {len(left)} blocks; "
                "make the same call again with one that passes all on, as tqdm.tqdm does"
            )

    def _states(self, first: int) -> tuple[list[Any], list[Any]]:
        """Hidden states before a block, pruned and dense ones."""
        if not self.hidden.is_known:
            return [], []
        if first == 0:
            states = self.hidden.states()
            give_back()
            return states, states if self.needs_dense else []
        like = [self.hidden._shapes(batch) for batch in self.hidden._batches]
        read = self._state.hidden
        return read(first, "hidden", like), read(first, "dense", like) if self.needs_dense else []

    def _one(self, k: int, states: Any, dense_states: Any) -> tuple[list[Any], list[Any]]:
        """Prunes and writes a block; the hidden states behind it."""
        self._state.check_source(self.checkpoint.store.folder)
        dense = self.checkpoint.load(self.blocks[k])
        p, kept = self._pruned(k, dense, states, dense_states)
        give_back()
        is_last, saved = k + 1 == len(self.blocks), []
        if not is_last and states:
            states = self.walk.behind(p, states)
            dense_states = self.walk.behind(dense, dense_states)
            saved = [self._state.save_hidden(k + 1, "hidden", states)]
            saved += [self._state.save_hidden(k + 1, "dense", x) for x in [dense_states] if x]
        del dense
        share = float(density(p, kept))
        p = self._small(k, p, kept) if self.cut else p
        arrays = self._by_name(k, p)
        self._state.check_source(self.checkpoint.store.folder)
        paths = self.checkpoint.store.write(
            self.target, k, self._count, arrays, plain(jax.tree.leaves(self.blocks[k])[0])
        )
        self._state.done(f"block {k}", paths, share, saved)
        del p, kept, arrays
        give_back()
        return states, dense_states

    def _pruned(self, k: int, dense: Params, states: Any, dense_states: Any) -> Any:
        method = self.prune or self._by_masks(k)

        def prune(p: Params, stats: Any) -> tuple[Params, Masks]:
            jax.block_until_ready((stats.norms, stats.grams) if stats else None)
            give_back()
            return method(p, stats)

        if states:
            p, kept = self.walk.prune(prune, dense, states, dense_states)
        else:
            p, kept = checked(prune(dense, None))
        return (apply_masks(p, kept) if self.cut else p), kept

    def _by_masks(self, k: int) -> Prune:
        """As ``prune``, of the masks that were chosen before."""

        def prune(p: Params, stats: Any) -> tuple[Params, Masks]:
            given = dict(named_leaves(filled(self.masks[k], p, True)))  # type: ignore[index]
            kept = jax.tree_util.tree_map_with_path(
                lambda path, _: given[jax.tree_util.keystr(path, simple=True, separator="/")], p
            )
            repaired = self.repair(p, kept, stats) if self.repair else apply_masks(p, kept)
            return repaired, kept

        return prune

    def _small(self, k: int, p: Params, kept: Masks) -> Params:
        """A block without the units that its masks remove, cut leaf by leaf."""
        plan = compact(self.block, struct(p), kept, self.hidden.shapes)
        stays = [entry for entry in plan.certificate.entries if entry.removed < entry.masked]
        for entry in stays:
            warnings.warn(
                f"stream: blocks[{k}] keeps {entry.masked - entry.removed} masked units of "
                f"{entry.name}, as zeros: {entry.reason}",
                stacklevel=6,
            )
        return plan.restrict(p)

    def _by_name(self, k: int, p: Params) -> dict[str, np.ndarray]:
        """Tensor -> content, of a block's leaves."""
        names, found = dict(named_leaves(self.blocks[k])), {}
        given = dict(named_leaves(p))
        lost = [path for path in names if path not in given]
        if lost:
            raise ValueError(
                f"stream: prune gave no leaf {lost[0]} for blocks[{k}], and the tensor "
                f"{plain(names[lost[0]])} stands for it; wanted all leaves that it was given"
            )
        for path, leaf in given.items():
            name = names.get(path) or self._new_name(k, path)
            array = np.asarray(leaf)
            found[plain(name)] = array.T if isinstance(name, Transposed) else array
        return found

    def _new_name(self, k: int, path: str) -> str:
        if self.added is None:
            raise ValueError(
                f"stream: prune gave blocks[{k}] the leaf {path}, which no tensor stands for; name "
                f'it: added=lambda number, path: f"layers.{{number}}.{{path}}"'
            )
        name = self.added(k, path)
        if name in self.checkpoint.store.tensors:
            raise ValueError(
                f"stream: added= gave the leaf {path} of blocks[{k}] the name {name}, which a "
                "tensor of the source has; give it one of its own"
            )
        return name

    # ---------------------------------------------------------------------------- the others

    @property
    def _count(self) -> int:
        return len(self.blocks) + len(self._rest)

    def _copies(self) -> None:
        store = self.checkpoint.store
        left = [k for k in range(len(self._rest)) if not self._state.is_done(f"others {k}")]
        progress = False if callable(self.progress) else self.progress
        for k in track(left, "copying other tensors", progress):
            self._state.check_source(store.folder)
            paths = store.copy(self.target, len(self.blocks) + k, self._count, self._rest[k])
            self._state.check_source(store.folder)
            self._state.done(f"others {k}", paths, None, [])


@contextlib.contextmanager
def _room(target: Path) -> Iterator[None]:
    """Says what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: no room for more of {target}. What {FILE} tells of is complete; "
            "make room, and make the same call again",
        ) from error
