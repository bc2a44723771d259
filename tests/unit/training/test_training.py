"""jp.prune and jp.keep_params_sparse: laws, oracles, what surrounds them, and every error."""

import functools
import re
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxprune as jp
from benchmarks.studies.speed import training as benchmark
from jaxprune.training.landing import land_on_masked
from jaxprune.training.renewal import renewal_of
from tests.helpers.oracles import ranked

# Half the time to compile; what is optimised before this pass stays as it is.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
tree_get = optax.tree_utils.tree_get
CUBIC = jp.schedules.cubic(0.0, 0.8, begin=0, end=9)


def make_params(key: int = 0, dtype: Any = jnp.float32) -> Any:
    k = jax.random.split(jax.random.key(key), 2)
    return {
        "up": {"kernel": jax.random.normal(k[0], (6, 8), dtype), "bias": jnp.ones(8, dtype)},
        "down": {"kernel": jax.random.normal(k[1], (8, 4), dtype)},
    }


def gradient(params: Any, step: Any = 0) -> Any:
    """Of a quadratic whose minimum moves."""
    return jax.tree.map(lambda p: (p - jnp.sin(step + 1.0)).astype(p.dtype), params)


@functools.cache
def jitted_step(tx: Any) -> Any:
    @fast_jit
    def one(params: Any, state: Any, step: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state

    return one


def train(tx: Any, params: Any, steps: int, state: Any = None, start: int = 0) -> tuple[Any, Any]:
    """The plain loop over one jitted step."""
    state = tx.init(params) if state is None else state
    for step in range(start, start + steps):
        params, state = jitted_step(tx)(params, state, step)
    return params, state


def assert_equal_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# ---- landing --------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    st.integers(0, 2**8 - 1),
)
@example([3.396e38] + 7 * [1e-42], jnp.bfloat16, jnp.float32, 0)
def test_updates_land_bitwise(values: Any, p_type: Any, u_type: Any, kept: int) -> None:
    with np.errstate(over="ignore"):
        rounded = np.asarray(values, np.float32).astype(p_type)
    params = jnp.asarray(np.where(np.isfinite(rounded), rounded, np.zeros_like(rounded)))
    updates = jnp.asarray(np.linspace(-3, 3, 8), u_type)
    mask = np.array([bool(kept >> i & 1) for i in range(8)])
    landed = land_on_masked(updates, params, mask)
    wide = updates.astype(landed.dtype)
    after, plain = optax.apply_updates(params, landed), optax.apply_updates(params, wide)
    assert_equal_bits(landed, np.where(mask, wide, -np.asarray(params, landed.dtype)))
    assert_equal_bits(after, np.where(mask, plain, np.zeros_like(plain)))


