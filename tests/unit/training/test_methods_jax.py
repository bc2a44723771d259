"""Training methods under jit, vmap, scan, donation, sharding and checkpoints; every error."""

import functools
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxprune as jp
from tests.helpers.oracles import ranked
from tests.helpers.processes import environment

training = jp.training
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPE = (6, 4)
MAKE: dict[str, Any] = {
    "set": lambda inner: training.set(inner, 0.5, every=2, pattern=ranked),
    "rigl": lambda inner: training.rigl(inner, 0.5, every=2, pattern=ranked),
    "snfs": lambda inner: training.snfs(inner, 0.5, every=2),
    "ac_dc": lambda inner: training.ac_dc(
        inner, 0.5, begin=1, end=5, sparse_steps=2, dense_steps=1, pattern=ranked
    ),
    "top_kast": lambda inner: training.top_kast(inner, 0.5, backward=0.25, pattern=ranked),
    "movement": lambda inner: training.movement(
        inner, jp.schedules.cubic(0.0, 0.5, begin=0, end=4), pattern=ranked
    ),
    "soft_threshold": lambda inner: training.soft_threshold(inner, 0.5),
    "admm": lambda inner: training.admm(inner, 0.5, every=2, pattern=ranked),
}
METHODS = {name: make(optax.adam(0.1)) for name, make in MAKE.items()}
STEPS = 7


def make_params(key: int = 0) -> Any:
    return {"w": jax.random.normal(jax.random.key(key), SHAPE), "b": jnp.ones(4)}


def step(tx: Any, params: Any, state: Any, t: Any, **extra: Any) -> Any:
    grads = jax.tree.map(lambda w: w - jnp.sin(t + w), training.forward_params(params, state))
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


@functools.cache
def jitted(name: str) -> Any:
    return fast_jit(functools.partial(step, METHODS[name]))


def train(name: str, params: Any, state: Any, start: int, stop: int) -> Any:
    for t in range(start, stop):
        params, state = jitted(name)(params, state, jnp.float32(t))
    return params, state


@functools.cache
def trained(name: str) -> Any:
    params = make_params()
    return train(name, params, METHODS[name].init(params), 0, STEPS)


def assert_equal_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b))):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# ---- one state, of arrays that keep their types ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_arrays_of_fixed_types(name: str) -> None:
    tx, params = METHODS[name], make_params()
    state = tx.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    _, after = jax.eval_shape(functools.partial(step, tx), params, state, 0.0)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_types_are_never_promoted_by_accident(name: str, dtype: Any) -> None:
    tx = MAKE[name](optax.sgd(0.1, momentum=0.9))  # Adam itself mixes types
    params = jax.tree.map(lambda p: p.astype(dtype), make_params())
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("name", METHODS)
def test_tree_map_params_walks_the_state(name: str) -> None:
    """How users build shardings for an optimizer's state."""
    state = METHODS[name].init(make_params())
    names = {"w": "weights", "b": "bias"}
    specs = optax.tree_map_params(
        METHODS[name], lambda _, n: n, state, names, transform_non_params=lambda _: "scalar"
    )
    assert specs.masks == names and specs.count == "scalar"
    assert jax.tree.structure(specs) == jax.tree.structure(state)


