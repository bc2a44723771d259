"""Orders of units under each unit of a parent: what passes them on, and each way not to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("x64")

N, K = 6, 4  # units of the parent, and units under each of them
X = np.random.default_rng(1).normal(size=(5, 3))


def random_params(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


SHAPES = {"w": (3, N), "a": (N, K), "b": (K, N), "m": (N, N), "c": (N, 2)}


def reader(make):
    """A network whose residual width is the parent; ``make`` gives its (N, N) kernel."""

    def fn(p, x):
        h = x @ p["w"]
        return (h + h @ make(p)) @ p["c"]

    return fn


def scanned(p, x):
    """The product is taken in a loop that runs along something else."""
    h, _ = jax.lax.scan(lambda h, _: (h + jnp.tanh(h @ (p["a"] @ p["b"])), None), x @ p["w"], None,
                        length=2)  # fmt: skip
    return h @ p["c"]


def over_parent(p, x):
    """A loop runs along the parent, and its body reads the other units of the parent, too."""

    def body(total, row):
        return total + row @ p["a"].T, None

    total, _ = jax.lax.scan(body, jnp.zeros(N), p["a"])
    return (x @ p["w"] * total) @ p["c"]


def chosen(p, x):
    make = lambda p: jax.lax.cond(  # noqa: E731
        x.sum() > 0, lambda: p["a"] @ p["b"], lambda: p["a"] @ p["a"].T
    )
    return reader(make)(p, x)


def remade(p, x):
    return jax.checkpoint(reader(lambda p: p["a"] @ p["b"]))(p, x)


def rows_of_a_loop(p, x):
    """Units are stacked by a loop that runs along them: each step changes what the next gets."""
    _, made = jax.lax.scan(lambda c, row: (jnp.sin(c + row.sum()), c * row), 1.0, p["a"].T)
    return reader(lambda q: made.T @ q["b"])(p, x)


@jax.custom_jvp
def product(a, b):
    return a @ b


product.defjvp(lambda xs, ts: (product(*xs), 2 * ts[0] @ xs[1] + xs[0] @ ts[1]))


@jax.custom_vjp
def pulled(a, b):
    return (a * b.T).sum(1)


pulled.defvjp(
    lambda a, b: (pulled(a, b), (a, b)),
    lambda saved, g: (g[:, None] * (saved[0] @ saved[1]) @ saved[0], saved[1] * g),
)

PROGRAMS = {
    "a b": reader(lambda p: p["a"] @ p["b"]),
    "a a^T": reader(lambda p: p["a"] @ p["a"].T),
    "b^T a^T": reader(lambda p: p["b"].T @ p["a"].T),
    "m a b": reader(lambda p: p["m"] @ p["a"] @ p["b"]),
    "a b m": reader(lambda p: p["a"] @ (p["b"] @ p["m"])),
    "m + a b": reader(lambda p: p["m"] * 0.1 + p["a"] @ p["b"]),
    "cosines": reader(lambda p: jnp.tanh(p["a"]) @ jnp.cos(p["b"])),
    "outer sums": reader(lambda p: (p["a"][:, None] * p["a"][None]).sum(-1)),
    "outer sums of two": reader(lambda p: (p["a"][:, None] + p["b"].T[None]).max(-1)),
    "normalised": reader(lambda p: jax.nn.softmax(p["a"], 1) @ p["b"]),
    "mask of parameters": reader(lambda p: jnp.where(p["a"] > 0, p["a"], 0.5) @ p["b"]),
    "gathered": reader(lambda p: p["a"][jnp.argsort(p["w"][0])] @ p["b"]),
    "rolled parent": reader(lambda p: jnp.roll(p["a"], 1, 0) @ p["b"]),
    "shifted parent": reader(
        lambda p: (p["a"] + jax.lax.pad(p["a"], 0.0, [(1, -1, 0), (0, 0, 0)])) @ p["b"]
    ),
    "reversed parent": reader(lambda p: (p["a"] * p["a"][::-1]).sum(1) * p["m"]),
    "row by row": reader(lambda p: jax.vmap(lambda row: row @ p["b"])(p["a"])),
    "sums of rows": reader(lambda p: p["a"].sum(1, keepdims=True) * p["b"].sum(0)),
    "aligned": reader(lambda p: (p["a"] * p["b"].T).sum(1) * p["m"]),
    "inputs meet": lambda p, x: jnp.cos(x @ p["w"] @ p["a"]) @ p["b"] @ p["c"],
    "in a scan": scanned,
    "along the parent": over_parent,
    "in a branch": chosen,
    "rematerialised": remade,
    "stacked by a loop": rows_of_a_loop,
    "custom derivative": reader(lambda p: product(p["a"], p["b"])),
    "custom gradient": reader(lambda p: pulled(p["a"], p["b"]) * p["m"]),
    "the next parent's units": reader(lambda p: (p["a"] + jnp.roll(p["a"], 1, 0)) @ p["b"]),
    "regrouped": reader(lambda p: p["a"].reshape(3, 8).reshape(N, K) @ p["b"]),
    "regrouped another way": reader(
        lambda p: (
            (p["a"].reshape(2, 3, K) + p["a"].reshape(3, 2, K).swapaxes(0, 1)).reshape(N, K)
            @ p["b"]
        )
    ),
}


def mask_of(kind, shape, rng):
    """Masks that keep equally many in each row, at other places."""
    if kind == "none":
        return np.ones(shape, bool)
    if kind == "unstructured":
        return rng.random(shape) < 0.6
    kept = np.zeros(shape, bool)
    for row in kept:
        row[rng.permutation(shape[1])[: max(1, shape[1] // 2)]] = True
    return kept


def masks_of(params, seed):
    rng = np.random.default_rng(seed)
    kinds = ["none", "unstructured", "rows", "columns"]
    masks = {}
    for name, leaf in params.items():
        kind = "rows" if name == "a" else kinds[rng.integers(4)]
        turned = mask_of("rows", leaf.shape[::-1], rng).T
        masks[name] = turned if kind == "columns" else mask_of(kind, leaf.shape, rng)
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_equal_to_the_masked_model_in_value_and_gradient(name, seed):
    fn, params = PROGRAMS[name], random_params(seed % 97, **SHAPES)
    masks = masks_of(params, seed)
    small = jp.compact(fn, params, masks, X)
    masked = jp.apply_masks(params, masks)
    np.testing.assert_allclose(small.fn(small.params, X), fn(masked, X), rtol=1e-9, atol=1e-9)
    gradient = lambda f, p: jax.grad(lambda p: jnp.sum(jnp.sin(f(p, X))))(p)  # noqa: E731
    wanted, got = small.restrict(gradient(fn, masked)), gradient(small.fn, small.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), got, wanted)
    again = small.restrict(small.expand(small.params))
    jax.tree.map(np.testing.assert_array_equal, again, small.params)


# The parent's units stand side by side in "b" of these, and each has its own K units below it.
OWN = {"up": (N, 3, K), "b": (N, K), "down": (N, K, 2)}


def own(p, x):
    """The parent's units are told apart, so that it has no order of its own under the others."""
    hidden = jnp.tanh(jnp.einsum("bi,nik->nbk", x, p["up"]) + p["b"][:, None])
    return jnp.einsum("nbk,nko->nbo", hidden, p["down"]).cumsum(0).sum(0)


