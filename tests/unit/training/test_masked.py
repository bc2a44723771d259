"""masked_params under every wrapper, against the masks; what init says of wrappers, and when not.

The oracle of averages is optax's own: schedule_free_eval_params, and slow params of lookahead.
"""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import jaxprune as jp
from jaxprune.training import masked_params, wrappers
from tests.helpers.arrays import normal
from tests.helpers.oracles import ranked

T = jp.training
ADAM = optax.adam(1e-2)
X = normal(0, 16, 8)
Y = jnp.asarray(np.sin(np.asarray(X) @ np.asarray(normal(1, 8, 4))))
PARAMS = {
    "up": jnp.asarray(np.asarray(normal(2, 8, 16)) / 4),
    "down": jnp.asarray(np.asarray(normal(3, 16, 4)) / 6),
    "b": jnp.zeros(4),
}
LABELS = {"up": "a", "down": "b", "b": "c"}
MASKS = jax.jit(lambda params: jp.unstructured()(jp.magnitude(params), 0.75))(PARAMS)


def prune(inner: Any = ADAM) -> Any:
    schedule = jp.schedules.cubic(0.0, 0.75, begin=1, end=6)
    return jp.prune(inner, jp.magnitude, schedule, every=2, pattern=ranked)


def everywhere(inner: Any = ADAM) -> Any:
    """For params that are one vector."""
    pattern = jp.unstructured(where=lambda path, leaf: True)
    return jp.prune(inner, jp.magnitude, 0.75, pattern=pattern)


def loss(params: Any) -> Any:
    return jnp.mean((jnp.tanh(X @ params["up"]) @ params["down"] + params["b"] - Y) ** 2)


def train(tx: Any, params: Any = PARAMS, steps: int = 8) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have tests of their own below
        return run(params)


free, free_adamw = optax.contrib.schedule_free, optax.contrib.schedule_free_adamw
WRAPPED: dict[str, Callable[[], Any]] = {
    "prune": prune,
    "schedule_free around": lambda: free(prune(), 1e-2),
    "schedule_free inside": lambda: prune(free_adamw(1e-2)),
    "schedule_free around keep_params_sparse": lambda: free(
        optax.chain(ADAM, jp.keep_params_sparse(MASKS)), 1e-2
    ),
    "reduce_on_plateau after": lambda: optax.chain(prune(), optax.contrib.reduce_on_plateau()),
    "scale after": lambda: optax.chain(jp.prune(ADAM, jp.magnitude, 0.75), optax.scale(0.5)),
    "weight decay after": lambda: optax.chain(prune(), optax.add_decayed_weights(-0.1)),
    "masks before the optimizer": lambda: optax.chain(jp.keep_params_sparse(MASKS), ADAM),
    "named_chain": lambda: optax.named_chain(("a", prune()), ("b", optax.ema(0.9))),
    "MultiSteps": lambda: optax.MultiSteps(jp.prune(ADAM, jp.magnitude, 0.75), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(lambda r: prune(optax.adam(r)))(0.01),
    "masked": lambda: optax.chain(
        optax.masked(prune(), {"up": True, "down": True, "b": False}), optax.scale(0.1)
    ),
    "partition": lambda: optax.partition(
        {"a": free(prune(), 1e-2), "b": prune(free_adamw(1e-2)), "c": ADAM}, LABELS
    ),
    "two methods": lambda: optax.partition(
        {"a": T.packed(T.rigl(ADAM, 0.75)), "b": T.ste(ADAM, 0.75), "c": ADAM}, LABELS
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(prune(), 3),
    "mechanize": lambda: optax.contrib.mechanize(prune()),
    "prune in prune": lambda: jp.prune(prune(), jp.magnitude, 0.75),
    "packed": lambda: free(T.packed(prune()), 1e-2),
    "flatten": lambda: optax.flatten(everywhere()),
    "flatten schedule_free": lambda: optax.flatten(free(everywhere(), 1e-2)),
    "set": lambda: free(T.set(ADAM, 0.75, every=2), 1e-2),
    "static": lambda: free(T.static(ADAM, 0.75), 1e-2),
    "ac_dc": lambda: free(T.ac_dc(ADAM, 0.75, begin=0, end=2, sparse_steps=1, dense_steps=1), 1e-2),
    "top_kast": lambda: free(T.top_kast(ADAM, 0.75, backward=0.5), 1e-2),
    "movement": lambda: T.movement(free_adamw(1e-2), 0.75),
    "admm": lambda: T.admm(ADAM, 0.75, every=2),
}


def kept(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(tree[name] != 0) for name in ("up", "down")])


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_evaluated_is_sparse_under_every_wrapper(name: str) -> None:
    params, state = train(WRAPPED[name]())
    used = jax.jit(masked_params)(params, state)
    assert jax.tree.structure(used) == jax.tree.structure(params)
    wanted = 48 if "flatten" not in name else None  # a quarter of 128 + 64
    if wanted:
        assert abs(kept(used).sum() - wanted) <= 1
    else:
        assert sum(int((x != 0).sum()) for x in used.values()) <= 49
    again = masked_params(params, state)
    for leaf, other in zip(jax.tree.leaves(used), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)
        assert np.isfinite(leaf).all()


def test_sparse_params_are_served_as_they_are_bitwise() -> None:
    params, state = train(prune())
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(masked_params(params, state))):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("around", [True, False])
def test_averages_are_those_that_optax_evaluates_under_masks(around: bool) -> None:
    params, state = train(free(prune(), 1e-2) if around else prune(free_adamw(1e-2)))
    inner = state if around else state.inner_state
    average = optax.contrib.schedule_free_eval_params(inner, params)
    wanted = jp.apply_masks(average, optax.tree_utils.tree_get(state, "masks"))
    for name, leaf in masked_params(params, state).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6, atol=1e-7)
    dense = np.mean(np.asarray(average["up"]) == 0)
    assert dense < 0.1, "without the call it is dense"


