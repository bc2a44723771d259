"""Kernels that are made of other weights before any data: sums, products, norms, gathers of them.

A dimension can meet itself here: both axes of ``a @ a.T`` are one, and so are those of ``a @ b``
in ``h + h @ (a @ b)``. Parameters are drawn from a pool, so that one may stand at several places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.fuzz.layers.catalogue import Draw, Layer, Params, Shape, layer
from tests.fuzz.layers.channels import ACTIVATIONS

DEEPEST = 2  # expressions within expressions


class Kernel(NamedTuple):
    """An expression among weights."""

    text: str
    make: Callable[[Params], Any]


class Pool:
    """The parameters of one layer, and expressions of them."""

    def __init__(self, draw: Draw):
        self.draw, self.params = draw, dict[str, Any]()

    def weight(self, *shape: int) -> Kernel:
        """A parameter: a new one, or one that is there, perhaps transposed."""
        same = [n for n, a in self.params.items() if a.shape == shape]
        turned = [n for n, a in self.params.items() if a.shape == shape[::-1] and len(shape) == 2]
        if same and self.draw.maybe(0.3):
            return _named(self.draw.one(same))
        if turned and self.draw.maybe(0.4):
            name = self.draw.one(turned)
            return Kernel(f"{name}.T", lambda p: p[name].T)
        return self.add(self.draw.weights(*shape))

    def add(self, array: Any) -> Kernel:
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.params)]
        self.params[name] = array
        return _named(name)

    def kernel(self, rows: int, columns: int, depth: int = 0) -> Kernel:
        """Any expression of this shape."""
        if depth >= DEEPEST or len(self.params) > 6 or (depth and self.draw.maybe(0.4)):
            return self.weight(rows, columns)
        while True:
            made = self.draw.one(EXPRESSIONS)(self, rows, columns, depth + 1)
            if made is not None:
                return made


def _named(name: str) -> Kernel:
    return Kernel(name, lambda p: p[name])


Expression = Callable[[Pool, int, int, int], Kernel | None]
EXPRESSIONS: list[Expression] = []


def _expression(make: Expression) -> Expression:
    EXPRESSIONS.append(make)
    return make


def _two(text: str, a: Kernel, b: Kernel, function: Callable[[Any, Any], Any]) -> Kernel:
    return Kernel(text.format(a.text, b.text), lambda p: function(a.make(p), b.make(p)))


def _one(text: str, a: Kernel, function: Callable[[Any], Any]) -> Kernel:
    return Kernel(text.format(a.text), lambda p: function(a.make(p)))


# -------------------------------------------------------------------------------- products, sums


@_expression
def product(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """Low-rank factors in several spellings."""
    k = pool.draw.one([2, 3, 4, m, n])
    a, b = pool.kernel(m, k, depth), pool.kernel(k, n, depth)
    how = pool.draw.one(["ik,kj->ij", "ik,kj->ji", "@", "@"])
    if how == "@":
        return _two("({} @ {})", a, b, jnp.matmul)
    turn = how.endswith("ji")
    return _two(
        f"einsum {how} of {{}}, {{}}",
        a,
        b,
        lambda x, y: jnp.einsum(how, x, y).T if turn else jnp.einsum(how, x, y),
    )


@_expression
def three_factors(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    k, j = pool.draw.one([2, 3, m]), pool.draw.one([2, 3, n])
    a, b, c = pool.weight(m, k), pool.weight(k, j), pool.weight(j, n)

    def make(p: Params) -> Any:
        return jnp.einsum("ab,bc,cd->ad", a.make(p), b.make(p), c.make(p))

    return Kernel(f"({a.text} @ {b.text} @ {c.text})", make)


@_expression
def gram(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    """A parameter that meets itself."""
    if m != n:
        return None
    k, inner = pool.draw.one([2, 4, m]), pool.draw.maybe()
    a = pool.kernel(k, m, depth) if inner else pool.kernel(m, k, depth)
    if inner:
        return _one("gram ({}).T @", a, lambda x: x.T @ x)
    return _one("gram @ ({}).T", a, lambda x: x @ x.T)


@_expression
def power(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    return None if m != n else _one("({})^2", pool.kernel(m, n, depth), lambda x: x + x @ x)


@_expression
def elementwise(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    a, b = pool.kernel(m, n, depth), pool.kernel(m, n, depth)
    text, function = pool.draw.one(
        [
            ("({} * {})", jnp.multiply),
            ("({} + {})", jnp.add),
            ("max({}, {})", jnp.maximum),
            ("({} / (1 + {}^2))", lambda x, y: x / (1 + y * y)),
            ("where({1} > 0, {0})", lambda x, y: jnp.where(y > 0, x, 0)),
            ("where({1} > 0, {0}, {1})", lambda x, y: jnp.where(y > 0, x, y)),
            ("where({1} > 0.1, {0}, 0.3)", lambda x, y: jnp.where(y > 0.1, x, 0.3)),
        ]
    )
    return _two(text, a, b, function)


@_expression
def symmetric(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    if m != n:
        return None
    sign = pool.draw.one([1, -1])
    return _one(
        f"({{}} {'+' if sign > 0 else '-'} its transpose)",
        pool.kernel(m, n, depth),
        lambda x: x + sign * x.T,
    )


@_expression
def outer(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """Two vectors, or one with itself."""
    a = pool.weight(m)
    b = a if m == n and pool.draw.maybe(0.3) else pool.weight(n)
    how = pool.draw.one(["*", "outer", "less", "einsum"])
    functions: dict[str, Any] = {
        "*": lambda x, y: x[:, None] * y[None],
        "outer": jnp.outer,
        "less": lambda x, y: x[:, None] - y,
        "einsum": lambda x, y: jnp.einsum("i,j->ji", x, y).T,
    }
    return _two(f"outer {how} of {{}}, {{}}", a, b, functions[how])


@_expression
def scaled(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """Rows, columns or all entries times a vector or a scalar."""
    shape = pool.draw.one([(), (1,), (n,), (m, 1), (1, n), (1, 1)])
    by = pool.add(np.asarray(pool.draw.positive(*shape)))
    return _two(f"({{}} * {{}}{shape})", pool.kernel(m, n, depth), by, jnp.multiply)


@_expression
def kronecker(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    j, k = pool.draw.factor(m), pool.draw.factor(n)
    if j is None or k is None:
        return None
    return _two("kron({}, {})", pool.weight(j, k), pool.weight(m // j, n // k), jnp.kron)


@_expression
def hypernetwork(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """A kernel that a small code and a large tensor make."""
    k = pool.draw.one([2, 3])
    code = pool.weight(k)
    if pool.draw.maybe():
        flat = pool.weight(k, m * n)
        return _two(
            "reshape(tanh({}) @ {})", code, flat, lambda z, h: (jnp.tanh(z) @ h).reshape(m, n)
        )
    cube = pool.add(pool.draw.weights(m, k, n))
    return _two("einsum k,mkn of {}, {}", code, cube, lambda z, h: jnp.einsum("k,mkn->mn", z, h))


@_expression
def related(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """Rows and columns have embeddings of their own; a kernel of their distances or products."""
    k = pool.draw.one([2, 3])
    a = pool.weight(m, k)
    b = a if m == n and pool.draw.maybe() else pool.weight(n, k)
    if pool.draw.maybe():
        return _two("softmax({} @ {}.T)", a, b, lambda x, y: jax.nn.softmax(x @ y.T))
    return _two(
        "exp(-distance({}, {}))",
        a,
        b,
        lambda x, y: jnp.exp(-jnp.square(x[:, None] - y[None]).sum(-1)),
    )


# ------------------------------------------------------------------------------- norms of weights


def _spectral(w: Any) -> Any:
    """One step of the power iteration, from ones."""
    v = w.T @ (w @ jnp.ones(w.shape[1]))
    v = v / (jnp.linalg.norm(v) + 1e-2)
    return w / (jnp.sqrt(jnp.sum((w @ v) ** 2) + 1e-4))


NORMS: dict[str, Callable[[Any], Any]] = {
    "spectral norm": _spectral,
    "by columns": lambda w: w / jnp.sqrt((w * w).sum(0, keepdims=True) + 1e-2),
    "by rows": lambda w: w / jnp.sqrt((w * w).sum(-1, keepdims=True) + 1e-2),
    "by all": lambda w: w / (jnp.linalg.norm(w) + 1e-2),
    "by the largest": lambda w: w / (jnp.abs(w).max() + 1e-2),
    "standardised": lambda w: (w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-2),
    "standardised over all": lambda w: (w - w.mean()) / jnp.sqrt(w.var() + 1e-2),
    "centred rows": lambda w: w - w.mean(1, keepdims=True),
    "softmax of columns": lambda w: jax.nn.softmax(w, 0),
    "softmax of rows": lambda w: jax.nn.softmax(w, -1),
    "larger than the mean": lambda w: w * (jnp.abs(w) > jnp.abs(w).mean()),
    "quantised": lambda w: jnp.round(w * 8) / 8,
    "tanh": jnp.tanh,
    "exp": lambda w: jnp.exp(-w * w),
    "lower triangle": jnp.tril,
    "upper triangle": lambda w: jnp.triu(w, 1),
    "no diagonal": lambda w: w * (1 - jnp.eye(*w.shape)),
    "identity added": lambda w: w + 0.5 * jnp.eye(*w.shape),
    "running sum": lambda w: 0.5 * jnp.cumsum(w, 0),
    "sorted rows": lambda w: jnp.sort(w, -1),
    "sorted columns": lambda w: jnp.sort(w, 0),
}


@_expression
def normalised(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    name = pool.draw.one(list(NORMS))
    return _one(f"{name} of {{}}", pool.kernel(m, n, depth), NORMS[name])


EXPRESSIONS.append(normalised)  # twice as often

# ------------------------------------------------------------------------------ layout of weights


@_expression
def reshaped(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    k = pool.draw.factor(n)
    shapes = [(m * n,), (n, m)] + ([(m, k, n // k), (k, m, n // k)] if k else [])
    shape = pool.draw.one(shapes)
    if k and shape == (k, m, n // k) and k != m:
        text = "moved axes of {}"
        return _one(text, pool.weight(*shape), lambda w: jnp.moveaxis(w, 0, 1).reshape(m, n))
    return _one(f"reshaped {shape} of {{}}", pool.weight(*shape), lambda w: w.reshape(m, n))


@_expression
def gathered(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """Rows or columns chosen by constants, by a parameter of integers, or by another's order."""
    how = pool.draw.one(["constants", "integers", "order", "reversed", "rolled"])
    along = pool.draw.one([0, 1])
    size = (m, n)[along]
    if how == "reversed":
        return _one(
            f"reversed {along} of {{}}", pool.kernel(m, n, depth), lambda w: jnp.flip(w, along)
        )
    if how == "rolled":
        return _one(
            f"rolled {along} of {{}}", pool.kernel(m, n, depth), lambda w: jnp.roll(w, 1, along)
        )
    if how == "constants":
        places = pool.draw.rng.permutation(size)
        return _one(
            f"taken {along} of {{}}", pool.kernel(m, n, depth), lambda w: jnp.take(w, places, along)
        )
    if how == "order":
        by = pool.add(pool.draw.rng.permutation(size) + 1.0)
        return _two(
            "taken of {} in the order of {}",
            pool.kernel(m, n, depth),
            by,
            lambda w, key: jnp.take(w, jnp.argsort(key), along),
        )
    rows = pool.draw.one([3, 5, size])
    shape = (rows, n) if along == 0 else (m, rows)
    by = pool.add(pool.draw.rng.integers(1, rows, size))
    table = pool.weight(*shape)
    return _two(f"rows {along} of {{}} at {{}}", table, by, lambda w, i: jnp.take(w, i, along))


