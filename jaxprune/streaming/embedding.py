"""Hidden states before the first block, and what a block makes of their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxprune._trees import difference
from jaxprune.artefacts.fingerprint import fingerprint
from jaxprune.oneshot._walk import Block, listed
from jaxprune.streaming.checkpoint import Checkpoint
from jaxprune.streaming.settings import digest
from jaxprune.typing import Params, PyTree

Embed = tuple[Callable[[Params, Any], Any], PyTree]  # a function, and the names of its params


class Hidden:
    """Batches, and how hidden states come of them.

    Attributes:
      is_known: whether the batches are arrays, and no shapes alone.
      shapes: of the first batch's hidden states.

    Raises:
      TypeError: for an embed that is no pair of a function and names.
      ValueError: without batches, or with arrays and shapes among them.
    """

    def __init__(self, who: str, checkpoint: Checkpoint, embed: Embed | None, batches: Any):
        self._checkpoint, self._embed, self._batches = checkpoint, embed, listed(who, batches)
        if embed is not None and not (
            isinstance(embed, tuple) and len(embed) == 2 and callable(embed[0])
        ):
            raise TypeError(
                f"{who}: embed is {embed!r:.60}; wanted a pair of a function (params, batch) -> "
                'hidden and the names of its params: (embed, {"table": "embed_tokens.weight"})'
            )
        kinds = {isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self._batches)}
        if len(kinds) > 1:
            raise ValueError(
                f"{who}: batches hold arrays and shapes; pass arrays, or shapes alone where no "
                "statistics are needed"
            )
        self.is_known = kinds == {False}
        self.shapes = self._shapes(self._batches[0])

    def _shapes(self, batch: Any) -> Any:
        if self._embed is None:
            return struct(batch)
        fn, names = self._embed
        return jax.eval_shape(fn, self._checkpoint.shapes(names), batch)

    def states(self) -> list[Any]:
        """The hidden states before the first block; none of batches that are shapes."""
        if not self.is_known or self._embed is None:
            return list(self._batches) if self.is_known else []
        fn, names = self._embed
        run, params = jax.jit(lambda p, x: fn(p, x)), self._checkpoint.load(names)
        return jax.block_until_ready([run(params, x) for x in self._batches])

    def check_block(self, block: Block, shapes: Sequence[Any]) -> None:
        """Raises ValueError unless each block gives what the next one takes."""
        checked: list[Any] = []
        for k, p in enumerate(shapes):
            if p in checked:
                continue
            checked.append(p)
            found = jax.eval_shape(block, p, self.shapes)
            tree = difference(found, self.shapes)
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(self.shapes))
            other = [(a.shape, b.shape) for a, b in pairs if a.shape != b.shape]
            if tree or other:
                how = f"it {tree}" if tree else "shape {} for {}".format(*other[0])
                raise ValueError(
                    f"block gives other hidden states than it takes, at blocks[{k}]: {how}; the "
                    "next block takes what this one gives, so wanted the same tree and shapes"
                )

    def digests(self, block: Block, shapes: Sequence[Any]) -> dict[str, str]:
        """What a call that goes on must be given again."""
        told = {"batches": self._batches, "embed": self._embed}
        return {name: digest(x) for name, x in told.items()} | {
            "block": digest(fingerprint(block, shapes[0], (self.shapes,)))
        }


def struct(tree: Any) -> Any:
    """The shapes of a tree."""
    return jax.eval_shape(lambda x: x, tree)
