"""Statistics of what each weight of a program multiplies, gathered while it is evaluated.

:func:`read` walks the jaxpr with values and, beside them, origins: which leaf an array holds. A
contraction of such an array adds the statistics of its other operand. Loops over stacked layers
give one statistic per layer, loops that use a weight again add them up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxprune.calibration import origins
from jaxprune.calibration.origins import Layout, Origin
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.primitives import CALLS, Kind
from jaxprune.sharding import varying_as

UNREAD = "no contraction consumes it"  # This is said of a bias, a scale, a table that is looked up.
TWOFOLD = "two kinds of inputs"
GROUPED = "a convolution with groups; its inputs differ per group"


class Moments(NamedTuple):
    """Of the inputs of one leaf; a leading (batch...) where the leaf is a stack of matrices."""

    tokens: jax.Array  # (batch...): how many
    mean: jax.Array  # (batch..., in)
    spread: jax.Array  # (batch..., in): the sum of squared deviations from the mean
    gram: jax.Array | None  # (batch..., in, in): X^T X


class Wish(NamedTuple):
    """What is to be gathered; hashable."""

    shapes: tuple[tuple[int, ...] | None, ...]  # of each leaf; None: no statistics of it
    grams: tuple[bool, ...]
    dtype: Any


class Found(NamedTuple):
    layout: Layout
    moments: Moments


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of tokens together.

    Chan, Golub and LeVeque, Updating formulae, 1979: sums of squares minus squares of sums would
    lose the variance of an input with a large mean in float32.
    """
    count = a.tokens + b.tokens
    part = jnp.where(count > 0, b.tokens / jnp.where(count > 0, count, 1), 0)[..., None]
    step = b.mean - a.mean
    return Moments(
        count,
        a.mean + step * part,
        a.spread + b.spread + jnp.square(step) * part * a.tokens[..., None],
        None if a.gram is None or b.gram is None else a.gram + b.gram,
    )


def summed(moments: Moments, axis_name: Any) -> Moments:
    """The moments of all devices along a mapped axis together."""
    add = functools.partial(jax.lax.psum, axis_name=axis_name)
    count = add(moments.tokens)
    mean = add(moments.mean * moments.tokens[..., None]) / jnp.maximum(count, 1)[..., None]
    inner = moments.spread + jnp.square(moments.mean - mean) * moments.tokens[..., None]
    return Moments(count, mean, add(inner), None if moments.gram is None else add(moments.gram))


