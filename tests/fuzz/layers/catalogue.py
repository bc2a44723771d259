"""The catalogue of layers that random programs are made of, and what draws from it.

A layer is drawn for the shape that it gets, channels last: (batch, channels), (batch, tokens,
channels) or (batch, height, width, channels). Batches differ from widths and lengths in size
wherever that can be, but not always: equal sizes must not be taken for one dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Params = dict[str, Any]
Apply = Callable[[Params, Any], Any]

WIDTHS = (4, 6, 8, 12)
WIDEST = 32  # entries of a channel axis; wider values only take time
LARGEST = 700  # entries of a whole value
ANY, REVERSE, FORWARD, BOTH = "any", "reverse", "forward", "both"  # derivatives


class Layer(NamedTuple):
    """One step of a random program: ``apply(params, x)`` has shape ``shape``."""

    text: str
    params: Params
    apply: Apply
    shape: Shape


class Kind(NamedTuple):
    """An entry of the catalogue."""

    name: str
    draw: Callable[[Draw, Shape], Layer | None]  # None: it does not fit this shape
    ranks: tuple[int, ...]
    keeps: bool  # the result always has the shape of the input
    nests: bool  # it holds other layers


KINDS: list[Kind] = []


def layer(
    *ranks: int, keeps: bool = False, nests: bool = False
) -> Callable[[Callable[[Draw, Shape], Layer | None]], Callable[[Draw, Shape], Layer | None]]:
    """Enters a function into the catalogue."""

    def enter(draw: Callable[[Draw, Shape], Layer | None]) -> Any:
        KINDS.append(Kind(draw.__name__, draw, ranks or (2, 3, 4), keeps, nests))
        return draw

    return enter


@dataclass
class Draw:
    """Random choices from one generator, so that a seed says all."""

    rng: np.random.Generator
    depth: int = 0  # how many layers enclose the one that is being drawn
    derivative: str = ANY  # what the result must have: "reverse", "forward", both or nothing

    def one(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def maybe(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def width(self) -> int:
        return self.one(WIDTHS)

    def factor(self, n: int) -> int | None:
        """A proper divisor of ``n``, or None for a prime."""
        found = [k for k in range(2, n) if n % k == 0]
        return self.one(found) if found else None

    def weights(self, *shape: int) -> np.ndarray:
        """Random entries, none of them zero, scaled by what a kernel of (..., in, out) sums."""
        fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        array = self.rng.normal(size=shape)
        return np.where(np.abs(array) < 0.05, 0.05, array) / max(fan_in, 1) ** 0.5

    def positive(self, *shape: int) -> np.ndarray:
        return self.rng.uniform(0.5, 1.5, shape)

    def layer(self, shape: Shape, keeps: bool = False) -> Layer:
        """Any layer that fits; inside others no further nesting beyond the second level."""
        inner = Draw(self.rng, self.depth + 1, self.derivative)
        fits = [
            kind
            for kind in KINDS
            if len(shape) in kind.ranks
            and (kind.keeps or not keeps)
            and not (kind.nests and self.depth >= 2)
        ]
        while True:
            kind = self.one(fits)
            found = kind.draw(inner, shape)
            if found is not None and (found.shape == shape or _small(found.shape)):
                return found._replace(text=found.text or kind.name)

    def layers(self, shape: Shape, count: int, keeps: bool = False) -> list[Layer]:
        """Several layers, one after the other."""
        found: list[Layer] = []
        for _ in range(count):
            found.append(self.layer(found[-1].shape if found else shape, keeps))
        return found

    def branch(self, shape: Shape) -> Layer:
        """What can stand beside ``x``: a short chain that ends in the shape it began with."""
        return chained(self.layers(shape, self.one([1, 2]), keeps=True))

    def differentiated(self) -> Draw:
        """For what will be differentiated inside: it needs a derivative in reverse, too."""
        needed = REVERSE if self.derivative in (ANY, REVERSE) else BOTH
        return Draw(self.rng, self.depth, needed)


def _small(shape: Shape) -> bool:
    return shape[-1] <= WIDEST and int(np.prod(shape)) <= LARGEST and min(shape) > 0


def chained(layers: Sequence[Layer]) -> Layer:
    """Layers in a row as one layer; the parameters of the i-th are under its number and name."""
    names = [f"{i}_{one.text.split()[0].strip(',')}" for i, one in enumerate(layers)]

    def apply(params: Params, x: Any) -> Any:
        for name, one in zip(names, layers, strict=True):
            x = one.apply(params.get(name, {}), x)
        return x

    params = {name: one.params for name, one in zip(names, layers, strict=True) if one.params}
    return Layer("; ".join(one.text for one in layers), params, apply, layers[-1].shape)