@_expression
def circulant(pool: Pool, m: int, n: int, depth: int) -> Kernel:
    """One vector, at an offset of its own in each row."""
    places = (np.arange(m)[:, None] - np.arange(n)) % max(m, n)
    return _one("circulant of {}", pool.weight(max(m, n)), lambda w: w[places])


@_expression
def put_together(pool: Pool, m: int, n: int, depth: int) -> Kernel | None:
    """Two kernels side by side, or one below the other."""
    along = pool.draw.one([0, 1])
    size = (m, n)[along]
    at = pool.draw.one([1, size // 2, size - 1])
    if not 0 < at < size:
        return None
    first, second = ((at, n), (m - at, n)) if along == 0 else ((m, at), (m, n - at))
    a, b = (pool.kernel(rows, columns, depth) for rows, columns in (first, second))
    return _two(f"[{{}}, {{}}] along {along}", a, b, lambda x, y: jnp.concatenate([x, y], along))


# ------------------------------------------------------------------------------------ the layers


@layer()
def made_kernel(draw: Draw, shape: Shape) -> Layer:
    """Dense, with a kernel that is made of weights."""
    pool, width = Pool(draw), draw.width()
    kernel = pool.kernel(shape[-1], width)
    how, name = draw.one(["x @ w", "einsum"]), draw.one(list(ACTIVATIONS))

    def apply(p: Params, x: Any) -> Any:
        w = kernel.make(p)
        y = x @ w if how == "x @ w" else jnp.einsum("cd,...c->...d", w, x)
        return ACTIVATIONS[name](y)

    return Layer(f"made_kernel {kernel.text}, {name}", pool.params, apply, (*shape[:-1], width))


@layer(keeps=True)
def made_residual(draw: Draw, shape: Shape) -> Layer:
    """``x + x @ w`` with a square kernel that is made of weights: its two axes are one."""
    pool = Pool(draw)
    kernel = pool.kernel(shape[-1], shape[-1])
    how = draw.one(["x + x @ w", "x + x @ w", "x + act(x @ w)", "x @ w + x @ w.T"])
    name = draw.one(list(ACTIVATIONS))

    def apply(p: Params, x: Any) -> Any:
        w = kernel.make(p)
        if how == "x @ w + x @ w.T":
            return x @ w + x @ w.T
        y = x @ w
        return x + (ACTIVATIONS[name](y) if "act" in how else y)

    return Layer(f"made_residual {how}, w = {kernel.text}", pool.params, apply, shape)


@layer(keeps=True)
def made_form(draw: Draw, shape: Shape) -> Layer:
    """A form ``x w x^T``: over channels alone, or over tokens as an attention without values."""
    pool = Pool(draw)
    kernel, along = pool.kernel(shape[-1], shape[-1]), len(shape) == 3 and draw.maybe(0.7)

    def apply(p: Params, x: Any) -> Any:
        w = kernel.make(p)
        if along:
            return jax.nn.softmax(x @ w @ jnp.swapaxes(x, -1, -2)) @ x
        return x + 0.1 * ((x @ w) * x).sum(-1, keepdims=True)

    text = f"made_form {'over tokens' if along else 'of channels'}, w = {kernel.text}"
    return Layer(text, pool.params, apply, shape)


@layer(keeps=True)
def made_pair(draw: Draw, shape: Shape) -> Layer:
    """Two kernels of one pool, with an activation between them: they may share parameters."""
    pool, width, name = Pool(draw), draw.width(), draw.one(list(ACTIVATIONS))
    up, down = pool.kernel(shape[-1], width, 1), pool.kernel(width, shape[-1], 1)

    def apply(p: Params, x: Any) -> Any:
        return ACTIVATIONS[name](x @ up.make(p)) @ down.make(p)

    return Layer(f"made_pair {up.text} | {down.text}, {name}", pool.params, apply, shape)


@layer(keeps=True)
def made_vector(draw: Draw, shape: Shape) -> Layer:
    """A bias or a scale that other weights make."""
    pool, c = Pool(draw), shape[-1]
    kernel = pool.kernel(c, draw.one([2, 3, c]))
    how = draw.one(["sum", "max", "first column", "diagonal", "norm"])
    if how == "diagonal":
        kernel = pool.kernel(c, c)
    functions: dict[str, Any] = {
        "sum": lambda w: w.sum(-1),
        "max": lambda w: w.max(-1),
        "first column": lambda w: w[:, 0],
        "diagonal": jnp.diagonal,
        "norm": lambda w: jnp.sqrt((w * w).sum(-1) + 1e-2),
    }
    times = draw.maybe()

    def apply(p: Params, x: Any) -> Any:
        v = functions[how](kernel.make(p))
        return x * v if times else x + v

    text = f"made_vector {'scale' if times else 'bias'} by {how} of {kernel.text}"
    return Layer(text, pool.params, apply, shape)