@pytest.mark.slow
def test_averages_of_a_part_leave_other_leaves_bitwise_and_keep_types() -> None:
    params = {**PARAMS, "up": PARAMS["up"].astype(jnp.bfloat16)}
    tx = optax.partition({"a": free(prune(), 1e-2), "b": prune(), "c": optax.sgd(0.1)}, LABELS)
    params, state = train(tx, params)
    used = masked_params(params, state)
    np.testing.assert_array_equal(used["b"], params["b"])
    np.testing.assert_array_equal(used["down"], params["down"])
    assert used["up"].dtype == jnp.bfloat16
    assert (used["up"] != params["up"]).any()


@pytest.mark.slow
def test_slow_params_of_lookahead_are_evaluated() -> None:
    tx = optax.lookahead(jp.prune(ADAM, jp.magnitude, 0.75), 3, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.warns(UserWarning, match="optax's lookahead is around jp.prune: it evaluates slow"):
        state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    wanted = jp.apply_masks(params.slow, optax.tree_utils.tree_get(state, "masks"))
    assert (np.asarray(params.slow["up"]) != 0).mean() > 0.9, "without the call it is dense"
    np.testing.assert_array_equal(masked_params(params, state)["up"], wanted["up"])


def test_an_average_of_ones_own_is_passed_in_place_of_params() -> None:
    params, state = train(prune())
    average = optax.incremental_update(params, PARAMS, 0.1)
    wanted = jp.apply_masks(average, state.masks)
    for name, leaf in masked_params(average, state).items():
        np.testing.assert_array_equal(leaf, wanted[name])


@pytest.mark.slow
def test_soft_thresholds_shrink_in_a_part_and_beside_another_method() -> None:
    soft = T.soft_threshold(optax.sgd(0.1), 5e-2, init=-1.0)
    tx = optax.partition({"a": soft, "b": T.ste(ADAM, 0.75), "c": ADAM}, LABELS)
    params, state = train(tx)
    used = masked_params(params, state)
    s = jax.nn.sigmoid(optax.tree_utils.tree_get(state, "thresholds")["up"])
    w = params["up"]
    np.testing.assert_allclose(used["up"], jnp.sign(w) * jax.nn.relu(jnp.abs(w) - s), atol=1e-6)
    assert (used["down"] != 0).sum() == 16


# ---- every kind of tree and transformation ---------------------------------------------------


@pytest.mark.slow
def test_under_vmap_scan_and_grad() -> None:
    tx = optax.with_extra_args_support(free(prune(), 1e-2))

    def run(key: Any) -> Any:
        params = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(key, x.shape), PARAMS)
        carry = params, tx.init(params)

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (masked_params(params, state)["up"] == 0).mean()

        (params, state), zeros = jax.lax.scan(step, carry, length=8)
        grads = jax.grad(lambda p: loss(masked_params(p, state)))(params)
        return zeros, grads["up"], masked_params(params, state)["up"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros, grads, used = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 3))
    assert zeros.shape == (3, 8)
    np.testing.assert_allclose(zeros[:, -1], 0.75)
    assert (np.asarray(grads)[np.asarray(used) == 0] == 0).all()