def test_a_bad_update_of_a_pruned_entry_does_no_harm_and_a_bad_parameter_stays() -> None:
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    tx = jp.keep_params_sparse({"w": jnp.array([True, False, False])})
    updates, state = {"w": jnp.array([1.0, jnp.nan, 0.0])}, tx.init(params)
    params = {"w": params["w"].at[2].set(jnp.nan)}  # as training that diverges does
    landed, state = tx.update(updates, state, params)
    after = optax.apply_updates(params, landed)
    np.testing.assert_array_equal(after["w"], [2.0, 0.0, np.nan])  # as the docstring says
    served = jp.training.masked_params(after, state)
    np.testing.assert_array_equal(served["w"], [2.0, 0.0, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_that_no_update_brings_to_zero_are_refused_by_init(bad: Any, dtype: Any) -> None:
    params = {"b": jnp.full(3, bad), "layer": {"w": jnp.ones((2, 4), dtype).at[1, 2].set(bad)}}
    text = r"prunes layer/w, (float32|bfloat16)\[2, 4\], which holds NaN or infinity.*nan_to_num"
    for tx in (
        jp.prune(ADAM, lambda p, **_: jax.tree.map(jnp.ones_like, p), 0.5),
        jp.training.rigl(ADAM, 0.5),
        jp.training.one_shot(ADAM, 0.5, at=3),
    ):
        with pytest.raises(ValueError, match=text):
            tx.init(params)
        with pytest.raises(ValueError, match=text):
            jax.jit(lambda tx=tx: tx.init(params))()  # constants of a program are known
        jax.eval_shape(tx.init, params)  # nothing is known
    masks = {"b": jnp.asarray(True), "layer": {"w": jnp.ones((2, 4), bool).at[1, 2].set(False)}}
    with pytest.raises(ValueError, match="jp.keep_params_sparse " + text):
        jp.keep_params_sparse(masks).init(params)
    jp.keep_params_sparse(jax.tree.map(jnp.logical_not, masks)["layer"]).init(params["layer"])
    clean = jax.tree.map(jnp.nan_to_num, params)  # as the message says
    assert jp.training.rigl(ADAM, 0.5).init(clean).masks["layer"]["w"].sum() == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_steps_unrolled_in_one_program_land_bitwise(dtype: Any) -> None:
    """Where XLA may keep a bfloat16 in more bits than it has."""
    tx = jp.prune(optax.adamw(1e-2), jp.magnitude, 0.0, pattern=jp.threshold(0.5))

    @jax.jit
    def unrolled(params: Any, state: Any) -> Any:
        seen = []
        for step in range(4):
            updates, state = tx.update(gradient(params, step), state, params)
            params = optax.apply_updates(params, updates)
            seen.append((params, state.masks))
        return seen

    params = make_params(dtype=dtype)
    for after, masks in unrolled(params, tx.init(params)):
        assert_equal_bits(after, jp.apply_masks(after, masks))


# ---- against the slow way -------------------------------------------------------------------


@pytest.mark.slow
def test_matches_gradual_pruning_by_sorting_in_numpy() -> None:
    """The oracle: sort all magnitudes, drop the smallest, one plain SGD step on what is left.

    The schedule ends at step 9, so the masks of its end are made at step 8.
    """
    params = {"kernel": jax.random.normal(jax.random.key(0), (9, 7))}
    tx = jp.prune(optax.sgd(0.125), jp.magnitude, CUBIC, every=3)
    state, slow, update = tx.init(params), np.asarray(params["kernel"]), fast_jit(tx.update)
    mask = np.ones(slow.size, bool)
    for step in range(14):
        if step % 3 == 0 or step == 8:
            removed = round(float(CUBIC(9 if step == 8 else step)) * slow.size)
            mask = np.ones(slow.size, bool)
            mask[np.argsort(np.abs(slow).ravel())[:removed]] = False
        slow = np.where(mask.reshape(slow.shape), slow + np.float32(0.125), np.float32(0))
        grads = {"kernel": jnp.full((9, 7), -1.0)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_equal_bits(params["kernel"], slow)


@pytest.mark.slow
def test_no_sparsity_changes_nothing() -> None:
    params, grads = make_params(), gradient(make_params())
    plain = optax.adamw(1e-2)
    tx = jp.prune(plain, jp.magnitude, 0.0)
    updates, state = tx.update(grads, tx.init(params), params)
    wanted, inner = plain.update(grads, plain.init(params), params)
    assert_equal_bits(updates, wanted)
    assert_equal_bits(state.inner_state, inner)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_counts_are_exact_when_all_scores_tie(dtype: Any) -> None:
    params = {"kernel": jnp.full((100, 33), 0.5, dtype)}
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, CUBIC)
    for steps in (1, 4, 12):
        _, state = train(tx, params, steps)
        removed = 3300 - int(state.masks["kernel"].sum())
        assert abs(removed - 3300 * float(CUBIC(steps - 1))) <= 1
    _, state = train(tx, params, 9)
    assert abs(3300 - int(state.masks["kernel"].sum()) - 3300 * 0.8) <= 1, "not yet at its end"


# ---- when masks are renewed -----------------------------------------------------------------


@jax.jit
def renewals(begin: Any, end: Any, every: Any, plateaus: Any) -> tuple[Any, Any]:
    """Due or not, and the sparsity that the masks have, at each of 64 steps."""

    def schedule(step: Any) -> Any:
        x = jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
        return 0.9 * jnp.where(plateaus, jnp.floor(3 * x) / 3, 1 - (1 - x) ** 3)

    def body(last: Any, step: Any) -> Any:
        due, now = renewal_of(schedule, step, last, every)
        last = jnp.where(due, now, last)
        return last, (due, last)

    return jax.lax.scan(body, jnp.float32(0), jnp.arange(64))[1]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 70), st.booleans())
