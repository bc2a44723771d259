"""Whole experts of a mixture: which axes count them, what they are worth, the network without some.

Removing an expert is no masking: an expert of zeros could still be chosen, and would take the place
of one that computes something. So its column of the router goes with it, and the softmax over the
router, before or after the choice, runs over those that are left, as the model does it.
:meth:`Experts.compact` has ``jp.compact`` do so with ``semantics="kept"``. :meth:`Experts.remove`
cuts parameters only, for the same function, whatever it does with its choices; it has to read the
number of experts from its parameters, as ``params["router"].shape[-1]``.

The reference is the whole network in which the logits of removed experts are minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune._tables import Part, Shown, Table
from jaxprune.budget.groups import Runner
from jaxprune.compaction.api import compact as _compact
from jaxprune.compaction.blocks import View
from jaxprune.compaction.model import Compact
from jaxprune.costs import routing
from jaxprune.ir import axes
from jaxprune.ir.tape import Step, Value
from jaxprune.reduce import Reduction
from jaxprune.reduce import sum as summed
from jaxprune.structure import infer
from jaxprune.structure.infer import KEPT_ONLY
from jaxprune.structure.unit_scores import unit_scores
from jaxprune.typing import Params, named_leaves

Keep = Mapping[str, Any]  # name of a layer -> booleans, True = kept


class Slot(NamedTuple):
    """One axis of a leaf that counts experts."""

    path: str
    leaf: int
    axis: int


@dataclass(frozen=True)
class Layer:
    """The experts of one layer, or of all layers of a scan.

    Attributes:
      name: the path of the router's first leaf.
      count: how many experts there are.
      top_k: how many of them one token uses.
      routers, slots: the axes that count experts, in leaves that choose and in those that compute.
        Experts in groups are an axis of two factors, see ``jp.infer_structure``.
    """

    name: str
    count: int
    top_k: int
    routers: tuple[Slot, ...]
    slots: tuple[Slot, ...]
    key: routing.Key = field(repr=False, compare=False)

    def check_groups(self, kept: np.ndarray) -> None:
        """Raises unless equally many experts of each group are kept, or none of it."""
        sizes = [axis.size for axis in self.key]
        counts = kept.reshape(-1, sizes[-1]).sum(-1) if len(sizes) > 1 else np.ones(1, int)
        if len(set(counts[counts > 0])) > 1:
            raise ValueError(
                f"keep[{self.name!r}] keeps between {counts[counts > 0].min()} and {counts.max()} "
                f"of {sizes[-1]} experts of a group; keep equally many in each, or none of it"
            )


@dataclass(frozen=True, eq=False)
class Experts(Shown):
    """What :func:`find` found. ``print`` it to see the layers.

    Attributes:
      layers: name -> :class:`Layer`.
    """

    layers: dict[str, Layer]
    _fn: Callable[..., Any] = field(repr=False)
    _program: infer.Program = field(repr=False)

    def scores(self, scores: Any, reduce: Reduction = summed) -> dict[str, np.ndarray]:
        """Returns the score of each expert, from scores of its entries; routers have no vote.

        Args:
          scores: a tree like params, such as ``jp.scores.l2(params)``, or
            ``jp.scores.taylor(params, grad=grad)`` with ``jp.reduce.taylor``: the change of a loss.
          reduce: what becomes of an expert's entries.

        Returns:
          {layer: (experts,)}, larger = keep.
        """
        leaves = jax.tree.leaves(scores)
        return {name: self._score(x, leaves, reduce) for name, x in self.layers.items()}

    def _score(self, layer: Layer, leaves: Sequence[Any], reduce: Reduction) -> np.ndarray:
        unit = axes.leaf(layer.count)
        owned = []
        for slot in layer.slots:
            fresh = [axes.leaf(n) for n in np.shape(leaves[slot.leaf])]
            fresh[slot.axis] = unit
            owned.append((tuple(fresh), leaves[slot.leaf]))
        param_axes, scores = zip(*owned)
        return np.asarray(unit_scores([unit], param_axes, scores, {}, reduce)[0])

    def compact(self, params: Params, keep: Keep, *args: Any) -> Compact:
        """Returns a compact model without some experts, by ``jp.compact(..., semantics="kept")``.

        The function may hold the number of experts as a number. What it chooses keeps the numbers
        of the whole program.

        Args:
          params, keep, *args: as for :meth:`remove`.

        Raises:
          ValueError: as :meth:`remove` for ``keep``; where compact can't remove them, with its
            reasons.

        Example:
          >>> import jax, jax.numpy as jnp, jaxprune as jp
          >>> def fn(p, x):
          ...     gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
          ...     return jnp.einsum("tk,td,tkdf->tf", gates, x, p["experts"][chosen])
          >>> params = {"router": jnp.eye(3, 4), "experts": jnp.ones((4, 3, 5))}
          >>> found = jp.experts.find(fn, params, jnp.ones((2, 3)))
          >>> keep = {"router": jnp.array([True, False, True, True])}
          >>> small = found.compact(params, keep, jnp.ones((2, 3)))
          >>> small.sizes["experts"], small.fn(small.params, jnp.ones((2, 3))).shape
          (3, (2, 5))
        """
        leaves, treedef = jax.tree.flatten(params)
        masks: list[Any] = [np.asarray(True)] * len(leaves)
        for name, given in keep.items():
            layer, kept = self._checked(name, given)
            layer.check_groups(kept)
            for slot in {*layer.routers, *layer.slots}:
                shape = np.shape(leaves[slot.leaf])
                masks[slot.leaf] = masks[slot.leaf] & _along(kept, shape, slot.axis)
        small = _compact(
            self._fn, params, jax.tree.unflatten(treedef, masks), *args, semantics=KEPT_ONLY
        )
        left = [f"{e.name}: {e.reason}" for e in small.certificate.entries if e.removed < e.masked]
        if left:
            raise ValueError(
                f"these experts can't be removed by compact: {'; '.join(left)}; remove cuts "
                "parameters for the same function: found.remove(params, keep, *args)"
            )
        return small

    def remove(self, params: Params, keep: Keep, *args: Any) -> Params:
        """Returns params without some experts, for the same function.

        Args:
          params: those of the function.
          keep: {layer: (experts,) booleans}, True = kept; or (layers of a scan, experts), with as
            many kept in each. Layers that are not named stay whole.
          *args: what else the function is called with; shapes will do.

        Raises:
          ValueError: for an unknown layer, booleans of another shape, fewer experts than each token
            chooses, or a function that doesn't follow its parameters' number of experts.
        """
        small = self._cut(params, keep)
        try:
            shapes = jax.eval_shape(self._fn, small, *args)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                "the function doesn't follow the number of experts in its parameters, and fails "
                f'with fewer: {error}; read the number from a shape: params["router"].shape[-1]'
            ) from error
        wanted = jax.eval_shape(self._fn, params, *args)
        if jax.tree.map(jnp.shape, shapes) != jax.tree.map(jnp.shape, wanted):
            raise ValueError("with fewer experts the function's results have other shapes")
        return small

    def _cut(self, params: Params, keep: Keep) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        for name, given in keep.items():
            layer, kept = self._checked(name, given)
            if len(layer.key) > 1:
                raise ValueError(
                    f"{name!r} has experts in groups, which parameters alone don't tell; write "
                    "found.compact(params, keep, *args)"
                )
            for slot in {*layer.routers, *layer.slots}:
                leaves[slot.leaf] = _taken(leaves[slot.leaf], kept, slot.axis)
        return jax.tree.unflatten(treedef, leaves)

    def _checked(self, name: str, given: Any) -> tuple[Layer, np.ndarray]:
        if name not in self.layers:
            raise ValueError(f"no layer of experts is named {name!r}; there are {[*self.layers]}")
        layer, kept = self.layers[name], np.asarray(given)
        if kept.dtype != bool or kept.shape[-1:] != (layer.count,) or kept.ndim > 2:
            raise ValueError(
                f"keep[{name!r}] is {kept.dtype}{kept.shape}; wanted {layer.count} booleans, True "
                "= kept, or a row of them for each layer of a scan"
            )
        counts = np.unique(kept.sum(-1))
        if len(counts) > 1 or counts[0] < layer.top_k:
            raise ValueError(
                f"keep[{name!r}] keeps {counts.min()} to {counts.max()} of {layer.count} experts, "
                f"and each token chooses {layer.top_k}; keep at least so many, and equally many in "
                "each layer of a scan"
            )
        return layer, kept

    def check(self, params: Params, keep: Keep, *args: Any) -> float:
        """Returns how far the function without some experts is from the reference.

        The reference is the whole network with the logits of removed experts at minus infinity.

        Args:
          params, keep: as for :meth:`remove`.
          *args: arrays.

        Returns:
          The largest difference of any result's entries, relative to that result's largest one: of
          the order of rounding.
        """
        hidden = {n: self._checked(n, k)[1] for n, k in keep.items()}
        if any(kept.ndim > 1 for kept in hidden.values()):
            raise ValueError("check wants one row of booleans for each layer; check layers alike")
        if any(len(self.layers[name].key) > 1 for name in keep):
            small = self.compact(params, keep, *args)
            found = small.fn(small.params, *args)
        else:
            found = self._fn(self.remove(params, keep, *args), *args)
        xs = jax.tree.leaves((params, *args))
        wanted = _Reference(self, hidden).results(xs)
        pairs = zip(jax.tree.leaves(found), wanted, strict=True)
        return max(_apart(a, b) for a, b in pairs)

    def _parts(self) -> Iterator[Part]:
        rows = [
            (x.name, f"{x.count}", f"{x.top_k}", ", ".join(f"{s.path}:{s.axis}" for s in x.slots))
            for x in self.layers.values()
        ]
        yield Table(("layer", "experts", "chosen", "their axes"), rows, (1, 2))


@calls_fn("jp.experts.find")
def find(fn: Callable[..., Any], params: Params, *args: Any) -> Experts:
    """Returns the experts of a mixture: the axes that count them, read from the program.

    How it knows them is said on top of ``jaxprune/costs/routing.py``: ``top_k`` or ``argmax`` over
    a router, and gathered weights, one-hot vectors or ``ragged_dot`` behind it.

    Args:
      fn: ``fn(params, *args)``.
      params, *args: arrays or shapes; nothing is computed.

    Raises:
      ValueError: when the program chooses no experts.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> def fn(p, x):
      ...     gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
      ...     return jnp.einsum("tk,td,tkdf->tf", gates, x, p["experts"][chosen])
      >>> params = {"router": jnp.eye(3, 4), "experts": jnp.ones((4, 3, 5))}
      >>> found = jp.experts.find(fn, params, jnp.ones((2, 3)))
      >>> print(found)
      layer   experts  chosen  their axes
      router        4       2  experts:0
      >>> keep = {"router": jnp.array([True, False, True, True])}
      >>> small = found.remove(params, keep, jnp.ones((2, 3)))
      >>> small["router"].shape, small["experts"].shape
      ((3, 3), (3, 3, 5))
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    program = infer.couple(closed, out_shape, params, args)
    infer.settle([program])
    read = routing.routing(program.tape)
    paths = [path for path, _ in named_leaves(params)]
    groups: dict[routing.Key, list[routing.Key]] = {}
    for key, router in read.choices.items():
        groups.setdefault(router, []).append(key)
    layers = [_layer(program, paths, read, r, inside) for r, inside in groups.items()]
    named = {layer.name: layer for layer in layers if layer is not None}
    if not named:
        raise ValueError(
            "the program chooses no experts: wanted top_k or argmax over a router, whose result is "
            "what weights of three axes or more are taken by; jp.cost(fn, params, *args)"
            ".active_params counts what is found"
        )
    return Experts(named, fn, program)


