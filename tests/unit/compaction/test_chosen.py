"""What is chosen by value loses units when they count as not there: whole experts, codes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.models.zoo.common import drawn, floats
from tests.unit.test_experts import (
    DISPATCH,
    KEEP,
    SHAPES,
    E,
    H,
    K,
    W,
    model,
    one_hot,
    softmax_after,
)

ROUTER = "router:1"


def kept(fn, params, x, keep=None):
    """The compact model without some experts."""
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    masks = structure.masks({ROUTER: KEEP} if keep is None else keep)
    return jp.compact(fn, params, masks, x, semantics="kept")


def removed(fn, params, x, keep=KEEP):
    """The same by ``jp.experts``, which is compared with logits of minus infinity."""
    found = jp.experts.find(fn, params, x)
    rows = dict.fromkeys(found.layers, keep)
    assert found.check(params, rows, x) < 1e-5
    return found.remove(params, rows, x)


@pytest.mark.parametrize("name", DISPATCH)
def test_whole_experts_are_a_dimension(name):
    fn, params, x, top_k = model(name)
    dim = jp.infer_structure(fn, params, x, semantics="kept").dims[ROUTER]
    assert (dim.label, dim.size, dim.least, dim.frozen) == ("experts", E, top_k, None)
    paths = {"router", "up", "up_bias", "down"} | {"choice_bias"} & params.keys()
    assert {slot.path for slot in dim.slots} == paths
    small, wanted = kept(fn, params, x), removed(fn, params, x)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, wanted)
    assert small.sizes["experts"] == 4 and small.certificate.exact
    assert "among those that are left, as with logits of minus" in str(small.certificate)
    np.testing.assert_allclose(small.fn(small.params, x), fn(wanted, x), rtol=1e-5, atol=1e-6)
    assert small.certificate.check() < 1e-10
    slopes = [jax.grad(lambda p, f=f: (f(p, x) ** 2).sum())(wanted) for f in (small.fn, fn)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *slopes)


@pytest.mark.parametrize("name", DISPATCH)
def test_experts_go_twice(name):
    """What a compact program looks its choices up by is read again."""
    fn, params, x, _ = model(name)
    small = kept(fn, params, x)
    tiny = kept(small.fn, small.params, x, {ROUTER: np.array([True, True, False, True])})
    assert tiny.sizes["experts"] == 3 and tiny.params["down"].shape[0] == 3
    both = KEEP & (np.arange(E) != 3)
    wanted = fn(removed(fn, params, x, both), x)
    np.testing.assert_allclose(tiny.fn(tiny.params, x), wanted, rtol=1e-5, atol=1e-6)


def test_chosen_numbers_are_those_of_the_whole_program():
    def fn(p, x):
        values, chosen = jax.lax.top_k(x @ p["router"], K)
        gate = jnp.einsum("tk,tke->te", jax.nn.softmax(values), one_hot(p, chosen))
        return jnp.einsum("te,ted->td", gate, jnp.einsum("td,edf->tef", x, p["up"])), chosen

    params, x = drawn(**SHAPES), floats(9, W)
    small, wanted = (
        kept(fn, params, x),
        fn(
            {n: a[:, KEEP] if n == "router" else a[KEEP] for n, a in params.items() if n != "out"},
            x,
        ),
    )
    y, chosen = small.fn(small.params, x)
    np.testing.assert_allclose(y, wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chosen, np.flatnonzero(KEEP)[wanted[1]])


def test_what_travels_with_a_compact_mixture(tmp_path):
    fn, params, x, _ = model("ragged")
    small = kept(fn, params, x)
    jp.save(small, tmp_path)
    again = jp.load(tmp_path, fn, params, x)
    np.testing.assert_array_equal(again.fn(again.params, x), small.fn(small.params, x))
    loss = small.cut(lambda p, x: (fn(p, x) ** 2).mean(), x)
    np.testing.assert_allclose(loss(small.params, x), (small.fn(small.params, x) ** 2).mean(), 1e-5)
    assert small.restrict(params)["router"].shape == (W, 4)
    back = small.expand(small.params)
    np.testing.assert_array_equal(back["up"][KEEP], params["up"][KEEP])
    assert not back["up"][~KEEP].any()
    assert small.fn(small.params, floats(5, W)).shape == (5, 3)  # other lengths


def test_masked_experts_stay():
    fn, params, x, _ = model("gathered weights, softmax before")
    free = jp.infer_structure(fn, params, x, semantics="kept")
    with pytest.raises(
        ValueError,
        match=r"top_k .* masked units could still be chosen there, "
        r'so call .* with semantics="kept", .* or jp.experts.find',
    ):
        jp.infer_structure(fn, params, x).masks({ROUTER: KEEP})  # fmt: skip
    masks = free.masks({ROUTER: KEEP})
    whole = jp.compact(fn, params, masks, x)
    assert whole.params["up"].shape[0] == E and not whole.certificate.exact
    assert "masked units could still be chosen there" in str(whole.certificate)
    np.testing.assert_allclose(
        whole.fn(whole.params, x), fn(jp.apply_masks(params, masks), x), rtol=1e-5, atol=1e-6
    )


def test_patterns_leave_as_many_as_are_chosen():
    fn, params, x, _ = model("ragged")
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    masks = jp.structured(structure, dims="experts")(jp.magnitude(params), 0.95)
    assert masks["router"].sum() == K


def test_search_cuts_experts():
    fn, params, x, _ = model("one-hot, softmax after")
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    search = jp.Search(fn, params, structure, jp.magnitude(params), x, dims=["experts"],
                       round_to=1, device="h100", progress=False)  # fmt: skip
    plan = search.plan(jp.Target(params=0.6))
    assert K <= plan.masks["router"].sum() < E
    small = jp.compact(fn, params, plan.masks, x, semantics="kept")
    assert small.sizes["experts"] == plan.masks["router"].sum()
    with pytest.raises(ValueError, match="at their least it would be params=0.35"):
        search.plan(jp.Target(params=0.3))


ASKED = {
    "pareto": lambda search, fn, x: search.pareto([2.0], metric=lambda p: 1.0),
    "finetune": lambda search, fn, x: search.pareto([2.0], finetune=lambda p, masks: p),
    "to_metric": lambda search, fn, x: search.to_metric(lambda p: 1.0, floor=0.5),
    "in_rounds": lambda search, fn, x: jp.recovery.in_rounds(
        search, lambda p, x: fn(p, x).sum(), [(x,)] * 4, [jp.Target(params=0.5)]
    ),
}


@pytest.mark.parametrize("call", ASKED)
def test_masked_params_are_no_judge_of_experts(call):
    fn, params, x, _ = model("one-hot, softmax after")
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    search = jp.Search(
        fn, params, structure, jp.magnitude(params), x, round_to=1, device="h100", progress=False
    )
    with pytest.raises(
        ValueError, match="sees masked params, in which masked units of 'router:1' are still chosen"
    ):
        ASKED[call](search, fn, x)


ONE = np.arange(E) == 0


def test_fewer_than_are_chosen():
    fn, params, x, _ = model("ragged")
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    with pytest.raises(ValueError, match="keeps 1 of 6 units, and 2 are chosen at a time"):
        structure.masks({ROUTER: ONE})
    with pytest.raises(ValueError, match=r"leave 1 of 6 units of 'router:1', and top_k at .* "
                       "chooses 2 of them; keep at least so many"):  # fmt: skip
        jp.compact(fn, params, structure.masks_of({ROUTER: ONE}), x, semantics="kept")


def grouped(p, x):
    """Experts in three groups of two, of which a token may use two; three experts of these."""
    scores = jax.nn.sigmoid(x @ p["router"])
    groups = scores.reshape(len(x), 3, -1)
    used = one_hot({"router": jnp.zeros((1, 3))}, jax.lax.top_k(groups.sum(-1), 2)[1]).sum(1)
    allowed = (groups * used[..., None]).reshape(scores.shape)
    gates, chosen = jax.lax.top_k(allowed, 3)
    y = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])
    return jnp.einsum("tk,tkf->tf", gates, y)


def test_fewer_than_are_chosen_of_a_product():
    params, x = drawn(**{n: SHAPES[n] for n in ("router", "up")}), floats(9, W)
    structure = jp.infer_structure(grouped, params, x, semantics="kept")
    labels = {d.label: (d.size, d.least) for d in structure.dims.values() if not d.frozen}
    assert labels["groups of experts"] == (3, 2) and labels["experts per group"] == (2, 1)
    keep = {"router:1.0": np.arange(3) < 2, "router:1.1": np.arange(2) < 1}
    with pytest.raises(ValueError, match="chooses 3 of 6 units, and the masks leave 2: keep"):
        jp.compact(grouped, params, structure.masks(keep), x, semantics="kept")


def by_all_sorted(p, x):
    chosen = jnp.argsort(-(x @ p["router"]))[:, :K]
    return jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])


def by_shifted(p, x):
    chosen = jax.lax.top_k(x @ p["router"], K)[1]
    return jnp.einsum("td,tkdf->tkf", x, p["up"][(chosen + 1) % E])


def by_approximation(p, x):
    chosen = jax.lax.approx_max_k(x @ p["router"], K)[1]
    return jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])


def of_equal_groups(p, x):
    """A capacity for each expert, whatever was chosen: rows of a removed one would be another's."""
    gates = jax.lax.top_k(x @ p["router"], K)[0]
    sizes = jnp.full(E, 2, jnp.int32)
    return gates.sum() * jax.lax.ragged_dot(jnp.tile(x, (2, 1))[: 2 * E], p["up"], sizes)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [(by_all_sorted, "gather .*indexed"), (by_shifted, "gather .*indexed"),
     (by_approximation, "approx_top_k .*sorted by value"), (of_equal_groups, "groups of rows")],
)  # fmt: skip
def test_what_is_no_plain_choice_stays_frozen(fn, reason):
    params, x = drawn(**{n: SHAPES[n] for n in ("router", "up")}), floats(9, W)
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    blocked = [d.frozen or "" for d in structure.dims.values() if d.size == E]
    assert all(blocked[-1:]) and any(re.search(reason, text) for text in blocked), blocked


def test_codes_of_a_codebook():
    """The nearest code; what is not there is not the nearest."""

    def fn(p, x):
        h = x @ p["in"]
        far = jnp.sum((h[:, None] - p["codes"]) ** 2, -1)
        return p["codes"][jnp.argmin(far, -1)] @ p["out"]

    params, x = drawn(**{"in": (W, 4), "codes": (7, 4), "out": (4, 3)}), floats(9, W)
    keep = np.arange(7) % 2 == 0
    small = kept(fn, params, x, {"codes:0": keep})
    wanted = fn(params | {"codes": params["codes"][keep]}, x)
    np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5, atol=1e-6)


def test_semantics_have_names():
    with pytest.raises(ValueError, match='semantics is \'gone\'; wanted "masked" or "kept"'):
        jp.infer_structure(softmax_after, drawn(**SHAPES), floats(9, W), semantics="gone")


@pytest.mark.parametrize("name", ["gathered weights, softmax before", "ragged"])
def test_hidden_units_are_called_so(name):
    fn, params, x, _ = model(name)
    structure = jp.infer_structure(fn, params, x, semantics="kept")
    assert [d.size for d in structure.dims.values() if d.label.endswith("hidden")] == [H]
