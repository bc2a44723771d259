"""Every score against its formula in numpy, entry by entry, and the laws that it obeys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

RNG = np.random.default_rng(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def lamp(w):
    """Counts up, for each entry, all that is larger, or equal and not later."""
    x, out = w.ravel().astype(np.float64), np.zeros(w.size)
    for i in range(x.size):
        above = [x[j] ** 2 for j in range(x.size) if (abs(x[j]), -j) >= (abs(x[i]), -i)]
        out[i] = x[i] ** 2 / sum(above) if sum(above) else 0
    return out.reshape(w.shape)


def fpgm(w):
    filters = w.reshape(-1, w.shape[-1]).T
    each = [sum(np.sqrt(((a - b) ** 2).sum()) for b in filters) for a in filters]
    return np.broadcast_to(each, w.shape)


def woodfisher(w, grads, block, damping):
    """Inverts each damped block, one at a time."""
    x, g = w.ravel(), grads.reshape(len(grads), -1)
    floor = damping * (g**2).mean()
    out = []
    for start in range(0, x.size, block):
        part = g[:, start : start + block]
        fisher = sum(np.outer(v, v) for v in part) / len(part)
        inverse = np.linalg.inv(fisher + floor * np.eye(part.shape[1]))
        out += list(x[start : start + block] ** 2 / (2 * np.diag(inverse)))
    return np.reshape(out, w.shape)


W, G = RNG.normal(size=(2, 5, 6))
GRADS = RNG.normal(size=(4, 5, 6))
NORMS, OUT = np.abs(RNG.normal(size=5)), np.abs(RNG.normal(size=6))
FORMULAS = {
    "magnitude": (jp.magnitude, {}, np.abs(W)),
    "l2": (jp.scores.l2, {}, W**2),
    "rms_normalized": (jp.scores.rms_normalized, {}, np.abs(W) / np.sqrt((W**2).mean())),
    "lamp": (jp.scores.lamp, {}, lamp(W)),
    "smallest": (jp.scores.smallest, {}, 1 / np.abs(W)),
    "inverted": (jp.scores.inverted(jp.scores.l2), {}, -(W**2)),
    "saliency": (jp.saliency, {"grad": G}, np.abs(W * G)),
    "snip": (jp.scores.snip, {"grad": G}, np.abs(W * G) / np.abs(W * G).sum()),
    "taylor": (jp.scores.taylor, {"grad": G}, W * G),
    "movement": (jp.scores.movement, {"grad": G}, -W * G),
    "movement, summed": (jp.scores.movement, {"grad": G, "previous": W}, W - W * G),
    "grasp": (jp.scores.grasp, {"hvp": G}, W * G),
    "obd": (jp.scores.obd, {"hessian": G}, G * W**2 / 2),
    "fisher": (jp.scores.fisher, {"fisher": G**2}, G**2 * W**2 / 2),
    "adam_fisher": (jp.scores.adam_fisher, {"nu": G**2}, G**2 * W**2 / 2),
    "wanda": (jp.scores.wanda, {"input_norms": NORMS}, np.abs(W) * NORMS[:, None]),
    "wanda, rank 2": (jp.scores.wanda, {"input_norms": OUT[None]}, np.abs(W) * OUT),
    "apoz": (jp.scores.apoz, {"zeros": OUT}, np.broadcast_to(1 - OUT, W.shape)),
    "mean_activation": (
        jp.scores.mean_activation,
        {"means": OUT},
        np.broadcast_to(OUT, W.shape),
    ),
    "fpgm": (jp.scores.fpgm, {}, fpgm(W)),
    "woodfisher": (jp.scores.woodfisher, {"grads": GRADS}, woodfisher(W, GRADS, 30, 1e-3)),
    "woodfisher, ragged blocks": (
        functools.partial(jp.scores.woodfisher, block=7, damping=0.1),
        {"grads": GRADS},
        woodfisher(W, GRADS, 7, 0.1),
    ),
}


@functools.cache
def by_formula():
    """All of them in one program, which compiles once."""

    @jit
    def every(w, evidence):
        return {
            name: score({"w": w}, **{k: {"w": v} for k, v in evidence[name].items()})["w"]
            for name, (score, _, _) in FORMULAS.items()
        }

    return every(W, {name: evidence for name, (_, evidence, _) in FORMULAS.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    np.testing.assert_allclose(by_formula()[name], FORMULAS[name][2], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4, 5), (), (0, 3)])
def test_shapes_other_than_matrices(shape):
    w = np.asarray(RNG.normal(size=shape))
    grads = RNG.normal(size=(3, *shape))
    norms = np.arange(1.0, 1 + shape[-2]) if w.ndim > 1 else None

    @jit
    def some(w, grads):
        params = {"w": w}
        blocks = jp.scores.woodfisher(params, grads={"w": grads}, block=4)
        by_input = jp.scores.wanda(params, input_norms={"w": norms})
        return {
            "lamp": jp.scores.lamp(params)["w"],
            "fpgm": jp.scores.fpgm(params)["w"],
            "woodfisher": blocks["w"],
            "wanda": by_input["w"],
        }

    got = some(w, grads)
    assert all(score.shape == shape for score in got.values())
    np.testing.assert_allclose(got["lamp"], lamp(w), rtol=1e-4)
    if w.size:
        np.testing.assert_allclose(got["woodfisher"], woodfisher(w, grads, 4, 1e-3), rtol=2e-3)
    wanted = fpgm(w) if w.ndim > 1 and w.size else np.zeros(shape)
    np.testing.assert_allclose(got["fpgm"], wanted, rtol=1e-5)
    by_input = np.abs(w) * (1 if norms is None else norms[:, None])
    np.testing.assert_allclose(got["wanda"], by_input, rtol=1e-6)


# ---- laws -----------------------------------------------------------------------------------

ENTRIES = st.lists(st.integers(-50, 50), min_size=8, max_size=8)  # one shape compiles once
DISTINCT = st.lists(st.integers(0, 50), min_size=8, max_size=8, unique=True)
BY_ENTRY = {  # the score of one entry, of evidence that is shaped like params
    "magnitude": (jp.magnitude, {}),
    "l2": (jp.scores.l2, {}),
    "rms_normalized": (jp.scores.rms_normalized, {}),
    "smallest": (jp.scores.smallest, {}),
    **{n: (getattr(jp.scores, n), {"grad": 1}) for n in ("saliency", "snip", "taylor", "movement")},
    "grasp": (jp.scores.grasp, {"hvp": 1}),
    "obd": (jp.scores.obd, {"hessian": 1}),
    "fisher": (jp.scores.fisher, {"fisher": 2}),
    "adam_fisher": (jp.scores.adam_fisher, {"nu": 2}),
    "lamp": (jp.scores.lamp, {}),
}
# name -> (k for score(c w) = c^k score(w), k for evidence times c)
POWERS = {
    "magnitude": (1, 0),
    "l2": (2, 0),
    "rms_normalized": (0, 0),
    "lamp": (0, 0),
    "smallest": (-1, 0),
    "saliency": (1, 1),
    "snip": (0, 0),
    "taylor": (1, 1),
    "movement": (1, 1),
    "grasp": (1, 1),
    "obd": (2, 1),
    "fisher": (2, 1),
    "adam_fisher": (2, 1),
}


@functools.cache
def jitted(name):
    return jit(BY_ENTRY[name][0])


def scored(name, w, louder=1.0):
    w = np.asarray(w, np.float32)
    evidence = {k: {"w": louder * np.cos(w) ** power} for k, power in BY_ENTRY[name][1].items()}
    return np.asarray(jitted(name)({"w": w}, **evidence)["w"])


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_ENTRY)
@settings(max_examples=10)
@given(ENTRIES, DISTINCT, st.randoms(use_true_random=False))
def test_scores_move_with_their_entries_and_equals_score_equal(name, entries, distinct, random):
    # LAMP: among equals the earlier one scores more
    w = np.array([x + 0.5 for x in (distinct if name == "lamp" else entries)])
    order = np.array(random.sample(range(w.size), w.size))
    scores = scored(name, w)
    np.testing.assert_allclose(scored(name, w[order]), scores[order], rtol=1e-5)
    if name not in ("rms_normalized", "snip"):  # sums over the leaf round by place
        for value in set(w):
            assert len(set(scores[w == value])) == 1


@pytest.mark.parametrize("name", BY_ENTRY)
@settings(max_examples=10)
@given(ENTRIES, st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_scale(name, entries, c):
    """Scores of scaled weights, and of scaled evidence, that is of a scaled loss."""
    w = np.array([x + 0.5 for x in entries], np.float32)
    evidence = {k: {"w": np.cos(w) ** power} for k, power in BY_ENTRY[name][1].items()}
    for_weights, for_evidence = POWERS[name]
    base = scored(name, w)
    scaled = np.asarray(jitted(name)({"w": w * np.float32(c)}, **evidence)["w"])
    np.testing.assert_allclose(scaled, base * c**for_weights, rtol=1e-5)
    np.testing.assert_allclose(scored(name, w, np.float32(c)), base * c**for_evidence, rtol=1e-5)


LAMP = jit(jp.scores.lamp)


@settings(max_examples=50)
@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=9, max_size=9
    )
)
def test_lamp_ranks_as_magnitude_does_and_its_largest_is_1(entries):
    w = np.asarray(entries, np.float32)
    lamp, size = np.asarray(LAMP({"w": w})["w"]), np.abs(w)
    order = np.argsort(-size, kind="stable")
    assert (np.diff(lamp[order]) <= 0).all()
    assert lamp[order[0]] == (1 if size.any() else 0)
    assert ((lamp >= 0) & (lamp <= 1)).all()


@pytest.mark.slow
def test_lamp_of_a_large_leaf_falls_as_its_entries_do():
    """A sum in parallel is not monotone by itself."""
    score = jit(jp.scores.lamp)
    for small in (1e-4, 0.03, 1.0):  # equal entries: their scores fall as the sum grows
        w = np.full(100_000, small, np.float32)
        w[0] = 1
        assert (np.diff(np.asarray(score({"w": w})["w"])) <= 0).all()


def test_woodfisher_does_not_depend_on_the_scale_of_the_loss():
    params = {"w": jnp.asarray(W)}
    score = jit(lambda grads: jp.scores.woodfisher(params, grads={"w": grads})["w"])
    base, louder = (score(GRADS * c) for c in (1, 1e-4))
    np.testing.assert_allclose(louder, base * 1e-8, rtol=1e-2)


def test_woodfisher_of_block_1_is_fisher_up_to_the_damping():
    params, grads = {"w": jnp.asarray(W)}, {"w": jnp.asarray(GRADS)}
    fisher = {"w": jnp.mean(grads["w"] ** 2, 0)}
    score = jit(functools.partial(jp.scores.woodfisher, block=1, damping=1e-6))
    one = score(params, grads=grads)["w"]
    np.testing.assert_allclose(one, jp.scores.fisher(params, fisher=fisher)["w"], rtol=1e-3)


@pytest.mark.slow
def test_woodfisher_of_gradients_that_are_zero_or_alike_stays_finite():
    params = {"w": jnp.ones(40), "dead": jnp.ones(3)}
    score = jit(lambda grads: jp.scores.woodfisher(params, grads=grads, damping=1e-9))
    for value in (0.0, 1e3):
        scores = score({"w": jnp.full((2, 40), value), "dead": jnp.zeros((2, 3))})
        assert all(bool(jnp.all((s >= 0) & jnp.isfinite(s))) for s in scores.values())


@pytest.mark.slow
def test_snip_sums_to_1_over_all_leaves_also_at_the_ends_of_the_range():
    for scale in (1e-30, 1.0, 1e30):
        params = {"a": jnp.asarray(W, jnp.float32) * scale, "b": jnp.full(3, scale)}
        scores = jp.scores.snip(params, grad=jax.tree.map(jnp.ones_like, params))
        assert float(sum(s.sum() for s in scores.values())) == pytest.approx(1, rel=1e-5)
    nothing = jp.scores.snip({"a": jnp.ones(3)}, grad={"a": jnp.zeros(3)})
    assert nothing["a"].tolist() == [0, 0, 0]


@pytest.mark.slow
def test_fpgm_finds_the_channel_that_the_others_stand_for():
    """In a structure consumers give each unit the same share, so the producer decides."""
    up = jnp.asarray([[0.0, 1.0, 2.0, 3.0, 7.0]])
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    params = {"up": up, "down": jax.random.normal(jax.random.key(0), (5, 3))}
    structure = jp.infer_structure(fn, params, jnp.ones((1, 1)))
    masks = jp.structured(structure)(jp.scores.fpgm(params), 0.2)
    assert masks["up"].tolist() == [[True, True, False, True, True]]


@pytest.mark.slow
def test_inverted_keeps_what_the_score_removes():
    params = {"w": jnp.asarray(W)}
    best, worst = (jp.unstructured()(s(params), 0.5) for s in (jp.magnitude, jp.scores.smallest))
    inverse = jp.unstructured()(jp.scores.inverted(jp.magnitude)(params), 0.5)
    assert (best["w"] ^ worst["w"]).all() and (worst["w"] == inverse["w"]).all()


# ---- SynFlow --------------------------------------------------------------------------------


def relu_net(p, x):
    for name in sorted(p):
        x = jax.nn.relu(x @ p[name])
    return x


def deep(widths=(4, 6, 5, 3), seed=0):
    keys = jax.random.split(jax.random.key(seed), len(widths))
    pairs = zip(widths, widths[1:])
    return {f"l{i}": jax.random.normal(k, s) for i, (k, s) in enumerate(zip(keys, pairs))}


ONE_CUT = jp.unstructured(functools.partial(jp.global_threshold, normalize=False, floor=0))


@pytest.mark.slow
def test_synflow_is_the_sum_over_paths():
    params = deep((2, 3, 2))
    a, b = (np.abs(np.asarray(params[n], np.float64)) for n in ("l0", "l1"))
    first, second = np.zeros((2, 3)), np.zeros((3, 2))
    for i in range(2):
        for j in range(3):
            for k in range(2):
                first[i, j] += a[i, j] * b[j, k]
                second[j, k] += a[i, j] * b[j, k]
    got = jp.scores.synflow(params, fn=relu_net, args=(jnp.zeros((1, 2)),))
    np.testing.assert_allclose(got["l0"], first, rtol=1e-5)
    np.testing.assert_allclose(got["l1"], second, rtol=1e-5)


FLOW = jit(functools.partial(jp.scores.synflow, fn=relu_net, args=(jnp.zeros((1, 4)),)))


@pytest.mark.slow
@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_synflow_is_conserved_from_layer_to_layer_and_through_units(seed):
    scores = FLOW(deep(seed=seed))
    totals = [float(s.sum()) for s in scores.values()]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-4)
    np.testing.assert_allclose(scores["l0"].sum(0), scores["l1"].sum(1), rtol=1e-4)


@pytest.mark.slow
def test_synflow_takes_shapes_and_leaves_integers_alone():
    def fn(p, tokens, x):
        return {"y": x @ p["table"][tokens], "ids": tokens}

    params = {"table": jnp.array([[1.0], [-2.0]]), "step": jnp.int32(3)}
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    for tokens, wanted in (
        (jnp.array([1]), [[0], [2]]),
        (jax.ShapeDtypeStruct((1,), jnp.int32), [[1], [0]]),
    ):
        scores = jp.scores.synflow(params, fn=fn, args=(tokens, x))
        assert scores["table"].tolist() == wanted and scores["step"] == 3


@pytest.mark.slow
def test_synflow_in_rounds_keeps_every_layer_alive_where_one_cut_over_magnitudes_does_not():
    params = deep((8, 32, 4))
    score = functools.partial(jp.scores.synflow, fn=relu_net, args=(jnp.zeros((1, 8)),))
    masks = jit(lambda p: jp.scores.in_rounds(score, ONE_CUT, rounds=20)(p, 0.97))(params)
    assert jp.sanity.collapsed(jp.sanity.active(relu_net, params, masks, jnp.ones((1, 8)))) == []
    sizes = {name: w / 100 if name == "l1" else w for name, w in params.items()}
    at_once = jit(lambda sizes: ONE_CUT(jp.magnitude(sizes), jnp.float32(0.9)))(sizes)
    (found,) = jp.sanity.collapsed(at_once, least=2)
    assert found == ("l1", 1, 128)  # the one entry that no leaf loses


@pytest.mark.slow
def test_rounds_prune_a_little_at_a_time_and_never_bring_back():
    """Against the loop in Python, with a score that is negative and moves with what is left."""
    params = {"w": jnp.asarray(W), "v": jnp.asarray(G)}

    def score(p, **evidence):
        total = sum(jnp.sum(x) for x in p.values())
        turn = jnp.where(jnp.any(p["w"] == 0), -1, 1)  # once pruned, zeros would score most
        return jax.tree.map(lambda x: turn * jnp.abs(x * total), p)

    kept = {name: np.ones(w.shape, bool) for name, w in params.items()}
    for k in range(1, 6):
        now = {name: np.where(kept[name], w, 0) for name, w in params.items()}
        total = sum(np.sum(x) for x in now.values())
        for name in kept:
            size = np.abs(now[name] * total)
            scores = np.where(kept[name], -size if k > 1 else size, -np.inf)
            count = 30 - round(30 * (1 - 0.2 ** (k / 5)))
            kept[name] = np.zeros(30, bool)
            kept[name][np.argsort(-scores.ravel(), kind="stable")[:count]] = True
            kept[name] = kept[name].reshape(5, 6)
    masks = jp.scores.in_rounds(score, jp.unstructured(), rounds=5)(params, 0.8, unknown=1)
    for name in params:
        np.testing.assert_array_equal(masks[name], kept[name])


def test_one_round_is_one_shot_and_none_is_an_error():
    params = {"w": jnp.asarray(W)}
    once = jp.scores.in_rounds(jp.magnitude, jp.n_m(2, 3, axis=1), rounds=1)(params, 1 / 3)
    assert (once["w"] == jp.n_m(2, 3, axis=1)(jp.magnitude(params), 1 / 3)["w"]).all()
    with pytest.raises(ValueError, match="rounds is 0; wanted 1 or more"):
        jp.scores.in_rounds(jp.magnitude, jp.unstructured(), rounds=0)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [ONE_CUT, jp.block((2, 2)), jp.n_m(2, 4, axis=1)])
def test_rounds_take_any_pattern(pattern):
    params = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
    masks = jit(lambda p, s: jp.scores.in_rounds(jp.magnitude, pattern, rounds=3)(p, s))(
        params, 0.5
    )
    assert float(jp.density(params, masks)) == 0.5