def _layer(
    program: infer.Program,
    paths: Sequence[str],
    read: routing.Routing,
    router: routing.Key,
    inside: Sequence[routing.Key],
) -> Layer | None:
    """The experts along some axes, None where only vectors are: a vocabulary."""
    own = {v for v, key in read.along if key == router}
    values = program.param_values
    choosing = [Slot(p, i, k) for i, (p, v) in enumerate(zip(paths, values)) if v in own
                for k in _places(v, [router])]  # fmt: skip
    using = [Slot(p, i, k) for i, (p, v) in enumerate(zip(paths, values)) if v not in own
             for k in _places(v, inside)]  # fmt: skip
    matrices = [s for s in using if len(values[s.leaf].shape) >= routing.MATRIX]
    if not matrices or not choosing:
        return None
    top_k = min(read.chosen[a] for a in inside)
    count = math.prod(axis.size for axis in router)
    return Layer(choosing[0].path, count, top_k, tuple(choosing), tuple(using), router)


def _places(value: Value, wanted: Sequence[routing.Key]) -> list[int]:
    return [k for k, a in enumerate(value.axes) if routing.key_of(a) in wanted]


def _apart(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.max(np.abs(x - y), initial=0) / max(np.max(np.abs(y), initial=0), 1e-30))


def _along(kept: np.ndarray, shape: Sequence[int], axis: int) -> np.ndarray:
    """The mask of a leaf with experts along an axis; rows stand along the first one."""
    _check_rows(kept, shape)
    sizes = [n if k == axis or (k == 0 and kept.ndim > 1) else 1 for k, n in enumerate(shape)]
    return kept.reshape(sizes)