def test_a_schedule_reaches_its_target_at_its_end_step(
    begin: int, length: int, every: int, plateaus: bool
) -> None:
    due, sparsity = map(np.asarray, renewals(begin, begin + length, every, plateaus))
    assert due[::every].all()
    ramp = length > 1 and not plateaus
    assert (sparsity[begin + length - ramp :] == np.float32(0.9)).all()
    for start in range(0, 64, every):
        assert due[start : start + every].sum() <= 2, "more than one renewal in between"


RAMPS = {
    "cubic": lambda end: jp.schedules.cubic(0.0, 0.9, begin=0, end=end),
    "linear": lambda end: jp.schedules.linear(0.0, 0.9, begin=1, end=end),
    "cosine": lambda end: jp.schedules.cosine(0.5, 0.9, begin=0, end=end),
    "exponential": lambda end: jp.schedules.exponential(0.0, 0.9, begin=1, end=end),
    "falling": lambda end: jp.schedules.cubic(1.0, 0.9, begin=0, end=end),
    "optax": lambda end: optax.linear_schedule(0.0, 0.9, end),
    "cycles": lambda end: jp.schedules.cyclic(
        jp.schedules.cubic(0.0, 0.9, begin=0, end=end // 2), period=end - end // 2, count=2
    ),
}
JUMPS = {
    "one_shot": lambda end: jp.schedules.one_shot(0.9, at=end - 1),
    "rounds": lambda end: jp.schedules.rounds(0.0, 0.9, begin=end - 7, every=3, count=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RAMPS | JUMPS)
@pytest.mark.parametrize("every", [1, 4, 5, 100])
@pytest.mark.parametrize("end", [10, 12, 13])
@pytest.mark.parametrize("start", [None, jp.magnitude])
def test_a_schedule_that_ends_with_training_reaches_its_target(
    name: str, every: int, end: int, start: Any
) -> None:
    """``end`` updates, counted 0 to end - 1; jumps prune at their step and not before."""
    schedule = (RAMPS | JUMPS)[name](end)

    def body(last: Any, step: Any) -> Any:
        due, now = renewal_of(schedule, step, last, every)
        last = jnp.where(due & (step >= (start is not None)), now, last)
        return last, last

    first = 0.0 if start is None else schedule(0)
    _, made_for = jax.lax.scan(body, jnp.float32(first), jnp.arange(end))
    assert float(made_for[-1]) == pytest.approx(0.9, abs=1e-6)
    if name in JUMPS:
        steps = [s for s in range(1, end) if made_for[s] != made_for[s - 1]]
        assert all(made_for[s] == np.float32(schedule(s)) for s in steps), "before its step"


@pytest.mark.slow
def test_prune_renews_when_due_and_only_then() -> None:
    seen: list[tuple[int, float]] = []
    params = make_params()
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, CUBIC, every=4)
    state, update = tx.init(params), fast_jit(tx.update)
    assert all(bool(m.all()) for m in jax.tree.leaves(state.masks))
    for step in range(13):
        old = state.masks
        _, state = update(gradient(params, step), state, params)
        seen.append((int(state.count), round(float(state.sparsity), 6)))
        if step not in (0, 4, 8, 12):
            assert_equal_bits(state.masks, old)
    wanted = [float(CUBIC(s)) for s in (0, 0, 0, 0, 4, 4, 4, 4, 9, 9, 9, 9, 9)]
    assert seen == [(i + 1, round(s, 6)) for i, s in enumerate(wanted)]


# ---- what a pruned entry may do -------------------------------------------------------------


def ever_shrinking(score: Any, sparsity: Any, **options: Any) -> bool:
    params = make_params()
    tx = jp.prune(optax.sgd(0.3), score, sparsity, **options)
    state = tx.init(params)
    nested = True
    update = fast_jit(tx.update)
    for step in range(12):
        old = state.masks
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(state.masks), strict=True)
        nested &= all(bool(jnp.all(new <= before)) for before, new in pairs)
    return nested


def random_each_step(params: Any, *, step: Any, **evidence: Any) -> Any:
    return jp.random(params, key=jax.random.key(1), step=step)


def soon_all_ties(params: Any, *, step: Any, **evidence: Any) -> Any:
    return jax.tree.map(lambda w: jnp.where(step < 4, jnp.abs(w), 0.0), params)


