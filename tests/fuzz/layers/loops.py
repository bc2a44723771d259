"""Control flow of all sorts: carries of many forms, loops in loops, rules of one's own, vmap."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.fuzz.layers.catalogue import ANY, BOTH, FORWARD, Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import ACTIVATIONS, plain
from tests.fuzz.layers.contractions import dense_to
from tests.fuzz.layers.weights import Pool


@layer()
def over_channels(draw: Draw, shape: Shape) -> Layer:
    """A scan over the input's channels, with a row of the kernel for each."""
    width, how = draw.width(), draw.one(["sum", "gated", "reversed"])
    params = {"kernel": draw.weights(shape[-1], width)}

    def apply(p: Params, x: Any) -> Any:
        def step(total: Any, row: Any) -> Any:
            channel, weights = row
            added = channel[..., None] * weights
            return total + (jnp.tanh(added) if how == "gated" else added), None

        start = jnp.zeros((*x.shape[:-1], width))
        rows = jnp.moveaxis(x, -1, 0), p["kernel"]
        return lax.scan(step, start, rows, reverse=how == "reversed")[0]

    return Layer(f"over_channels {how}", params, apply, (*shape[:-1], width))


@layer()
def over_columns(draw: Draw, shape: Shape) -> Layer:
    """lax.map or a scan's results over a kernel's columns."""
    width, how = draw.width(), draw.one(["map", "scan", "batched map"])
    params = {"kernel": draw.weights(width, shape[-1])}

    def apply(p: Params, x: Any) -> Any:
        one = lambda row: jnp.tanh(x @ row)  # noqa: E731
        if how == "scan":
            rows = lax.scan(lambda c, row: (c + 1, one(row)), 0, p["kernel"])[1]
        else:
            rows = lax.map(one, p["kernel"], batch_size=2 if how == "batched map" else None)
        return jnp.moveaxis(rows, 0, -1)

    return Layer(f"over_columns {how}", params, apply, (*shape[:-1], width))


def _fast_weights(i: Any, s: dict[str, Any]) -> dict[str, Any]:
    return {"h": jnp.tanh(s["h"] @ s["w"]), "w": s["w"], "i": s["i"] + i}


@layer(keeps=True)
def kernel_in_carry(draw: Draw, shape: Shape) -> Layer:
    """The weights are in a loop's carry, and change in it: fast weights, powers of a kernel."""
    c = shape[-1]
    how = draw.one(["powers", "scaled", "dictionary", "swapped"])
    params = {"kernel": draw.weights(c, c)}

    def apply(p: Params, x: Any) -> Any:
        if how == "dictionary":
            start = {"h": x, "w": p["kernel"], "i": jnp.zeros(())}
            return lax.fori_loop(0, 2, _fast_weights, start)["h"]
        if how == "swapped":
            swap = lambda i, s: (s[1], jnp.tanh(s[0] @ p["kernel"]))  # noqa: E731
            return sum(lax.fori_loop(0, 3, swap, (x, 0.5 * x)))
        turn = (lambda w: w @ p["kernel"]) if how == "powers" else (lambda w: 0.5 * w)
        w = lax.fori_loop(0, 2, lambda i, w: turn(w), p["kernel"])
        return x + x @ w

    return Layer(f"kernel_in_carry {how}", params, apply, shape)


@layer(keeps=True)
def collected(draw: Draw, shape: Shape) -> Layer:
    """A loop writes its steps into an array, which is read afterwards."""
    inner, how = dense_to(draw, shape, shape[-1]), draw.one(["fori", "scan", "scan without rows"])

    def apply(p: Params, x: Any) -> Any:
        def step(h: Any, i: Any) -> Any:
            h = jnp.tanh(inner.apply(p, h)) + 0.1 * i
            return h, h

        if how == "fori":
            rows = jnp.zeros((2, *x.shape))

            def write(i: Any, state: Any) -> Any:
                h, rows = state
                h, _ = step(h, i)
                return h, rows.at[i].set(h)

            return lax.fori_loop(0, 2, write, (x, rows))[1].sum(0)
        if how == "scan":
            return lax.scan(step, x, jnp.arange(2.0), unroll=2)[1].max(0)
        return lax.scan(lambda h, _: step(h, 1.0), x, None, length=2)[1].mean(0)

    return Layer(f"collected by {how} ({inner.text})", inner.params, apply, shape)


@layer(keeps=True)
def until(draw: Draw, shape: Shape) -> Layer | None:
    """A while loop that ends when the data says so; parameters in its test and its body."""
    if draw.derivative not in (ANY, FORWARD):
        return None
    params = {"kernel": draw.weights(shape[-1], shape[-1]), "bound": np.asarray(draw.positive(1))}

    def apply(p: Params, x: Any) -> Any:
        def go(state: Any) -> Any:
            return (state[0] < 3) & (jnp.abs(state[1]).mean() > 0.1 * p["bound"][0])

        return lax.while_loop(go, lambda s: (s[0] + 1, 0.5 * jnp.tanh(s[1] @ p["kernel"])), (0, x))[
            1
        ]

    return Layer("until the mean is small", params, apply, shape)


