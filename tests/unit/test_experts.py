"""Whole experts: found in several dispatches, removed, and equal to a network that avoids them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.zoo import mixture
from tests.models.zoo.common import drawn, floats

E, W, H, K = 6, 5, 7, 2
SHAPES = {"router": (W, E), "up": (E, W, H), "up_bias": (E, H), "down": (E, H, W), "out": (W, 3)}


def hidden(p, x):
    return jax.nn.gelu(jnp.einsum("td,edf->tef", x, p["up"]) + p["up_bias"])


def one_hot(p, chosen):
    return jax.nn.one_hot(chosen, p["router"].shape[-1])


def softmax_before(p, x):
    """Gates of the softmax over all experts, not renormalised."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    h = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen]) + p["up_bias"][chosen]
    return jnp.einsum("tk,tkf,tkfd->td", gates, jax.nn.gelu(h), p["down"][chosen])


def softmax_after(p, x):
    """One-hot vectors; the softmax is over the chosen ones."""
    values, chosen = jax.lax.top_k(x @ p["router"], K)
    gate = jnp.einsum("tk,tke->te", jax.nn.softmax(values), one_hot(p, chosen))
    return jnp.einsum("tef,efd,te->td", hidden(p, x), p["down"], gate)


def sigmoid_with_bias(p, x):
    """A bias that takes part in the choice alone, and a shared expert."""
    scores = jax.nn.sigmoid(x @ p["router"])
    chosen = jax.lax.top_k(scores + p["choice_bias"], K)[1]
    gates = jnp.take_along_axis(scores, chosen, -1)
    gate = jnp.einsum("tk,tke->te", gates / gates.sum(-1, keepdims=True), one_hot(p, chosen))
    y = jnp.einsum("tef,efd,te->td", hidden(p, x), p["down"], gate)
    return y + jax.nn.silu(x @ p["shared"]) @ p["shared_down"]