class Reader:
    """Evaluates jaxprs; ``found`` fills with what the leaves' contractions saw."""

    def __init__(self, wish: Wish, lost: dict[int, dict[str, None]]):
        self.wish, self.lost = wish, lost  # leaf -> why uses of it are not counted, in order
        self.found: dict[int, Found] = {}

    # -------------------------------------------------------------------------- the walk

    def walk(self, closed: Any, args: Sequence[Any], where: Sequence[Origin | None]) -> Any:
        """The outputs of a jaxpr at ``args``, whose origins are ``where``."""
        jaxpr, consts = compat.open_jaxpr(closed)
        variables = [*jaxpr.constvars, *jaxpr.invars]
        env = dict(zip(variables, [*consts, *args], strict=True))
        trail = dict(zip(variables, [*(None for _ in consts), *where], strict=True))

        def known(atom: Any) -> tuple[Any, Origin | None]:
            if isinstance(atom, core.Literal):
                return atom.val, None
            return env[atom], trail.get(atom)

        for eqn in jaxpr.eqns:
            xs, at = zip(*map(known, eqn.invars)) if eqn.invars else ((), ())
            ys, to = self._evaluate(eqn, xs, at)
            env.update(zip(eqn.outvars, ys, strict=True))
            trail.update({v: t for v, t in zip(eqn.outvars, to, strict=True) if t is not None})
        pairs = [known(v) for v in jaxpr.outvars]
        return [x for x, _ in pairs], [t for _, t in pairs]

    def _evaluate(self, eqn: Any, xs: Sequence[Any], at: Sequence[Origin | None]) -> Any:
        kind, nothing = primitives.kind(eqn), [None] * len(eqn.outvars)
        if all(origin is None for origin in at):
            return compat.bind(eqn, xs), nothing
        if kind is Kind.INLINED or kind in CALLS:
            return self.walk(compat.sub_jaxprs(eqn)[0], xs, at)
        if kind in CONTROL:
            return CONTROL[kind](self, eqn, xs, at), nothing
        if kind in CONTRACTIONS:
            for side in (0, 1):
                self._contract(eqn, xs, at[side], side)
        elif kind is Kind.EACH:
            return compat.bind(eqn, xs), list(at)
        elif origins.is_transparent(eqn) and at[0] is not None:
            to = origins.passed(at[0], eqn)
            if to is not None:
                return compat.bind(eqn, xs), [to]
            self._lose(eqn, at, "it takes the weight's axes apart")
        else:
            for origin in at:
                self._lose(eqn, [origin], _changed(eqn, origin))
        return compat.bind(eqn, xs), nothing

    def _lose(self, eqn: Any, at: Sequence[Origin | None], why: str) -> None:
        for origin in at:
            if origin is not None:
                line = compat.source_line(eqn)
                place = f" at {line}" if line else ""
                self._tell(origin.leaf, f"{eqn.primitive.name}{place}: {why}")

    def _tell(self, leaf: int, why: str) -> None:
        self.lost.setdefault(leaf, {})[why] = None

    # --------------------------------------------------------------------- the statistics

    def _contract(self, eqn: Any, xs: Sequence[Any], origin: Origin | None, side: int) -> None:
        shape = None if origin is None else self.wish.shapes[origin.leaf]
        if origin is None or shape is None:
            return
        read = CONTRACTIONS[primitives.kind(eqn)](eqn, origin, side)
        if isinstance(read, str):
            return self._lose(eqn, [origin], read)
        rows, contracted, batch = read
        layout = origins.layout(origin, shape, contracted, batch)
        if layout is None:
            return self._lose(eqn, [origin], "it contracts a part of an axis")
        inputs = [f for k in contracted for f in origin.axes[k]]
        order = [i for i, _ in sorted(enumerate(inputs), key=lambda p: (p[1].axis, -p[1].stride))]
        lead = len(batch) + 1  # batch..., tokens
        axes = [k for b in batch for k in [f.axis for f in origin.axes[b]]]

        def of_inputs(x: jax.Array, measure: Callable[[jax.Array], Any]) -> Any:
            x = rows(x)
            split = x.reshape(*x.shape[:lead], *(f.size for f in inputs))
            split = split.transpose(*range(lead), *(lead + i for i in order))
            return _placed(measure(split.reshape(x.shape)), axes, origin, shape)

        self.gather(origin.leaf, layout, functools.partial(_partitioned, of_inputs, xs[1 - side]))

    def gather(self, leaf: int, layout: Layout, measured: Callable[[Any], Any]) -> None:
        """``measured(f)``: f of inputs (batch..., tokens, in), its batches in the leaf's order."""
        gram = self.wish.grams[leaf]
        self.add(leaf, Found(layout, measured(lambda x: _moments(x, self.wish.dtype, gram))))

    def add(self, leaf: int, new: Found) -> None:
        old = self.found.get(leaf)
        if old is None:
            self.found[leaf] = new
        elif old.layout == new.layout:
            self.found[leaf] = Found(old.layout, merge(old.moments, new.moments))
        else:
            self._tell(
                leaf,
                f"it is multiplied along its axes {old.layout.ins} in one place and "
                f"{new.layout.ins} in another, so that it has {TWOFOLD}",
            )

    def inside(self) -> Reader:
        return Reader(self.wish, self.lost)