@pytest.mark.slow
@pytest.mark.parametrize("regrow", [False, True])
def test_scores_may_be_known_beforehand(regrow: bool) -> None:
    params, scores = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[1.0, 4.0], [3.0, 2.0]])}
    tx = jp.prune(optax.sgd(0.1), lambda params, **_: scores, 0.5, regrow=regrow)
    _, state = fast_jit(tx.update)(params, tx.init(params), params)
    assert state.masks["w"].tolist() == [[False, True], [True, False]]


@pytest.mark.slow
@pytest.mark.parametrize("score", [jp.magnitude, jp.saliency, random_each_step, soon_all_ties])
def test_what_is_pruned_stays_pruned(score: Any) -> None:
    assert ever_shrinking(score, CUBIC)


@pytest.mark.slow
def test_regrow_lets_all_entries_compete_afresh() -> None:
    assert not ever_shrinking(random_each_step, 0.5, regrow=True)


@pytest.mark.slow
def test_where_the_schedule_falls_entries_come_back() -> None:
    wave = optax.piecewise_interpolate_schedule("linear", 0.8, {2: 0.0, 4: 1.0})
    tx = jp.prune(optax.sgd(0.1), jp.magnitude, wave)
    params, state = train(tx, make_params(), 1)
    assert float(jp.density(params, state.masks)) == pytest.approx(0.2, abs=0.02)
    params, state = train(tx, params, 3, state, start=1)
    assert all(bool(m.all()) for m in jax.tree.leaves(state.masks))


def test_when_the_schedule_falls_the_best_scores_come_back() -> None:
    """And not the first of what is pruned."""
    scores = {"w": jnp.arange(8.0).reshape(2, 4)}
    down = optax.piecewise_constant_schedule(0.75, {1: 2 / 3})
    tx = jp.prune(optax.sgd(0.0), lambda params, **_: jax.tree.map(jnp.array, scores), down)
    params = {"w": jnp.ones((2, 4))}
    state = tx.init(params)
    for kept in ([6, 7], [4, 5, 6, 7]):
        updates, state = fast_jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
        assert np.flatnonzero(state.masks["w"]).tolist() == kept


# ---- evidence and extra arguments -----------------------------------------------------------


def spy(seen: dict[str, Any]) -> Any:
    def score(params: Any, **evidence: Any) -> Any:
        seen.update(evidence)
        return jp.magnitude(params)

    return score


@pytest.mark.slow
def test_the_score_sees_raw_gradients_the_step_and_extra_arguments() -> None:
    params, seen = {"w": jnp.ones((2, 2))}, {}
    grads = {"w": jnp.full((2, 2), 100.0)}
    tx = jp.prune(optax.chain(optax.clip(1.0), optax.adam(0.1)), spy(seen), 0.5)
    tx.update(grads, tx.init(params), params, value=3.0, norms=params)
    assert set(seen) == {"grad", "step", "value", "norms"}
    assert_equal_bits(seen["grad"], grads)
    assert int(seen["step"]) == 0

    tx = optax.chain(optax.clip(1.0), jp.prune(optax.adam(0.1), spy(seen), 0.5))
    tx.update(grads, tx.init(params), params)
    assert float(seen["grad"]["w"].max()) == 1.0, "after a clipping link"
    tx.update(grads, tx.init(params), params, grad=grads)
    assert float(seen["grad"]["w"].max()) == 100.0, "an explicit grad= wins"


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        lambda plateau: jp.prune(plateau, jp.magnitude, 0.5),
        lambda plateau: optax.chain(plateau, jp.prune(optax.identity(), jp.magnitude, 0.5)),
        lambda plateau: jp.prune(optax.MultiSteps(plateau, 1), jp.magnitude, 0.5),
    ],
    ids=["inside", "beside", "in MultiSteps"],
)
def test_extra_arguments_reach_the_optimizer(place: Any) -> None:
    tx = place(
        optax.chain(
            optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
        )
    )
    params = {"w": jnp.ones((2, 2))}
    state = tx.init(params)
    update = fast_jit(tx.update)
    for _ in range(4):
        _, state = update(gradient(params), state, params, value=1.0)
    assert float(tree_get(state, "scale")) < 1.0, "the loss stood still and nobody noticed"


# ---- one compilation, fixed shapes, every transformation of JAX ------------------------------