def ragged(p, x):
    """Rows sorted by expert, two for each token."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    gates, flat = gates / gates.sum(-1, keepdims=True), chosen.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=p["router"].shape[-1]).astype(jnp.int32)
    h = jax.lax.ragged_dot(x[order // K], p["up"], sizes) + p["up_bias"][flat[order]]
    y = jax.lax.ragged_dot(jax.nn.gelu(h), p["down"], sizes)[jnp.argsort(order)]
    return jnp.einsum("tk,tkd->td", gates, y.reshape(-1, K, W))


def argmax(p, x):
    shares = jax.nn.softmax(x @ p["router"])
    gate = one_hot(p, jnp.argmax(shares, -1)) * shares
    return jnp.einsum("tef,efd,te->td", hidden(p, x), p["down"], gate)


MORE = {"choice_bias": (E,), "shared": (W, 4), "shared_down": (4, W)}
DISPATCH = {
    "gathered weights, softmax before": (softmax_before, {}, K),
    "one-hot, softmax after": (softmax_after, {}, K),
    "sigmoid, bias of the choice, shared expert": (sigmoid_with_bias, MORE, K),
    "ragged": (ragged, {}, K),
    "argmax": (argmax, {}, 1),
}


def model(name):
    moe, more, top_k = DISPATCH[name]
    fn = lambda p, x: (x + moe(p, x)) @ p["out"]  # noqa: E731
    return fn, drawn(**SHAPES, **more), floats(9, W), top_k


KEEP = np.array([True, False, True, True, False, True])


@pytest.mark.parametrize("name", DISPATCH)
def test_experts_are_found_and_removed(name):
    fn, params, x, top_k = model(name)
    found = jp.experts.find(fn, params, x)
    (layer,) = found.layers.values()
    routers = ["router:1"] + ["choice_bias:0"] * ("choice_bias" in params)
    assert (layer.count, layer.top_k) == (E, top_k)
    assert sorted(f"{s.path}:{s.axis}" for s in layer.routers) == sorted(routers)
    assert sorted(s.path for s in layer.slots) == ["down", "up", "up_bias"]
    keep = {layer.name: KEEP}
    small = found.remove(params, keep, x)
    assert small["router"].shape == (W, 4) and small["down"].shape == (4, H, W)
    assert found.check(params, keep, x) < 1e-5
    assert not np.allclose(fn(small, x), fn(params, x), rtol=1e-2)  # the removed ones did matter
    again = jp.experts.find(fn, small, x)
    assert again.layers[layer.name].count == 4


@pytest.mark.parametrize("name", DISPATCH)
def test_a_compact_model_without_experts(name):
    fn, params, x, _ = model(name)
    found = jp.experts.find(fn, params, x)
    keep = dict.fromkeys(found.layers, KEEP)
    small = found.compact(params, keep, x)
    assert small.sizes["experts"] == 4 and small.certificate.semantics == "kept"
    wanted = fn(found.remove(params, keep, x), x)
    np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5, atol=1e-6)


def test_compact_follows_a_number_in_the_code():
    params, x = drawn(**SHAPES), floats(9, W)
    small = jp.experts.find(fixed, params, x).compact(params, {"router": KEEP}, x)
    wanted = unfixed({n: a[:, KEEP] if n == "router" else a[KEEP]
                      for n, a in params.items() if n != "out"}, x)  # fmt: skip
    np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5, atol=1e-6)


def test_a_masked_expert_is_no_removed_one():
    """The reason why this is no masking: a router column of zeros is still chosen."""
    fn, params, x, _ = model("one-hot, softmax after")
    found = jp.experts.find(fn, params, x)
    masked = {n: leaf if n == "out" else jnp.where(
        KEEP.reshape((1, E) if n == "router" else (E, *(1,) * (leaf.ndim - 1))), leaf, 0)
        for n, leaf in params.items()}  # fmt: skip
    small = found.remove(params, {"router": KEEP}, x)
    assert not np.allclose(fn(masked, x), fn(small, x), rtol=1e-2)


def scanned():
    shapes = {n: (3, *s) for n, s in SHAPES.items() if n != "out"}
    params = {"layers": drawn(**shapes), **drawn(out=(W, 3))}

    def fn(p, x):
        layer = lambda x, p: (x + softmax_after(p, x), None)  # noqa: E731
        return jax.lax.scan(layer, x, p["layers"])[0] @ p["out"]

    return fn, params, floats(9, W)


def test_layers_of_a_scan_lose_experts_together_or_each_its_own():
    fn, params, x = scanned()
    found = jp.experts.find(fn, params, x)
    (name,) = found.layers
    assert name == "layers/router" and found.check(params, {name: KEEP}, x) < 1e-5
    rows = np.stack([KEEP, np.roll(KEEP, 1), ~np.isin(np.arange(E), [0, 1])])
    small = found.remove(params, {name: rows}, x)
    y = x
    compact = found.compact(params, {name: rows}, x)
    np.testing.assert_allclose(compact.fn(compact.params, x), fn(small, x), rtol=2e-4, atol=1e-4)
    for k in range(3):
        p = {n: leaf[k] for n, leaf in params["layers"].items()}
        kept = np.flatnonzero(rows[k])
        one = {n: leaf[:, kept] if n == "router" else leaf[kept] for n, leaf in p.items()}
        y = y + softmax_after(one, y)
    np.testing.assert_allclose(fn(small, x), y @ params["out"], rtol=2e-4, atol=1e-4)


def test_scores_of_entries_become_those_of_experts():
    fn, params, x, _ = model("ragged")
    found = jp.experts.find(fn, params, x)
    squares = jax.tree.map(jnp.square, params)
    wanted = sum(np.asarray(squares[n]).reshape(E, -1).sum(1) for n in ("up", "up_bias", "down"))
    np.testing.assert_allclose(found.scores(squares)["router"], wanted, rtol=1e-5)


def test_hidden_units_go_within_all_experts():
    fn, params, x, _ = model("ragged")
    structure = jp.infer_structure(fn, params, x)
    (name,) = (n for n, d in structure.dims.items() if d.size == H)
    masks = structure.masks({name: np.arange(H) < 4})
    small = jp.compact(fn, params, masks, x)
    assert small.params["up"].shape == (E, W, 4)
    masked = fn(jp.apply_masks(params, masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), masked, rtol=1e-4, atol=1e-5)


def unfixed(p, x):
    values, chosen = jax.lax.top_k(x @ p["router"], K)
    gate = jnp.einsum("tk,tke->te", values, one_hot(p, chosen))
    return jnp.einsum("tef,efd,te->td", hidden(p, x), p["down"], gate)


def fixed(p, x):
    values, chosen = jax.lax.top_k(x @ p["router"], K)
    gate = jnp.einsum("tk,tke->te", values, jax.nn.one_hot(chosen, E))
    return jnp.einsum("tef,efd,te->td", hidden(p, x), p["down"], gate)


def remove(fn, keep, name="router"):
    params, x = drawn(**SHAPES), floats(9, W)
    return jp.experts.find(fn, params, x).remove(params, {name: keep}, x)


ONE = np.arange(E) == 0
BAD = {
    "none": (
        lambda: jp.experts.find(lambda p, x: x @ p["out"], drawn(**SHAPES), floats(9, W)),
        "the program chooses no experts: wanted top_k",
    ),
    "name": (
        lambda: remove(ragged, KEEP, "moe"),
        r"no layer of experts is named 'moe'; there are \['router'\]",
    ),
    "numbers": (lambda: remove(ragged, KEEP * 1), r"is int64\(6,\); wanted 6 booleans"),
    "shape": (lambda: remove(ragged, KEEP[:4]), r"is bool\(4,\); wanted 6 booleans"),
    "too few": (
        lambda: remove(ragged, ONE),
        "keeps 1 to 1 of 6 experts, and each token chooses 2; keep at least so many",
    ),
    "unequal": (lambda: remove(ragged, np.stack([KEEP, KEEP | ONE[::-1], KEEP | True])), "keeps 4"),
    "rows": (
        lambda: remove(ragged, np.stack([KEEP, KEEP])),
        "keep has 2 rows for a leaf of shape .*a row for each layer of the scan",
    ),
    "a number in the code": (
        lambda: remove(fixed, KEEP),
        r"(?s)doesn't follow the number of experts .*from a shape: params\[\"router\"\]",
    ),
}


@pytest.mark.parametrize(("call", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_what_compact_refuses():
    def shifted(p, x):
        gates, chosen = jax.lax.top_k(x @ p["router"], K)
        h = jax.nn.gelu(jnp.einsum("td,tkdf->tkf", x, p["up"][(chosen + 1) % E]))
        return jnp.einsum("tk,tkf,tkfd->td", gates, h, p["down"][chosen])

    params, x = drawn(**SHAPES), floats(9, W)
    found = jp.experts.find(shifted, params, x)
    with pytest.raises(
        ValueError,
        match=r"(?s)these experts can't be removed by compact: .*indexed"
        r".*found.remove\(params, keep, \*args\)",
    ):
        found.compact(params, {"router": KEEP}, x)


def test_the_results_must_keep_their_shapes():
    fn = lambda p, x: (softmax_after(p, x), x @ p["router"])  # noqa: E731
    with pytest.raises(ValueError, match="with fewer experts the function's results have other"):
        remove(fn, KEEP)


def test_layers_that_differ_are_not_checked():
    fn, params, x = scanned()
    found = jp.experts.find(fn, params, x)
    with pytest.raises(ValueError, match="check wants one row of booleans for each layer"):
        found.check(params, {"layers/router": np.stack([KEEP] * 3)}, x)


def test_mixtures_of_the_zoo_are_found():
    for name in ("top_k_routing", "top_k_by_gathered_weights", "capacity_dispatch"):
        fn, params, args = getattr(mixture, name)()
        assert "router" in jp.experts.find(fn, params, *args).layers