def _check_rows(kept: np.ndarray, shape: Sequence[int]) -> None:
    if kept.ndim > 1 and kept.shape[0] != shape[0]:
        raise ValueError(
            f"keep has {kept.shape[0]} rows for a leaf of shape {tuple(shape)}; wanted a row for "
            "each layer of the scan"
        )


def _taken(leaf: Any, kept: np.ndarray, axis: int) -> Any:
    """The kept positions along an axis; other ones in each row where ``kept`` has rows."""
    if kept.ndim == 1:
        return jnp.take(leaf, np.flatnonzero(kept), axis)
    _check_rows(kept, np.shape(leaf))
    return jnp.stack([jnp.take(x, np.flatnonzero(k), axis - 1) for x, k in zip(leaf, kept)])


class _Reference(Runner):
    """Evaluates a whole program with the logits of removed experts at minus infinity."""

    def __init__(self, experts: Experts, hidden: Mapping[str, np.ndarray]):
        super().__init__(View({}))
        self.program = experts._program
        self.kept = {experts.layers[name].key: kept for name, kept in hidden.items()}
        self.logits = routing.routing(self.program.tape).logits

    def results(self, xs: Sequence[Any]) -> list[Any]:
        env = dict(zip(self.program.tape.inputs, xs, strict=True))
        self.steps(self.program.tape.steps, env)
        return [self.read(env, v) for v in self.program.tape.outputs]

    def steps(self, steps: Sequence[Step], env: dict[Value, Any]) -> None:
        for step in steps:
            made = routing.choice_of(step)
            if made is not None:  # nothing removed is chosen, whatever is added to logits
                seen, logits = dict(env), step.ins[0]
                seen[logits] = self._hidden(self.read(env, logits), logits)
                super().steps([step], seen)
                env.update((v, seen[v]) for v in step.outs)
                continue
            super().steps([step], env)
            for value in {v for v, _ in self.logits} & {*step.outs}:
                env[value] = self._hidden(env[value], value)

    def _hidden(self, x: Any, value: Value) -> Any:
        for key, kept in self.kept.items():
            if routing.held(value, key):
                x = jnp.where(_placed(kept, value, key), x, -jnp.inf)
        return x


def _placed(kept: np.ndarray, value: Value, key: routing.Key) -> np.ndarray:
    """What is kept of experts, along the axes of a value that they are."""
    inside = [[leaf for leaf in axes.leaves(a) if leaf in key] for a in value.axes]
    order = [key.index(leaf) for found in inside for leaf in found]
    shape = [math.prod(leaf.size for leaf in found) for found in inside]
    return kept.reshape([leaf.size for leaf in key]).transpose(order).reshape(shape)