# ---- transformations of JAX -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MAKE))
def test_scan_and_donation_equal_the_loop(name: str) -> None:
    tx, wanted = METHODS[name], trained(name)
    body = lambda carry, t: (step(tx, *carry, t), None)  # noqa: E731
    params = make_params()
    scanned, _ = fast_jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS, dtype=jnp.float32)))(
        (params, tx.init(params))
    )
    donating = fast_jit(functools.partial(step, tx), donate_argnums=(0, 1))
    donated = make_params(), tx.init(make_params())
    for t in range(STEPS):
        donated = donating(*donated, jnp.float32(t))
    for params, state in (scanned, donated):  # another program may round otherwise
        chex.assert_trees_all_close(params, wanted[0], rtol=1e-4, atol=1e-6)
        assert_equal_bits(state.masks, wanted[1].masks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl", "snfs", "top_kast"])
def test_an_ensemble_is_trained_member_by_member(name: str) -> None:
    tx = METHODS[name]
    members = [make_params(), make_params(1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    state = jax.vmap(tx.init)(stacked)
    update = fast_jit(jax.vmap(functools.partial(step, tx), in_axes=(0, 0, None)))
    for t in range(STEPS):
        stacked, state = update(stacked, state, jnp.float32(t))
    alone = trained(name)[1], train(name, members[1], tx.init(members[1]), 0, STEPS)[1]
    for i, other in enumerate(alone):
        assert_equal_bits(jax.tree.map(lambda m, i=i: m[i], state.masks), other.masks)


@pytest.mark.slow
def test_members_of_an_ensemble_may_have_their_own_keys() -> None:
    keys = jax.random.split(jax.random.key(5), 3)

    def member(key: Any) -> Any:
        score = functools.partial(jp.random, key=key)
        tx = training.set(optax.sgd(0.1), 0.5, every=1, score=score, pattern=ranked)
        params, masks = make_params(), []
        state = tx.init(params)
        for t in range(3):
            masks.append(state.masks["w"])
            params, state = step(tx, params, state, t, key=key)
        return jnp.stack(masks)

    first, *others = np.asarray(fast_jit(jax.vmap(member))(keys))
    for other in others:
        assert (first != other).any(axis=(1, 2)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_continues_from_a_checkpoint_bitwise(name: str, tmp_path: Any) -> None:
    params = make_params()
    half = train(name, params, METHODS[name].init(params), 0, 3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: (params, METHODS[name].init(params)))
        restored = checkpointer.restore(tmp_path / "half", like)
    assert_equal_bits(train(name, *restored, 3, STEPS), trained(name))


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxprune as jp

# One program at a time: two that exchange data can wait for each other's threads for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = NamedSharding(mesh, P("x", "y"))
params = {"w": jax.device_put(jax.random.normal(jax.random.key(0), (256, 512)), placed)}
adam, t = optax.adam(0.1), jp.training
normal, whole = jax.random.normal(jax.random.key(1), (4, 256, 512)), 256 * 512
examples = {"w": jax.device_put(normal, NamedSharding(mesh, P(None, "x", "y")))}
for name, tx, extra, most in [  # most: entries that one exchange may hold
    ("set", t.set(adam, 0.9, every=2), {}, 2 * 512),
    ("rigl", t.rigl(adam, 0.9, every=2), {}, 8),
    ("packed", t.packed(t.rigl(adam, 0.9, every=2)), {}, 8),
    ("snfs", t.snfs(adam, 0.9, every=2), {}, 8),
    ("top_kast", t.top_kast(adam, 0.9, backward=0.5), {}, 8),
    ("admm", t.admm(adam, 0.9, every=2), {}, 8),
    # These gather, and say so: a sort, and blocks of neighbours in memory.
    ("LAMP", jp.prune(adam, jp.scores.lamp, 0.9), {}, whole),
    ("WoodFisher", jp.prune(adam, jp.scores.woodfisher, 0.9), {"grads": examples}, 4 * whole),
]:
    state = jax.block_until_ready(tx.init(params))
    bits = optax.tree_utils.tree_get(state, "masks")["w"]
    assert jax.tree.leaves(bits)[0].sharding.is_equivalent_to(placed, 2), name
    update = jax.jit(tx.update, donate_argnums=1).lower(params, state, params, **extra)
    compiled = update.compile()
    moved = re.findall(r"= (.*?) (?:all-|collective|reduce-scatter)", compiled.as_text())
    dims = re.findall(r"\\w+\\[([\\d,]*)\\]", " ".join(moved))
    sizes = [int(np.prod([int(d) for d in each.split(",") if d])) for each in dims]
    assert sizes and max(sizes) <= most, (name, sizes)
    assert most <= 1024 or max(sizes) >= whole, (name, "gathers no more: say so")
    # Where results will lie; not run, for eight devices on two cores may wait for threads for ever.
    updates, after = compiled.output_shardings
    bits = jax.tree.leaves(optax.tree_utils.tree_get(after, "masks")["w"])[0]
    used = jax.tree.leaves(t.forward_params(params, state))[0].sharding
    for sharding in (updates["w"], bits, used):
        assert sharding.is_equivalent_to(placed, 2), name
print("sharded", len(jax.devices()))
"""


@pytest.mark.slow
def test_a_sharded_leaf_stays_where_it_is() -> None:
    """Masks lie as params do, and devices exchange counts, but for what sorts."""
    command = [sys.executable, "-c", SHARDED]
    run = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=300)
    assert run.stdout.strip().endswith("sharded 8"), run.stdout + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl", "top_kast"])
def test_packed_masks_are_the_same_masks(name: str) -> None:
    tx, params = training.packed(METHODS[name]), make_params()
    state, one = tx.init(params), fast_jit(functools.partial(step, tx), donate_argnums=(0, 1))
    for t in range(STEPS):
        params, state = one(params, state, jnp.float32(t))
    wanted = trained(name)
    assert one._cache_size() == 1
    assert state.masks["w"].bits.nbytes == 3  # 24 entries
    assert_equal_bits(jp.masks.unpack(state.masks), wanted[1].masks)
    chex.assert_trees_all_close(params, wanted[0], rtol=1e-4, atol=1e-6)
    used = training.forward_params(params, state)
    assert not np.asarray(used["w"])[~np.asarray(wanted[1].masks["w"])].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl", "top_kast", "soft_threshold"])
def test_a_method_may_have_a_part_of_the_leaves(name: str) -> None:
    """In optax.masked and in optax.partition."""
    params = make_params()
    matrices = {"w": "matrix", "b": "vector"}
    for tx in (
        optax.masked(METHODS[name], {"w": True, "b": False}),
        optax.partition({"matrix": METHODS[name], "vector": optax.sgd(0.1)}, matrices),
    ):
        after, state = fast_jit(functools.partial(step, tx))(params, tx.init(params), 1.0)
        used = training.forward_params(after, state)
        np.testing.assert_array_equal(used["b"], after["b"])
        assert int((used["w"] == 0).sum()) == 12 or name == "soft_threshold"
    tx, nested = optax.masked(METHODS[name], {"net": True, "rest": False}), {"net": params}
    nested["rest"] = [jnp.ones(2), jnp.ones(3)]  # a branch that is left out as one
    used = training.forward_params(nested, tx.init(nested))
    assert jax.tree.structure(used) == jax.tree.structure(nested)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_kast", "soft_threshold"])
def test_nnx_optimizer_trains_at_the_forward_weights(name: str) -> None:
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, METHODS[name], wrt=nnx.Param)
    state = nnx.state(model, nnx.Param)
    used = training.forward_params(state, optimizer.opt_state)
    assert jax.tree.structure(used) == jax.tree.structure(state)
    graph = nnx.graphdef(model)

    @nnx.jit
    def one(model: Any, optimizer: Any, x: Any) -> Any:
        used = training.forward_params(nnx.state(model, nnx.Param), optimizer.opt_state)
        optimizer.update(model, jax.grad(lambda p: jnp.mean(nnx.merge(graph, p)(x) ** 2))(used))

    before = np.asarray(model.kernel[...])
    one(model, optimizer, jnp.ones((2, 6)))
    assert (np.asarray(model.kernel[...]) != before).any()


# ---- what is trained in place of what ------------------------------------------------------


def test_the_first_forward_pass_may_be_sparse() -> None:
    params = make_params()
    state = training.static(optax.sgd(0.1), 0.75).init(params)
    used = training.forward_params(params, state)
    assert int((used["w"] != 0).sum()) == 6
    np.testing.assert_array_equal(used["b"], params["b"])


@pytest.mark.slow
def test_one_shot_prunes_at_its_step_with_the_gradient_of_that_step() -> None:
    tx = training.one_shot(optax.sgd(0.0), 0.5, at=2, score=jp.saliency)
    params = {"w": jnp.ones((1, 4))}
    state, update = tx.init(params), fast_jit(tx.update)
    for t in range(4):
        grads = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]]) if t == 2 else jnp.array([[4.0, 3, 2, 1]])}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].tolist() == ([[1, 1, 1, 1]] if t < 2 else [[0, 0, 1, 1]])


def test_masks_before_training_may_come_from_any_score() -> None:
    params = {"w": jnp.ones((1, 4))}
    score = functools.partial(jp.saliency, grad={"w": jnp.array([[1.0, 4.0, 3.0, 2.0]])})
    for method in (training.static, training.rigl, training.set, training.snfs):
        state = method(optax.sgd(0.1), 0.5, score=score).init(params)
        assert state.masks["w"].astype(int).tolist() == [[0, 1, 1, 0]]


# ---- errors ---------------------------------------------------------------------------------

ADAM = optax.adam(1e-3)
W = {"w": jnp.ones((4, 4))}
PHASES: Any = {"begin": 0, "end": 9, "sparse_steps": 1, "dense_steps": 1}


def fn(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def needs_norms(params: Any, *, norms: Any, **evidence: Any) -> Any:
    return norms


STRUCTURE = jp.infer_structure(
    fn, {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}, jnp.ones((1, 3))
)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: training.rigl(ADAM, 90), ValueError, "sparsity ends at 90; wanted the fraction"),
        (lambda: training.rigl(optax.adam, 0.9), TypeError, "inner is a function; wanted an optax"),
        (lambda: training.rigl(ADAM, 0.9, every=0), ValueError, "every is 0; wanted the number"),
        (
            lambda: training.rigl(ADAM, 0.9, drop_fraction=30),
            ValueError,
            r"drop_fraction is 30; wanted the fraction of kept entries to replace, in \[0, 1\]",
        ),
        (
            lambda: training.set(ADAM, 0.9, drop_fraction=optax.linear_schedule(2.0, 0.1, 5)),
            ValueError,
            "drop_fraction is 2.0; wanted",
        ),
        (
            lambda: training.rigl(ADAM, 0.9, moments="zero"),  # type: ignore[arg-type]
            ValueError,
            "moments is 'zero'; wanted 'reset' or 'inherit'",
        ),
        (
            lambda: training.rigl(ADAM, 0.9, score=jp.saliency).init(W),
            TypeError,
            "init makes the first masks and has params alone, so the score failed: .*grad.*; bind",
        ),
        (
            lambda: training.static(ADAM, jp.schedules.cubic(0, 0.9, begin=0, end=9)),  # type: ignore[arg-type]
            ValueError,
            "static makes masks of one sparsity, and is given a schedule; pass a number such as",
        ),
        (
            lambda: training.ac_dc(ADAM, jp.schedules.constant(0.5), **PHASES),  # type: ignore[arg-type]
            ValueError,
            "jp.training.ac_dc makes masks of one sparsity, and is given a schedule",
        ),
        (
            lambda: training.ste(ADAM, 0.5, pattern=jp.n_m),  # type: ignore[arg-type]
            TypeError,
            r"pattern is jp.n_m itself, which makes patterns; call it: jp.n_m\(2, 4\)",
        ),
        (
            lambda: training.static(ADAM, 0.9, score=needs_norms).init(W),
            TypeError,
            "so the score failed: .*norms.*; bind its evidence: functools.partial",
        ),
        (
            lambda: training.static(ADAM, 0.9, score=0.5),  # type: ignore[arg-type]
            TypeError,
            "score is a float; wanted a function .* such as jp.magnitude",
        ),
        (
            lambda: training.static(ADAM, 0.9, score=lambda params, **_: {}).init(W),
            ValueError,
            "the tree of scores does not match params: it has no leaf 'w'",
        ),
        (
            lambda: training.sr_ste(ADAM, 0.9).init(W),
            ValueError,
            r"n_m\(2, 4\) has sparsity 0.5 and can't express 0.9",
        ),
        (
            lambda: training.rigl(ADAM, 0.9, pattern=jp.n_m(2, 4)).init(W),
            ValueError,
            "can't express 0.9",
        ),
        (
            lambda: training.rigl(ADAM, 0.5, pattern=jp.block((8, 8))).init(W),
            ValueError,
            r"block\(\(8, 8\)\) does not tile w, shape \(4, 4\)",
        ),
        (
            lambda: training.sr_ste(ADAM, decay=-1.0),
            ValueError,
            r"decay is -1.0; wanted a number >= 0",
        ),
        (
            lambda: training.top_kast(ADAM, 0.5, backward=0.9),
            ValueError,
            "backward is 0.9 in the end; wanted a sparsity from 0 to that of the forward pass, 0.5",
        ),
        (
            lambda: training.ac_dc(ADAM, 0.5, **{**PHASES, "begin": 9}),
            ValueError,
            "phases take turns from step 9 to 9; wanted 0 <= begin < end",
        ),
        (
            lambda: training.ac_dc(ADAM, 0.5, **{**PHASES, "dense_steps": 0}),
            ValueError,
            "sparse_steps is 1 and dense_steps 0; wanted at least 1 each",
        ),
        (lambda: training.admm(ADAM, 0.5, rho=-1.0), ValueError, "rho is -1.0; wanted a number"),
        (lambda: training.soft_movement(ADAM, -0.1), ValueError, "strength is -0.1; wanted"),
        (
            lambda: training.regularized(ADAM, 0.5, penalty=training.l1(), strength=0.1, at=0),
            ValueError,
            "at is 0; wanted a step >= 1, before which the penalty acts; to prune at once",
        ),
        (
            lambda: training.network_slimming(ADAM, 0.5, STRUCTURE, at=5),
            ValueError,
            "no scale of a normalisation lies on the dimensions .*up",
        ),
        (
            lambda: training.group_lasso(STRUCTURE, dims="heads"),
            ValueError,
            "dims='heads' matches no prunable dimension",
        ),
        (
            lambda: training.add_penalty(training.l1(), 0.1).update(
                W, training.add_penalty(training.l1(), 0.1).init(W)
            ),
            ValueError,
            "add_penalty computes the penalty of params, and params is None; write",
        ),
        (
            lambda: training.packed(ADAM).init(W),
            ValueError,
            "packed finds no masks in the state; wrap a training method",
        ),
        (
            lambda: training.forward_params(W, ADAM.init(W)),
            ValueError,
            "opt_state holds no masks, a tuple of .*; pass the state of an optimizer inside",
        ),
    ],
)
def test_bad_settings_say_what_to_write_instead(build: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        build()


@pytest.mark.parametrize("name", METHODS)
def test_bad_calls_of_update_name_the_method_and_the_leaf(name: str) -> None:
    tx, params = METHODS[name], make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=f"jp.training.{name} lands .* params is None"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="tree of updates .* no leaf 'b'.*; pass the gradients"):
        tx.update(None, state, params)
    with pytest.raises(ValueError, match=r"updates have the shape \(2,\) at b, params have \(4,\)"):
        tx.update({**params, "b": jnp.ones(2)}, state, params)
    other = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    restored = rf"the state of jp.training.{name} was made for other parameters .*the mask of w"
    with pytest.raises(ValueError, match=restored):
        tx.update(other, state, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_state_that_a_checkpoint_changed_says_how_to_restore_it(name: str) -> None:
    tx, params = METHODS[name], make_params()
    state = tx.init(params)
    target = r"restore a checkpoint with jax.eval_shape\(tx.init, params\) as its target"
    with pytest.raises(TypeError, match=f"the state of jp.training.{name} is a dict; .*{target}"):
        tx.update(params, state._asdict(), params)
    for masks, found in (
        (list(state.masks.values()), "it has no leaf 'b'"),
        (jax.tree.map(lambda m: m.astype(jnp.uint8), state.masks), r"the mask of b is uint8\(\)"),
    ):
        with pytest.raises(ValueError, match=rf"the state of .*{target} \(.*{found}"):
            tx.update(params, state._replace(masks=masks), params)
    shape = r"the new mask of w has the shape \(6, 4\), that in the state \(1, 4\); make new"
    if name in ("set", "rigl", "top_kast", "movement", "soft_threshold"):
        masks = {**state.masks, "w": state.masks["w"][:1]}  # those of another pattern
        with pytest.raises(ValueError, match=shape):
            tx.update(params, state._replace(masks=masks), params)


def test_a_method_whose_masks_change_shape_is_told() -> None:
    def renew(params: Any, masks: Any, sparsity: Any, **evidence: Any) -> Any:
        return {"w": jnp.ones((1, 4), bool)}

    tx = training.method(optax.sgd(0.1), 0.5, renew, pattern=jp.unstructured())
    text = r"the new mask of w has the shape \(1, 4\), that in the state \(4, 4\); make new masks"
    with pytest.raises(ValueError, match=text):
        tx.update(W, tx.init(W), W)