def kept_rows(seed, counts):
    rng = np.random.default_rng(seed)
    kept = np.zeros((len(counts), K), bool)
    for row, count in zip(kept, counts, strict=True):
        row[rng.permutation(K)[:count]] = True
    return kept


def whole_units(kept):
    return {"up": kept[:, None], "b": kept, "down": kept[..., None]}


def violating(how):
    """``own`` with one condition of the theorem broken."""

    def fn(p, x):
        p = dict(p, up=how(p["up"]))
        return own(p, x)

    return fn


VIOLATIONS = {
    "a code for each position": violating(lambda up: up * jnp.arange(1.0, K + 1)),
    "a constant at each place": violating(lambda up: up * np.arange(24.0).reshape(N, 1, K)),
    "a sum along the units": violating(lambda up: jnp.cumsum(up, -1)),
    "sorted": violating(lambda up: jnp.sort(up, -1)),
    "units of all parents added": violating(lambda up: up + up.sum(0, keepdims=True)),
    "shifted within its size": violating(
        lambda up: up + jax.lax.pad(up, 0.0, [(-1, 1, 0), (0, 0, 0), (0, 0, 0)])
    ),
    "the parent meets itself": violating(
        lambda up: up + jnp.einsum("nik,mik->nm", up, up).sum(1)[:, None, None]
    ),
    "a loop along the units": violating(
        lambda up: jnp.moveaxis(
            jax.lax.scan(lambda c, u: (c + u.sum(), u + c), 0.0, jnp.moveaxis(up, -1, 0))[1], 0, -1
        )
    ),
    "carried from parent to parent": violating(
        lambda up: jax.lax.scan(lambda c, u: (c + u, c + u), jnp.zeros((3, K)), up)[1]
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VIOLATIONS)
def test_each_violation_is_refused_by_name_and_stays_equal(name):
    params, masks = random_params(3, **OWN), whole_units(kept_rows(5, [2] * N))
    small = jp.compact(VIOLATIONS[name], params, masks, X)
    assert small.certificate.check() < 1e-12
    assert not small.certificate.exact
    assert "its units differ under " in str(small.certificate)
    assert " tells them apart" in str(small.certificate)


@pytest.mark.slow
def test_units_under_each_parent_go_where_all_conditions_hold():
    params, kept = random_params(3, **OWN), kept_rows(5, [2] * N)
    small = jp.compact(own, params, whole_units(kept), X)
    assert small.params["up"].shape == (N, 3, 2)
    assert small.certificate.exact and small.certificate.check() < 1e-12


@pytest.mark.slow
def test_unequal_counts_are_named():
    params, kept = random_params(3, **OWN), kept_rows(5, [2, 1, 2, 2, 3, 2])
    small = jp.compact(own, params, whole_units(kept), X)
    assert small.params["up"].shape == (N, 3, 3)
    assert small.certificate.check() < 1e-12
    assert not small.certificate.exact
    assert "between 1 and 3 units are masked under each of" in str(small.certificate)


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_expand_puts_units_where_they_were(seed, data):
    """Laws: restrict undoes expand bitwise; expand shows the masked params at their own places."""
    counts = data.draw(st.lists(st.integers(1, K), min_size=N, max_size=N))
    params, kept = random_params(seed, **OWN), kept_rows(seed, counts)
    small = jp.compact(own, params, whole_units(kept), X)
    full = small.expand(small.params)
    masked = jp.apply_masks(params, whole_units(kept))
    jax.tree.map(np.testing.assert_array_equal, full, masked)
    jax.tree.map(np.testing.assert_array_equal, small.restrict(full), small.params)


def test_a_leaf_without_removed_units_is_the_users_own():
    """An order exists, but the values at removed units count, so that nothing goes."""
    params = random_params(0, w=(5, 8), o=(8, 3))
    fn = lambda p, x: jnp.cos((x @ p["w"]).reshape(-1, 2, 4)).reshape(-1, 8) @ p["o"]  # noqa: E731
    kept = np.ones((5, 8), bool)
    kept[:, [1, 6]] = False
    x = np.random.default_rng(2).normal(size=(4, 5))
    small = jp.compact(fn, params, {"w": kept, "o": True}, x)
    full = small.expand(small.params)
    np.testing.assert_array_equal(full["w"], np.where(kept, params["w"], 0))
    np.testing.assert_array_equal(full["o"], params["o"])
    np.testing.assert_allclose(
        small.fn(small.params, x), fn({"w": full["w"], "o": params["o"]}, x), rtol=1e-12
    )


@pytest.mark.slow
def test_of_two_orders_the_one_that_brings_something_is_taken():
    """Channel 1 of head 0 and channel 2 of head 1 go; channels have no order of heads to lose."""
    params = random_params(0, w=(5, 8), o=(8, 3))
    fn = lambda p, x: jnp.tanh((x @ p["w"]).reshape(-1, 2, 4)).reshape(-1, 8) @ p["o"]  # noqa: E731
    kept = np.ones((5, 8), bool)
    kept[:, [1, 6]] = False
    x = np.random.default_rng(2).normal(size=(4, 5))
    small = jp.compact(fn, params, {"w": kept, "o": True}, x)
    assert small.params["w"].shape == (5, 6)
    assert small.certificate.exact and small.certificate.check() < 1e-12


def test_a_unit_masked_under_each_parent_goes_first():
    params, kept = random_params(3, **OWN), np.ones((N, K), bool)
    kept[:, 0] = False
    kept[2, 1:3] = False
    small = jp.compact(own, params, whole_units(kept), X)
    assert small.params["up"].shape == (N, 3, K - 1)
    np.testing.assert_array_equal(small.keep["up:2"], np.arange(K) > 0)
    assert "between 1 and 3 units are masked under each of" in str(small.certificate)