@layer(keeps=True)
def scanned_associatively(draw: Draw, shape: Shape) -> Layer:
    """associative_scan along tokens or channels: sums, products, a pair of both, backwards."""
    axis, reverse = draw.one([1, len(shape) - 1]), draw.maybe()
    how = draw.one(["sum", "max", "pair"])
    params = {"decay": draw.positive(shape[-1])} if how == "pair" else {}

    def apply(p: Params, x: Any) -> Any:
        if how == "sum":
            return lax.associative_scan(jnp.add, x, reverse=reverse, axis=axis)
        if how == "max":
            return lax.associative_scan(jnp.maximum, x, reverse=reverse, axis=axis)
        both = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
        decay = jnp.broadcast_to(jnp.exp(-p["decay"]), x.shape)
        return lax.associative_scan(both, (decay, x), reverse=reverse, axis=axis)[1]

    text = f"scanned_associatively {how} along {axis}{', reversed' if reverse else ''}"
    return Layer(text, params, apply, shape)


@layer(keeps=True)
def switched(draw: Draw, shape: Shape) -> Layer:
    """lax.switch between kernels, by a parameter or by the data; one branch makes constants."""
    count, width = draw.one([2, 3]), shape[-1]
    inner = [dense_to(draw, shape, width) for _ in range(count)]
    params: Params = {f"b{i}": one.params for i, one in enumerate(inner)}
    by, constant = draw.one(["parameter", "data", "sign"]), draw.maybe(0.3)
    if by == "parameter":
        params["which"] = np.asarray(draw.one([1, 2]))
    if by == "sign":
        params["which"] = draw.weights(3)

    def apply(p: Params, x: Any) -> Any:
        which: Any = p.get("which", (x.sum() > 0).astype(int))
        which = (which.sum() > 0).astype(int) if by == "sign" else which
        branches: list[Any] = [partial(one.apply, p[f"b{i}"]) for i, one in enumerate(inner)]
        if constant:
            branches[-1] = jnp.ones_like
        return lax.switch(which, branches, x)

    return Layer(f"switched by {by}{', constant' if constant else ''}", params, apply, shape)


@layer(keeps=True)
def looped_within(draw: Draw, shape: Shape) -> Layer:
    """A scan in a cond, a cond in a scan, a scan in a scan."""
    how = draw.one(["scan in cond", "cond in scan", "scan in scan", "cond in fori"])
    params = {"kernel": draw.weights(2, shape[-1], shape[-1]), "bias": draw.weights(shape[-1])}

    def apply(p: Params, x: Any) -> Any:
        layers = lambda h: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["kernel"])[0]  # noqa: E731
        other = lambda h: h + p["bias"]  # noqa: E731
        if how == "scan in cond":
            return lax.cond(x.mean() > 0, layers, other, x)
        if how == "scan in scan":
            return lax.scan(lambda h, b: (layers(h) + b, None), x, jnp.stack([p["bias"]] * 2))[0]
        step = lambda h, w: lax.cond(h.sum() > 0, lambda h: jnp.tanh(h @ w), other, h)  # noqa: E731
        if how == "cond in scan":
            return lax.scan(lambda h, w: (step(h, w), None), x, p["kernel"])[0]
        return lax.fori_loop(0, 2, lambda i, h: step(h, p["kernel"][i]), x)

    return Layer(f"looped_within {how}", params, apply, shape)


@layer(keeps=True)
def made_in_loop(draw: Draw, shape: Shape) -> Layer:
    """Each layer's kernel is made of its own weights inside the scan, or by vmap before it."""
    pool, how = Pool(draw), draw.one(["scan", "vmap", "checkpoint", "shared"])
    kernel = pool.kernel(shape[-1], shape[-1], 1)
    params = {k: np.stack([w] * 2) if how != "shared" else w for k, w in pool.params.items()}

    def apply(p: Params, x: Any) -> Any:
        if how == "vmap":
            return lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, jax.vmap(kernel.make)(p))[
                0
            ]
        step = lambda h, q: h + jnp.tanh(h @ kernel.make(q))  # noqa: E731
        if how == "shared":
            return lax.fori_loop(0, 2, lambda i, h: step(h, p), x)
        run = jax.checkpoint(step) if how == "checkpoint" else step
        return lax.scan(lambda h, q: (run(h, q), None), x, p)[0]

    return Layer(f"made_in_loop {how} {kernel.text}", params, apply, shape)


# ------------------------------------------------------------------------ rules of one's own, vmap


