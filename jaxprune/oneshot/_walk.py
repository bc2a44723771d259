"""One block of a network at a time: calibrated on what reaches it, pruned, and passed.

Whoever goes through the blocks says where they come from and where they go: lists in memory
(:func:`jp.oneshot.sequential`), or a checkpoint (:func:`jp.oneshot.stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxprune._progress import Progress, inner
from jaxprune.calibration.api import Calibrator, Stats
from jaxprune.oneshot import order as orders
from jaxprune.oneshot.drift import Corrector
from jaxprune.typing import Masks, Params, Where, path_str

Prune = Callable[[Params, Stats], tuple[Params, Masks]]
Block = Callable[[Params, Any], Any]
States = list[Any]  # hidden states, one for each batch
ErrorOf = Literal["outputs", "states"]


class Walk:
    """Prunes and runs one block after another; what it compiles serves all of them.

    The arguments are those of :func:`jp.oneshot.sequential`.
    """

    def __init__(
        self,
        block: Block,
        order: Any,
        error_propagation: float,
        where: Where | None,
        grams: bool | Where,
        progress: Progress,
        error_of: ErrorOf = "outputs",
    ):
        partial = _of_a_part(block)
        self._block, self._where, self._share = block, where, error_propagation
        self._order = "use" if order is None and error_propagation else order
        self._run = jax.jit(lambda p, x: block(p, x))  # its own: block may close over what changes
        self.calibrate = Calibrator(partial, where, grams, progress=inner(progress))
        self._correct = Corrector(partial, error_of == "states")

    def prune(
        self, prune: Prune, dense: Params, states: States, dense_states: States
    ) -> tuple[Params, Masks]:
        """One block and its masks, by the hidden states before it, pruned and dense ones."""
        p, kept = dense, jax.tree.map(lambda _: True, dense)
        for group in self._groups(dense, states[0]):
            inside = _selected(dense, group)
            part, rest = partition(p, inside)
            given = [(rest, x) for x in states]
            stats = self.calibrate(part, given)
            if self._share:
                before = [(partition(dense, inside)[1], x) for x in dense_states]
                part = self._correct(part, zip(given, before), stats, self._share)
            new, mask = checked(prune(part, stats))
            if self._order is None:  # the whole block, with leaves that it may have got
                p, kept = new, mask
            else:
                p, kept = _combine(new, rest), _combine(mask, partition(kept, inside)[1])
        return p, kept

    def behind(self, p: Params, states: States) -> States:
        """The hidden states behind a block."""
        return [self._run(p, x) for x in states]

    def _groups(self, p: Params, x: Any) -> Sequence[Where]:
        if self._order is None:
            return [lambda path, leaf: True]
        if isinstance(self._order, str):
            return orders.of_use(self._block, p, x, self._where)
        return self._order


def _of_a_part(block: Block) -> Callable[[Params, Params, Any], Any]:
    return lambda part, rest, x: block(_combine(part, rest), x)


def _selected(p: Params, group: Where) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: group(path_str(path), leaf), p)


def partition(tree: Params, inside: Params) -> tuple[Params, Params]:
    """The leaves inside, and the others; None where a leaf is in the other tree."""
    part = jax.tree.map(lambda leaf, ok: leaf if ok else None, tree, inside)
    rest = jax.tree.map(lambda leaf, ok: None if ok else leaf, tree, inside)
    return part, rest


def _combine(part: Params, rest: Params) -> Params:
    return jax.tree.map(
        lambda a, b: b if a is None else a, part, rest, is_leaf=lambda leaf: leaf is None
    )


def check_blocks(who: str, blocks: Any) -> None:
    if isinstance(blocks, Mapping | jax.Array | np.ndarray) or not hasattr(blocks, "__getitem__"):
        raise TypeError(
            f"{who}: blocks is a {type(blocks).__name__}; wanted a list of the parameters of "
            "each block. Of a stack: [jax.tree.map(lambda leaf: leaf[k], blocks) for k in "
            "range(layers)]"
        )
    if not len(blocks):
        raise ValueError(f"{who}: blocks is empty; pass the parameters of each block, in order")


def listed(who: str, batches: Any) -> list[Any]:
    if isinstance(batches, jax.Array | np.ndarray | Mapping):
        raise ValueError(
            f"{who}: batches is one {type(batches).__name__}; wanted an iterable of hidden "
            "states: batches=[x]"
        )
    states = list(batches)
    if not states:
        raise ValueError(
            f"{who}: batches is empty; pass the hidden states before the first block, "
            "batches=[x]; an iterator that has been read once is empty, too"
        )
    return states


def check_order(who: str, order: Any, blocks: Sequence[Params]) -> None:
    if order is None or order == "use":
        return
    if isinstance(order, str):
        raise ValueError(
            f'{who}: order={order!r}; wanted "use", or groups of leaves as functions: '
            f"[lambda path, leaf: path == {order!r}, ...]"
        )
    for k, p in enumerate(blocks):
        _check_groups(who, order, k, p)


def _check_groups(who: str, groups: Sequence[Where], number: int, p: Params) -> None:
    paths = [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(p)]
    owner: dict[str, int] = {}
    for k, group in enumerate(groups):
        if not callable(group):
            raise TypeError(
                f"{who}: order[{k}] is {group!r}; wanted a function of a leaf's path and the "
                f"leaf: lambda path, leaf: path == {group!r}"
            )
        inside = [path for path, leaf in paths if group(path, leaf)]
        if not inside:
            raise ValueError(
                f"{who}: order[{k}] selects no leaf of blocks[{number}]; its leaves are "
                f"{', '.join(path for path, _ in paths)}"
            )
        twice = [path for path in inside if path in owner]
        if twice:
            raise ValueError(
                f"{who}: order[{owner[twice[0]]}] and order[{k}] both select {twice[0]}; "
                "each leaf is pruned once"
            )
        owner |= dict.fromkeys(inside, k)


def check_share(who: str, share: float, error_of: str = "outputs") -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{who}: error_propagation={share}; wanted a share in [0, 1], such as 0.5")
    if error_of not in get_args(ErrorOf):
        raise ValueError(f'{who}: error_of={error_of!r}; wanted "outputs" or "states"')
    if error_of == "states" and not share:
        raise ValueError(
            f'{who}: error_of="states" says of what an error is made up for; give a share of it, '
            "error_propagation=0.25"
        )


def checked(found: Any) -> tuple[Params, Masks]:
    """What ``prune`` gave; raises TypeError unless it is a pair."""
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            f"prune returned {type(found).__name__}; wanted (pruned, masks), both like the params "
            "that it was given"
        )
    return found