def _changed(eqn: Any, origin: Origin | None) -> str:
    """Why an array that is neither multiplied nor passed on is the last of its trail."""
    looks_up = primitives.kind(eqn) is Kind.GATHER
    if looks_up and sum(n > 1 for n in views.window_sizes(eqn)) <= 1:
        return f"{UNREAD}: its rows are looked up"
    shape = getattr(eqn.outvars[0].aval, "shape", ())
    same_rank = origin is not None and len(origin.axes) == len(shape)
    if origin is not None and same_rank and origins.is_broadcast(origin, shape):
        return f"{UNREAD}: it is spread along the inputs, as a bias is"
    return "the weight is changed before it is multiplied, or not multiplied"


class Rows(Reader):
    """Keeps the inputs themselves, of what stands outside of loops."""

    def __init__(self, wish: Wish):
        super().__init__(wish, {})
        self.rows: dict[int, list[jax.Array]] = {}

    def gather(self, leaf: int, layout: Layout, measured: Callable[[Any], Any]) -> None:
        self.rows.setdefault(leaf, []).append(measured(lambda x: x.astype(self.wish.dtype)))


def _partitioned(
    of_inputs: Callable[..., Any], x: jax.Array, measure: Callable[[jax.Array], Any]
) -> Any:
    """``of_inputs(x, measure)``, where XLA chooses how it is spread over devices.

    On an Explicit mesh, a product over an axis that lies on several devices would have to say so.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return of_inputs(x, measure)
    everywhere = jax.NamedSharding(mesh, jax.P())
    free = jax.sharding.auto_axes(axes=mesh.explicit_axes, out_sharding=everywhere)
    return free(lambda x: of_inputs(x, measure))(x)


def _moments(x: jax.Array, dtype: Any, gram: bool) -> Moments:
    """Of inputs (batch..., tokens, in)."""
    x = x.astype(dtype)
    mean = jnp.sum(x, -2) / max(x.shape[-2], 1)  # of no tokens: 0
    spread = jnp.sum(jnp.square(x - mean[..., None, :]), -2)
    count = jnp.full(x.shape[:-2], x.shape[-2], dtype)
    product = jnp.matmul(x.mT, x, precision="highest") if gram else None
    return Moments(count, mean, spread, product)


def _placed(moments: Any, axes: list[int], origin: Origin, shape: Any) -> Any:
    """Batches in the order of the leaf; what indexing took, at its place among zeros."""
    for axis, position in origin.picked:
        size = shape[axis]
        here = jnp.arange(size) == position
        moments = jax.tree.map(
            lambda m, here=here: jnp.where(here.reshape(-1, *[1] * m.ndim), m[None], 0), moments
        )
        axes = [axis, *axes]
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    return jax.tree.map(lambda m: m.transpose(*order, *range(len(order), m.ndim)), moments)


# ------------------------------------------------------------------------------ contractions


AsRows = Callable[[jax.Array], jax.Array]  # the other operand as (batch..., tokens, in)


def _dot(eqn: Any, origin: Origin, side: int) -> str | tuple[AsRows, list[int], list[int]]:
    """How inputs become rows, and the weight's contracted and batch axes."""
    contract, batch = views.contraction(eqn).contract, views.contraction(eqn).batch
    other = eqn.invars[1 - side].aval
    if jnp.issubdtype(other.dtype, jnp.complexfloating):
        return "complex inputs"
    cx, bx = list(contract[1 - side]), list(batch[1 - side])
    own_c, own_b = list(contract[side]), list(batch[side])
    if any(not origin.axes[k] for k in own_c):
        return "it contracts an axis that the weight lacks"
    free = [k for k in range(other.ndim) if k not in cx and k not in bx]
    shared = [k for k, own in zip(bx, own_b) if not origin.axes[own]]  # same weight: more tokens
    kept = [(k, own) for k, own in zip(bx, own_b) if origin.axes[own]]

    def rows(x: jax.Array) -> jax.Array:
        batches = [k for k, _ in kept]
        sizes = [x.shape[k] for k in batches]
        tokens, width = (prod(x.shape[k] for k in axes) for axes in (shared + free, cx))
        return x.transpose(batches + shared + free + cx).reshape(*sizes, tokens, width)

    return rows, own_c, [own for _, own in kept]