@layer(keeps=True)
def own_product(draw: Draw, shape: Shape) -> Layer | None:
    """A product of two kernels, or one with the data, with derivatives of its own."""
    forward = draw.maybe()
    if not forward and draw.derivative in (FORWARD, BOTH):
        return None
    c, k = shape[-1], draw.one([2, 3])
    params = {"a": draw.weights(c, k), "b": draw.weights(k, c)}
    product: Any = jax.custom_jvp(jnp.matmul) if forward else jax.custom_vjp(jnp.matmul)
    if forward:
        product.defjvp(lambda xs, ts: (xs[0] @ xs[1], 0.7 * (ts[0] @ xs[1]) + xs[0] @ ts[1]))
    else:
        product.defvjp(
            lambda a, b: (a @ b, (a, b)),
            lambda saved, ct: (0.7 * ct @ saved[1].T, saved[0].T @ ct),
        )
    return Layer(
        f"own_product {'jvp' if forward else 'vjp'} {k}",
        params,
        lambda p, x: x + x @ product(p["a"], p["b"]),
        shape,
    )


@layer(keeps=True)
def rounded(draw: Draw, shape: Shape) -> Layer | None:
    """Straight-through rounding or sign of a kernel."""
    how = draw.one(["stop gradient", "custom_vjp"])
    if how == "custom_vjp" and draw.derivative in (FORWARD, BOTH):
        return None
    to = draw.one([lambda w: jnp.round(4 * w) / 4, jnp.sign])
    function: Any = jax.custom_vjp(to)
    function.defvjp(lambda w: (to(w), None), lambda _, ct: (ct,))
    if how == "stop gradient":
        function = lambda w: w + lax.stop_gradient(to(w) - w)  # noqa: E731
    params = {"kernel": draw.weights(shape[-1], shape[-1])}
    return Layer(f"rounded {how}", params, lambda p, x: x @ function(p["kernel"]), shape)


@layer()
def mapped_oddly(draw: Draw, shape: Shape) -> Layer:
    """vmap over a kernel's columns, the channels, or members on a last axis."""
    c, width = shape[-1], draw.width()
    how = draw.one(["columns", "members last", "both", "named"])
    params = {"kernel": draw.weights(c, width)}
    if how == "members last":
        params = {"kernel": draw.weights(c, width, 3)}

    def apply(p: Params, x: Any) -> Any:
        if how == "columns":
            return jax.vmap(lambda w: jnp.tanh(x @ w), in_axes=1, out_axes=-1)(p["kernel"])
        if how == "members last":
            run = jax.vmap(lambda q: jnp.tanh(x @ q["kernel"]), in_axes=-1, out_axes=1)
            return run(p).sum(1)
        if how == "named":
            w = jax.vmap(lambda w: w / (1 + lax.psum(w * w, "i")), 0, axis_name="i")(p["kernel"])
            return x @ w
        rows = jax.vmap(lambda channel, w: channel[..., None] * w, in_axes=(-1, 0), out_axes=-2)
        return rows(x, p["kernel"]).sum(-2)

    return Layer(f"mapped_oddly {how}", params, apply, (*shape[:-1], width))


@layer(keeps=True)
def derivative_inside(draw: Draw, shape: Shape) -> Layer | None:
    """A directional derivative, a vjp, or a gradient by the parameters within the program."""
    inner = dense_to(draw.differentiated(), shape, shape[-1])
    how = draw.one(["jvp", "vjp", "step"])

    def apply(p: Params, x: Any) -> Any:
        value = lambda q, h: jnp.tanh(inner.apply(q, h))  # noqa: E731
        if how == "jvp":
            return jax.jvp(partial(value, p), (x,), (jnp.ones_like(x),))[1]
        if how == "vjp":
            y, back = jax.vjp(partial(value, p), x)
            return back(jnp.sin(y))[0]
        steep = jax.grad(lambda q: jnp.square(value(q, x)).mean())(p)
        return value(jax.tree.map(lambda w, g: w - g, p, steep), x)

    return Layer(f"derivative_inside {how} ({inner.text})", inner.params, apply, shape)


@layer(keeps=True)
def inner_jit(draw: Draw, shape: Shape) -> Layer:
    """jit and remat of activations with static arguments; a name for checkpointing."""
    name, how = draw.one(list(ACTIVATIONS)), draw.one(["jit", "static", "remat", "named"])

    def apply(x: Any) -> Any:
        if how == "static":
            return jax.jit(lambda h, n: ACTIVATIONS[n](h), static_argnums=1)(x, name)
        if how == "named":
            from jax.ad_checkpoint import checkpoint_name

            return checkpoint_name(ACTIVATIONS[name](x), "h")
        return (jax.jit if how == "jit" else jax.checkpoint)(ACTIVATIONS[name])(x)

    return plain(shape, f"inner_jit {how} {name}", apply)