@functools.cache
def everything() -> optax.GradientTransformationExtraArgs:
    return jp.prune(optax.adamw(1e-2), jp.saliency, CUBIC, every=2, pattern=ranked)


@pytest.mark.slow
def test_compiles_once() -> None:
    tx, params = everything(), make_params()
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(1)
    def one(params: Any, state: Any) -> Any:
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = one(params, state)
    assert one._cache_size() == 1


def test_the_state_is_arrays_of_fixed_types() -> None:
    tx, params = everything(), make_params()
    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    _, after = jax.eval_shape(tx.update, gradient(params), state, params)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
    assert_equal_bits(jax.jit(tx.init)(params), state)
    assert jax.eval_shape(tx.init, params).masks["up"]["kernel"].shape == (6, 8)


def test_masks_have_the_shapes_of_their_pattern() -> None:
    with pytest.warns(UserWarning, match="channel"):
        state = jp.prune(optax.sgd(0.1), jp.magnitude, 0.5, pattern=jp.channel()).init(
            make_params()
        )
    assert jax.tree.map(jnp.shape, state.masks) == {
        "up": {"kernel": (1, 8), "bias": ()},
        "down": {"kernel": (1, 4)},
    }


@pytest.mark.slow
def test_scan_and_donation_equal_the_loop() -> None:
    tx, params = everything(), make_params()
    wanted = train(tx, params, 11)

    def one(carry: Any, step: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    scanned, _ = jax.lax.scan(one, (params, tx.init(params)), jnp.arange(11))
    donated = (make_params(), tx.init(params))
    donating = fast_jit(lambda carry, step: one(carry, step)[0], donate_argnums=0)
    for step in range(11):
        donated = donating(donated, step)
    for params, state in (scanned, donated):  # another program may round otherwise
        chex.assert_trees_all_close(params, wanted[0], rtol=1e-4, atol=1e-6)
        assert_equal_bits(state.masks, wanted[1].masks)


@pytest.mark.slow
def test_vmap_prunes_each_member_of_an_ensemble() -> None:
    tx = everything()
    members = [make_params(key) for key in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    state = jax.vmap(tx.init)(stacked)
    update = fast_jit(jax.vmap(tx.update))
    for step in range(11):
        updates, state = update(gradient(stacked, step), state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    for i, member in enumerate(members):
        _, alone = train(tx, member, 11)
        assert_equal_bits(jax.tree.map(lambda m, i=i: m[i], state.masks), alone.masks)


@pytest.mark.slow
def test_a_run_continues_from_a_checkpoint_bitwise(tmp_path: Any) -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), everything())
    wanted = train(tx, make_params(), 12)
    half = train(tx, make_params(), 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        params = make_params()
        like = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "half", like)
    assert_equal_bits(restored, half)
    assert_equal_bits(train(tx, *restored[:1], 7, restored[1], start=5), wanted)


def test_tree_map_params_walks_the_state() -> None:
    """How users build shardings for an optimizer's state."""
    params = make_params()
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    for tx in (everything(), jp.keep_params_sparse(masks)):
        state = tx.init(params)
        names = {"up": {"kernel": "a", "bias": "b"}, "down": {"kernel": "c"}}
        specs = optax.tree_map_params(
            tx, lambda _, name: name, state, names, transform_non_params=lambda _: "scalar"
        )
        assert specs.masks == names
        assert jax.tree.structure(specs) == jax.tree.structure(state)


# ---- frameworks -----------------------------------------------------------------------------


def test_nnx_optimizer() -> None:
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    tx = jp.prune(optax.adam(1e-2), jp.saliency, 0.5, pattern=ranked)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def one(model: Any, optimizer: Any, x: Any) -> None:
        grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        one(model, optimizer, jnp.ones((2, 6)))
    assert int((model.kernel[...] != 0).sum()) == 12
    assert model.bias[...].all()
    masks = tree_get(optimizer.opt_state, "masks")
    assert int(jax.tree.leaves(masks)[1].sum()) == 12


@pytest.mark.slow
def test_equinox_model() -> None:
    model = eqx.nn.MLP(4, 2, 6, 1, key=jax.random.key(0))
    tx = jp.prune(optax.sgd(1e-2), jp.magnitude, 0.5, pattern=ranked)

    @eqx.filter_jit
    def one(model: Any, state: Any, x: Any) -> Any:
        grads = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(3):
        model, state = one(model, state, jnp.ones((3, 4)))
    for layer in model.layers:
        assert int((layer.weight != 0).sum()) == layer.weight.size // 2


# ---- keep_params_sparse ---------------------------------------------------------------------


@pytest.mark.slow
def test_keep_params_sparse_holds_any_optimizer_on_fixed_masks() -> None:
    params = make_params(dtype=jnp.bfloat16)
    masks = jp.unstructured()(jp.magnitude(params), 0.7)
    tx = optax.chain(optax.adamw(1e-2), jp.keep_params_sparse(jax.tree.map(np.asarray, masks)))
    params, state = train(tx, params, 3)
    assert_equal_bits(params, jp.apply_masks(params, masks))
    assert_equal_bits(tree_get(state, "masks"), masks)


def test_keep_params_sparse_leaves_the_masks_to_their_owner() -> None:
    params = {"w": jnp.ones((2, 2))}
    masks = {"w": jnp.eye(2, dtype=bool)}
    tx = jp.keep_params_sparse(masks)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(params, tx.init(params), params)
    assert_equal_bits(state.masks, {"w": np.eye(2, dtype=bool)})
    assert bool(masks["w"][0, 0]), "the user's own masks were donated"


# ---- what it costs --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_overhead_is_measured_where_masks_are_kept_and_where_they_are_renewed(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(benchmark, "WIDTHS", (8, 16, 4))
    entries = benchmark.entries(("prune",))
    steps = ["prune, masks kept", "prune, masks renewed"]
    assert list(entries) == ["adamw", *steps]
    for name in steps:
        step, (params, state, *batch) = entries[name]
        everything = state._replace(masks=jax.tree.map(jnp.ones_like, state.masks))
        _, after = step(params, everything, *batch)
        kept = int(after.masks[0]["kernel"].sum())
        assert kept == (round(0.1 * 8 * 16) if name.endswith("renewed") else 8 * 16), name
    found = benchmark.measure(("sr_ste, 2:4",), rounds=3)
    assert list(found) == ["adamw", "sr_ste, 2:4, masks renewed"] and found["adamw"]["ratio"] == 1.0


@pytest.mark.slow
def test_a_mask_update_is_measured_against_sorting() -> None:
    found = benchmark.measure_update(4096, rounds=3)
    assert found["argsort"]["argsort_over_this"] == 1.0
    assert all(row["temporary_bytes_per_entry"] is not None for row in found.values())


# ---- errors ---------------------------------------------------------------------------------

ADAM = optax.adam(1e-3)
W = {"w": jnp.ones((4, 4))}
MASKS = {"w": jnp.ones((4, 4), bool)}


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: jp.prune(ADAM, jp.magnitude, 90), ValueError, "sparsity ends at 90; wanted the"),
        (lambda: jp.prune(ADAM, jp.magnitude, -0.1), ValueError, "sparsity ends at -0.1; wanted"),
        (lambda: jp.prune(ADAM, jp.magnitude, jnp.nan), ValueError, "sparsity ends at nan"),
        (
            lambda: jp.prune(ADAM, jp.magnitude, optax.linear_schedule(0.0, 80.0, 10)),
            ValueError,
            "sparsity ends at 80.0; wanted the fraction of entries to remove",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, jnp.array([0.5, 0.9])),
            ValueError,
            r"sparsity ends at \[0.5 0.9\]; wanted the fraction",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, optax.linear_schedule(-0.1, 0.8, 10)),
            ValueError,
            "sparsity begins at -0.0999.*; wanted the fraction of entries to remove",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.5, pattern=jp.unstructured),  # type: ignore[arg-type]
            TypeError,
            r"pattern is jp.unstructured itself, which makes patterns; call it: jp.unst.*\(\)",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.5, pattern="2:4"),  # type: ignore[arg-type]
            TypeError,
            r"pattern is a str; wanted a function \(scores, sparsity\) -> masks such as",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.5, pattern=jp.unstructured({"v": 0.5})).init(W),
            ValueError,
            r"by_path: 'v' is the first match of none of the pruned leaves \['w'\]; correct it",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.5, pattern=jp.block((2, 8))).init(W),
            ValueError,
            r"block\(\(2, 8\)\) does not tile w, shape \(4, 4\): .*leave the leaf out with where=",
        ),
        (lambda: jp.prune(ADAM, jp.magnitude, 0.5, every=0), ValueError, "every is 0; wanted"),
        (lambda: jp.prune(ADAM, jp.magnitude, 0.5, every=2.5), ValueError, "every is 2.5; wanted"),
        (
            lambda: jp.prune(optax.adam, jp.magnitude, 0.5),
            TypeError,
            r"inner is a function; wanted an optax transformation such as optax.adam\(1e-3\)",
        ),
        (
            lambda: jp.prune(ADAM, {"w": jnp.ones(2)}, 0.5),
            TypeError,
            "score is a dict; wanted a function .* such as jp.magnitude",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.8, pattern=jp.n_m(2, 4)).init(W),
            ValueError,
            "can't express 0.8",
        ),
        (
            lambda: jp.prune(ADAM, jp.magnitude, CUBIC, pattern=jp.n_m(2, 4)).init(W),
            ValueError,
            "can't express 0.8",
        ),
        (lambda: jp.prune(ADAM, jp.magnitude, 0.5).init({}), ValueError, "empty tree"),
        (
            lambda: jp.prune(ADAM, jp.magnitude, 0.5).init({"b": jnp.ones(3)}),
            ValueError,
            "where=is_kernel selects none of the leaves",
        ),
        (
            lambda: jp.keep_params_sparse({"v": jnp.ones(3, bool)}).init(W),
            ValueError,
            "the tree of masks does not match params: it has no leaf 'w', .*; build masks",
        ),
        (
            lambda: jp.keep_params_sparse({"w": jnp.ones(3, bool)}).init(W),
            ValueError,
            r"the mask of w is bool\(3,\); wanted booleans that broadcast to .* \(4, 4\)",
        ),
    ],
)
def test_bad_settings_say_what_to_write_instead(build: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize("name", ["jp.prune", "jp.keep_params_sparse"])
def test_bad_calls_of_update_name_the_leaf(name: str) -> None:
    if name == "jp.prune":
        tx: Any = jp.prune(ADAM, jp.magnitude, 0.5)
    else:
        tx = jp.keep_params_sparse(MASKS)
    state = tx.init(W)
    without = re.escape(
        f"{name} lands updates on masked parameters, so it must see them, and params is None; "
        "write tx.update(grads, state, params)"
    )
    with pytest.raises(ValueError, match=without):
        tx.update(W, state)
    wrong = {"v": W["w"]}
    with pytest.raises(ValueError, match="tree of updates .* no leaf 'w'.*; pass the gradients"):
        tx.update(wrong, state, W)
    with pytest.raises(
        ValueError, match=r"updates have the shape \(2, 4\) at w, params have \(4, 4\)"
    ):
        tx.update({"w": jnp.ones((2, 4))}, state, W)
    old = (
        rf"the state of {name} was made for other .*write state = tx.init\(params\), or restore a "
        r"checkpoint with jax.eval_shape\(tx.init, params\) as its target \(the tree of masks"
    )
    with pytest.raises(ValueError, match=old):
        tx.update(wrong, state, wrong)
    with pytest.raises(ValueError, match=r"the mask of w is bool\(4, 4\)"):
        tx.update({"w": jnp.ones(4)}, state, {"w": jnp.ones(4)})


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (lambda params, **_: {}, "tree of scores .* no leaf 'w'; return a score for each entry"),
        (
            lambda params, **_: {"w": jnp.ones(4)},
            r"scores have the shape \(4,\) at w, params have \(4, 4\); return",
        ),
        (lambda params, **_: {**params, "x": 1}, "tree of scores .* an unknown leaf 'x'"),
    ],
)
def test_scores_of_another_structure_name_the_leaf(score: Any, text: str) -> None:
    tx = jp.prune(ADAM, score, 0.5)
    with pytest.raises(ValueError, match=text):
        tx.update(W, tx.init(W), W)


def test_injecting_every_step_count_needs_static_args() -> None:
    make = optax.inject_hyperparams(jp.prune, static_args=("score", "pattern"))
    with pytest.raises(ValueError, match="optax.inject_hyperparams needs it in static_args"):
        make(ADAM, jp.magnitude, 0.5, pattern=jp.unstructured(), every=2).init(W)