def _conv(eqn: Any, origin: Origin, side: int) -> str | tuple[AsRows, list[int], list[int]]:
    """As :func:`_dot`, of patches: what each position of the window multiplies."""
    conv, taps = views.convolution(eqn), views.taps(eqn)
    if side == 0:
        return "the weight is convolved as if it were an image"
    if conv.groups != 1 or conv.batch_groups != 1:
        return GROUPED
    spatial = conv.rhs[2:]

    def rows(image: jax.Array) -> jax.Array:
        patches = jax.lax.conv_general_dilated_patches(
            image.transpose(conv.lhs),
            [eqn.invars[1].aval.shape[k] for k in spatial],
            taps.strides,
            taps.padding,
            lhs_dilation=taps.lhs_dilation,
            rhs_dilation=taps.rhs_dilation,
            precision=jax.lax.Precision.HIGHEST,
        )  # (images, channels * window, positions...)
        each = jnp.moveaxis(patches, 1, -1)
        return each.reshape(prod(each.shape[:-1]), each.shape[-1])

    return rows, [conv.rhs[1], *spatial], []


CONTRACTIONS: dict[Kind, Callable[..., Any]] = {
    Kind.CONTRACTION: _dot,
    Kind.CONVOLUTION: _conv,
}

# --------------------------------------------------------------------------- control flow


def _scan(reader: Reader, eqn: Any, xs: Sequence[Any], at: Sequence[Origin | None]) -> list[Any]:
    parts = compat.scan_parts(eqn)
    c, k = parts.num_consts, parts.num_carry
    rows = [o and origins.scan_row(o) for o in at[c + k :]]
    reader._lose(eqn, [o for o, row in zip(at[c + k :], rows) if row is None], "a part of an axis")
    reader._lose(eqn, at[c : c + k], "the loop carries the weight on, which may change it")
    trail = [*at[:c], *[None] * k, *rows]
    stacked = {o.leaf for o in rows if o is not None}
    layouts: dict[int, Layout] = {}

    def turn(carry: Sequence[Any], row: Sequence[Any]) -> Any:
        inner = reader.inside()
        outs, _ = inner.walk(parts.jaxpr, [*xs[:c], *carry, *row], trail)
        layouts.update({leaf: f.layout for leaf, f in inner.found.items()})
        each = {leaf: f.moments for leaf, f in inner.found.items()}
        return outs, each

    def body(state: Any, row: Any) -> Any:
        carry, sums = state
        outs, each = turn(carry, row)
        sums = {leaf: merge(m, each[leaf]) for leaf, m in sums.items()}
        own = {leaf: m for leaf, m in each.items() if leaf in stacked}
        return (outs[:k], sums), (outs[k:], own)

    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs[c + k :]]
    _, each = jax.eval_shape(turn, list(xs[c : c + k]), first)
    sums = _zeros({leaf: m for leaf, m in each.items() if leaf not in stacked})
    (carry, sums), (ys, own) = jax.lax.scan(
        body,
        (list(xs[c : c + k]), sums),
        list(xs[c + k :]),
        length=parts.length,
        reverse=parts.reverse,
        unroll=parts.unroll,
    )
    for leaf, moments in {**sums, **own}.items():
        reader.add(leaf, Found(layouts[leaf], moments))
    return [*carry, *ys]


def _while(reader: Reader, eqn: Any, xs: Sequence[Any], at: Sequence[Origin | None]) -> list[Any]:
    p = views.while_loop(eqn)
    c, b = p.test_consts, p.body_consts
    reader._lose(eqn, at[c + b :], "the loop carries the weight on, which may change it")
    if p.test.out_avals[0].shape:  # under jax.vmap: one loop for each row
        reader._lose(eqn, at[c : c + b], "each row has its own number of rounds")
        return compat.bind(eqn, xs)
    trail = [*at[c : c + b], *[None] * (len(xs) - c - b)]
    layouts: dict[int, Layout] = {}

    def turn(carry: Sequence[Any]) -> Any:
        inner = reader.inside()
        outs, _ = inner.walk(p.body, [*xs[c : c + b], *carry], trail)
        layouts.update({leaf: f.layout for leaf, f in inner.found.items()})
        return outs, {leaf: f.moments for leaf, f in inner.found.items()}

    def goes_on(state: Any) -> Any:
        args = [*xs[:c], *state[0]]
        return reader.inside().walk(p.test, args, [None] * len(args))[0][0]

    def body(state: Any) -> Any:
        outs, each = turn(state[0])
        return outs, {leaf: merge(m, each[leaf]) for leaf, m in state[1].items()}

    sums = _zeros(jax.eval_shape(turn, list(xs[c + b :]))[1])
    carry, sums = jax.lax.while_loop(goes_on, body, (list(xs[c + b :]), sums))
    for leaf, moments in sums.items():
        reader.add(leaf, Found(layouts[leaf], moments))
    return list(carry)