@pytest.mark.slow
def test_states_that_a_checkpoint_has_turned_into_dicts() -> None:
    params, state = train(optax.chain(free(prune(), 1e-2), optax.scale(1.0)))
    wanted = masked_params(params, state)
    got = masked_params(params, serialization.to_state_dict(state))
    np.testing.assert_array_equal(got["up"], wanted["up"])


@pytest.mark.slow
def test_params_with_leaves_of_the_names_that_states_have() -> None:
    params = {"masks": jnp.ones((4, 4)), "z": jnp.ones((4, 4)), "b1": jnp.ones(3)}
    params |= {"thresholds": jnp.ones((2, 2)), "base_optimizer_state": jnp.ones(2)}
    for tx in (prune(), T.top_kast(ADAM, 0.75, backward=0.5), T.packed(T.rigl(ADAM, 0.75))):
        state = tx.init(params)
        grads = jax.tree.map(jnp.ones_like, params)
        for _ in range(8):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        used = masked_params(params, state)
        assert [int((used[name] != 0).sum()) for name in ("masks", "z", "b1")] == [4, 4, 3]


@pytest.mark.slow
def test_nnx_and_equinox() -> None:
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="schedule_free is around"):
        optimizer = nnx.Optimizer(model, free(prune(), 1e-2), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(8):
        optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    used = masked_params(params, optimizer.opt_state)
    assert (jax.tree.leaves(params)[1] == 0).sum() == 0
    nnx.update(model, used)
    assert (model.kernel[...] != 0).sum() == 32

    net = eqx.filter(eqx.nn.MLP(8, 4, 12, 1, key=jax.random.key(0)), eqx.is_array)
    tx = optax.chain(T.static(ADAM, 0.75, pattern=jp.unstructured(where=lambda p, x: x.ndim == 2)))
    used = masked_params(net, tx.init(net))
    assert (used.layers[0].weight != 0).sum() == 24


@pytest.mark.parametrize("call", [masked_params, T.forward_params])
@pytest.mark.parametrize(
    "params, state, text",
    [
        (
            PARAMS,
            optax.chain(optax.clip(1.0), ADAM).init(PARAMS),
            "holds no masks, a tuple of EmptyState, .*; pass the state .* jp.apply_masks",
        ),
        (PARAMS, {}, "holds no masks, a dict; pass the state of an optimizer inside"),
        (prune().init(PARAMS), PARAMS, "holds no masks, a dict"),  # the wrong way around
        (
            {k: PARAMS[k] for k in ("up", "b")},
            prune().init(PARAMS),
            "opt_state was made for other params .* unknown leaf 'down'.*; pass the params that",
        ),
        (
            {**PARAMS, "more": jnp.ones(2)},
            prune().init(PARAMS),
            "opt_state was made for other params .* has no leaf 'more'",
        ),
        (
            {**PARAMS, "up": PARAMS["up"].T},
            T.static(ADAM, 0.5).init(PARAMS),
            r"opt_state was made for other params .* the mask of up is bool\(8, 16\)",
        ),
    ],
)
def test_what_does_not_belong_together(call: Any, params: Any, state: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(params, state)


def test_an_average_of_other_params_names_the_leaf() -> None:
    _, state = train(free(prune(), 1e-2))
    with pytest.raises(ValueError, match="the average in opt_state .* no leaf 'more'; pass the p"):
        masked_params({**PARAMS, "more": jnp.ones(2)}, state)


# ---- what init says ---------------------------------------------------------------------------

KEEP = jp.keep_params_sparse(MASKS)
UNDONE = {
    "schedule_free": (lambda: free(prune(), 1e-2), "optax's schedule_free is around jp.prune"),
    "schedule_free of rigl": (
        lambda: free(T.rigl(ADAM, 0.5), 1e-2),
        "optax's schedule_free is around jp.training.rigl",
    ),
    "schedule_free of a chain": (
        lambda: free(optax.chain(ADAM, KEEP), 1e-2),
        "optax's schedule_free is around jp.keep_params_sparse",
    ),
    "schedule_free inside": (
        lambda: prune(free_adamw(1e-2)),
        "jp.prune wraps optax.contrib.schedule_free: params are sparse, but the average",
    ),
    "schedule_free deep inside": (
        lambda: prune(optax.chain(optax.clip(1.0), optax.MultiSteps(free_adamw(1e-2), 2))),
        "jp.prune wraps optax.contrib.schedule_free",
    ),
    "lookahead": (lambda: optax.lookahead(prune(), 5, 0.5), "optax's lookahead is around jp.prune"),
    "mechanize": (lambda: optax.contrib.mechanize(prune()), "optax's mechanize is around jp.prune"),
    "conditionally_transform": (
        lambda: optax.conditionally_transform(prune(), lambda step: step > 3),
        "optax's conditionally_transform is around jp.prune",
    ),
    "reduce_on_plateau": (
        lambda: optax.chain(prune(), optax.contrib.reduce_on_plateau()),
        "jp.prune stands before optax's reduce_on_plateau in optax.chain",
    ),
    "scale": (lambda: optax.chain(prune(), optax.scale(0.5)), "before a link without state"),
    "decay": (
        lambda: optax.chain(ADAM, KEEP, optax.add_decayed_weights(0.1)),
        "jp.keep_params_sparse stands before optax's add_decayed_weights",
    ),
    "sgd after": (lambda: optax.chain(KEEP, ADAM), "jp.keep_params_sparse stands before optax's"),
    "outer chain": (
        lambda: optax.chain(optax.chain(optax.clip(1.0), prune()), optax.trace(0.9)),
        "jp.prune stands before optax's trace in optax.chain",
    ),
    "named_chain": (
        lambda: optax.named_chain(("p", prune()), ("e", optax.ema(0.9))),
        "jp.prune stands before optax's ema in optax.chain",
    ),
    "in MultiSteps": (
        lambda: optax.MultiSteps(optax.chain(prune(), optax.scale_by_schedule(abs)), 2),
        "jp.prune stands before optax's scale_by_schedule",
    ),
    "a masked link": (
        lambda: optax.chain(prune(), optax.masked(optax.scale(2.0), True)),
        "jp.prune stands before optax's masked",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDONE)
def test_init_says_once_what_undoes_the_zeros_and_at_the_users_line(name: str) -> None:
    build, text = UNDONE[name]
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    for init in (build().init, jax.jit(build().init)):
        with pytest.warns(UserWarning, match=text) as caught:
            init(params)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "jp.training.masked_params(params, opt_state)" in str(caught[0].message)


HARMLESS = {
    "prune": prune,
    "last of a chain": lambda: optax.chain(
        optax.clip(1.0), optax.add_decayed_weights(0.1), prune()
    ),
    "keep last": lambda: optax.chain(ADAM, KEEP),
    "two of ours": lambda: optax.chain(prune(), KEEP),
    "ours masked": lambda: optax.chain(prune(), optax.masked(optax.chain(KEEP), True)),
    "not negative": lambda: optax.chain(prune(), optax.keep_params_nonnegative()),
    "nested chains": lambda: optax.chain(optax.clip(1.0), optax.chain(ADAM, optax.chain(KEEP))),
    "MultiSteps": lambda: optax.MultiSteps(prune(), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(prune(), 3),
    "partition": lambda: optax.partition({"a": prune(), "b": prune(), "c": ADAM}, LABELS),
    "inject": lambda: optax.inject_hyperparams(lambda r: prune(optax.adam(r)))(0.01),
    "inside": lambda: prune(optax.chain(optax.clip(1.0), optax.contrib.mechanize(ADAM))),
    "prune in prune": lambda: prune(prune()),
    "penalty": lambda: T.regularized(ADAM, 0.5, penalty=T.l1(), strength=0.1, at=3),
    "no zeros to undo": lambda: optax.chain(T.ste(ADAM, 0.5), optax.scale(0.5)),
    "unknown link": lambda: optax.chain(
        prune(), optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s))
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_init_is_silent_where_zeros_last(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = HARMLESS[name]().init(PARAMS)
        jax.eval_shape(HARMLESS[name]().init, PARAMS)
    assert T.masked_params(PARAMS, state)


def test_asking_for_the_tree_of_a_state_says_nothing() -> None:
    tx = optax.chain(prune(), optax.contrib.reduce_on_plateau())
    with pytest.warns(UserWarning, match="reduce_on_plateau"):
        state = tx.init(PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optax.tree_map_params(tx, lambda x: x, state)


def test_the_functions_that_are_recognised_are_optax_s() -> None:
    """A canary: if optax renames one of them, the table has to follow."""
    for name in wrappers.AROUND | dict.fromkeys(wrappers.HARMLESS):
        assert hasattr(optax, name) or hasattr(optax.contrib, name), name
    assert set(wrappers.AROUND) <= {case.split()[0] for case in UNDONE}