def _cond(reader: Reader, eqn: Any, xs: Sequence[Any], at: Sequence[Origin | None]) -> list[Any]:
    index, *operands = xs
    layouts: dict[int, Layout] = {}

    def run(branch: Any, operands: Any) -> Any:
        inner = reader.inside()
        outs, _ = inner.walk(branch, operands, at[1:])
        layouts.update({leaf: f.layout for leaf, f in inner.found.items()})
        return outs, {leaf: f.moments for leaf, f in inner.found.items()}

    branches = [functools.partial(run, branch) for branch in views.branches(eqn)]
    every: dict[int, Any] = {}
    for branch in branches:
        every.update(jax.eval_shape(branch, operands)[1])

    def filled(branch: Any) -> Any:
        def go(operands: Any) -> Any:
            outs, each = branch(operands)
            return outs, {**_zeros(every), **each}

        return go

    outs, found = jax.lax.switch(index, [filled(branch) for branch in branches], operands)
    for leaf, moments in found.items():
        reader.add(leaf, Found(layouts[leaf], moments))
    return list(outs)


def _zeros(shapes: Any) -> Any:
    def zeros(s: Any) -> jax.Array:
        return varying_as(jnp.zeros(s.shape, s.dtype), s)

    return jax.tree.map(zeros, shapes)


CONTROL: dict[Kind, Callable[..., list[Any]]] = {
    Kind.LOOP: _scan,
    Kind.WHILE: _while,
    Kind.BRANCH: _cond,
}


def read(
    fn: Callable[..., Any], wish: Wish, params: Any, args: Sequence[Any]
) -> tuple[dict[int, Moments], dict[int, Layout], dict[int, tuple[str, ...]]]:
    """Moments and layouts by leaf, and why uses of leaves are not counted."""
    reader = Reader(wish, {})
    _walk(reader, fn, params, args)
    found = {leaf: f for leaf, f in reader.found.items() if not _twofold(reader, leaf)}
    return (
        {leaf: f.moments for leaf, f in found.items()},
        {leaf: f.layout for leaf, f in found.items()},
        {leaf: tuple(why) for leaf, why in reader.lost.items()},
    )


def read_rows(
    fn: Callable[..., Any], wish: Wish, params: Any, args: Sequence[Any]
) -> dict[int, list[jax.Array]]:
    """For each leaf outside of loops its inputs (batch..., tokens, in), use by use."""
    reader = Rows(wish)
    _walk(reader, fn, params, args)
    return reader.rows


def _walk(reader: Reader, fn: Callable[..., Any], params: Any, args: Sequence[Any]) -> None:
    # Of a function of its own: what it closes over may have changed since fn was traced.
    closed = jax.make_jaxpr(lambda *args: fn(*args))(params, *args)
    leaves, shapes = jax.tree.leaves(params), reader.wish.shapes
    given = [*leaves, *jax.tree.leaves(tuple(args))]
    shapes = (*shapes, *[None] * (len(given) - len(leaves)))
    trail = [None if s is None else origins.of_leaf(i, s) for i, s in enumerate(shapes)]
    reader.walk(closed, given, trail)


def _twofold(reader: Reader, leaf: int) -> bool:
    return any(TWOFOLD in why for why in reader.lost.get(leaf, ()))
