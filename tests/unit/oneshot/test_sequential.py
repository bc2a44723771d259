"""Block by block: the same as calibrating and pruning by hand, and fit to what blocks will meet."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.oneshot import order as orders
from jaxprune.oneshot.drift import Corrector, _cross
from jaxprune.typing import path_str


def block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.fixture(scope="module")
def network():
    keys = jax.random.split(jax.random.key(0), 7)
    blocks = [
        {"up": jax.random.normal(a, (8, 16)), "down": jax.random.normal(b, (16, 8)) / 4}
        for a, b in (keys[:2], keys[2:4], keys[4:6])
    ]  # fmt: skip
    x = jax.random.normal(keys[6], (4, 64, 8))
    return blocks, list(x)


def sparsegpt(p, stats):
    return jp.oneshot.sparsegpt(p, stats, 0.5)


@pytest.mark.slow
def test_equals_the_loop_by_hand(network):
    blocks, batches = network
    pruned, masks = jp.oneshot.sequential(block, blocks, iter(batches), sparsegpt)
    states = batches
    for p, got, mask in zip(blocks, pruned, masks, strict=True):
        want, kept = sparsegpt(p, jp.calibrate(block, p, states))
        chex.assert_trees_all_close(got, want, atol=1e-5)
        chex.assert_trees_all_equal(mask, kept)
        states = [block(got, x) for x in states]


@pytest.mark.slow
def test_a_pruned_block_may_have_got_a_bias(network):
    blocks, batches = network
    with_bias = lambda p, x: block(p, x) + p.get("bias", 0.0)  # noqa: E731

    def biased(p, stats):
        pruned, masks = sparsegpt(p, stats)
        return pruned | {"bias": jnp.ones(8)}, masks | {"bias": jnp.asarray(True)}

    pruned, masks = jp.oneshot.sequential(with_bias, blocks, batches, biased)
    assert all("bias" in p and "bias" in m for p, m in zip(pruned, masks))
    met = [with_bias(pruned[0], x) for x in batches]
    want, _ = sparsegpt(blocks[1], jp.calibrate(block, blocks[1], met))
    chex.assert_trees_all_close({k: pruned[1][k] for k in want}, want, atol=1e-5)


@pytest.mark.slow
def test_each_block_is_fit_to_the_inputs_that_it_will_meet(network):
    """The least squares solution there can't be worse than that for the dense network's inputs."""
    blocks, batches = network

    def refit(p, stats):
        masks = jp.unstructured()(jp.magnitude(p), 0.5)  # not of the inputs: the same in both
        return jp.oneshot.least_squares(p, masks, stats, damping=1e-6), masks

    pruned, _ = jp.oneshot.sequential(block, blocks, batches, refit)
    met, dense = batches, batches
    for p, new in zip(blocks, pruned, strict=True):
        stats = jp.calibrate(block, p, met)
        other, _ = refit(p, jp.calibrate(block, p, dense))
        here, there = (jp.oneshot.output_error(p, tree, stats) for tree in (new, other))
        assert all(here[k] <= there[k] * 1.001 for k in p)
        met, dense = [block(new, x) for x in met], [block(p, x) for x in dense]
    assert here["down"] < 0.99 * there["down"]  # and there is a difference


def test_options_and_progress_are_passed_on(network):
    blocks, batches = network
    seen = []

    def prune(p, stats):
        seen.append((stats.grams["up"], stats.norms["down"]))
        return p, jax.tree.map(lambda _: True, p)

    jp.oneshot.sequential(
        block, blocks, batches, prune, where=lambda path, leaf: path == "up", grams=False,
        progress=lambda blocks: list(blocks)[:1],
    )  # fmt: skip
    assert seen == [(None, None)]


def only(*names):
    return lambda path, leaf: path in names


@pytest.mark.slow
def test_groups_equal_the_loop_by_hand(network):
    """The second group's statistics come from the pruned first one; a leaf of no group stays."""
    blocks, batches = network
    blocks = [p | {"more": jnp.ones((8, 8))} for p in blocks]
    wide = lambda p, x: block(p, x) + x @ p["more"] / 8  # noqa: E731
    order = [only("up"), only("down")]
    pruned, masks = jp.oneshot.sequential(wide, blocks, batches, sparsegpt, order=order)
    states = batches
    for p, got, mask in zip(blocks, pruned, masks, strict=True):
        want, kept = p, {"more": True}
        for name in ("up", "down"):
            stats = jp.calibrate(wide, want, states, where=only(name))
            pattern = jp.unstructured(where=only(name))
            new, chosen = jp.oneshot.sparsegpt(want, stats, 0.5, pattern=pattern)
            want, kept = want | {name: new[name]}, kept | {name: chosen[name]}
        chex.assert_trees_all_close(got, want, atol=1e-5)
        chex.assert_trees_all_equal(mask, kept)
        states = [wide(got, x) for x in states]


def test_prune_is_given_a_group_and_none_for_other_leaves(network):
    blocks, batches = network
    seen = []

    def prune(p, stats):
        seen.append({k for k, leaf in p.items() if leaf is not None})
        assert (stats.grams["up"] is None) == (p["up"] is None)
        return p, jax.tree.map(lambda _: True, p)

    jp.oneshot.sequential(block, blocks, batches, prune, order=[only("down"), only("up")])
    assert seen == [{"down"}, {"up"}] * len(blocks)


def test_groups_are_checked(network):
    blocks, batches = network
    with pytest.raises(ValueError, match=r"order\[1\] selects no leaf .* its leaves are down, up"):
        jp.oneshot.sequential(block, blocks, batches, sparsegpt, order=[only("up"), only("gate")])
    with pytest.raises(ValueError, match=r"order\[0\] and order\[1\] both select up"):
        jp.oneshot.sequential(
            block, blocks, batches, sparsegpt, order=[only("up"), only("up", "down")]
        )


@pytest.mark.slow
def test_drift_is_made_up_for_as_least_squares_do(network):
    """Beside the same sums in numpy, float64: what prune is given, and what comes of it."""
    blocks, batches = network
    given = []

    def prune(p, stats):
        given.append(next((k, np.asarray(leaf)) for k, leaf in p.items() if leaf is not None))
        return sparsegpt(p, stats)

    order = [only("up"), only("down")]
    pruned, _ = jp.oneshot.sequential(
        block, blocks, batches, prune, order=order, error_propagation=0.5
    )
    ours = theirs = np.concatenate(batches).astype(np.float64)
    for k, (dense, got) in enumerate(zip(blocks, pruned, strict=True)):
        dense, got = (
            {n: np.asarray(w, np.float64) for n, w in tree.items()} for tree in (dense, got)
        )
        want = least_squares(dense["up"], ours, theirs, 0.5)
        assert given[2 * k][0] == "up"
        np.testing.assert_allclose(given[2 * k][1], want, atol=2e-3)
        x, d = np.tanh(ours @ got["up"]), np.tanh(theirs @ dense["up"])
        want = least_squares(dense["down"], x, d, 0.5)
        np.testing.assert_allclose(given[2 * k + 1][1], want, atol=2e-3)  # float32 throughout
        assert abs(want - dense["down"]).max() > 0.05
        ours, theirs = ours + x @ got["down"], theirs + d @ dense["down"]


def least_squares(w, x, d, share):
    """The W' of the module's docstring, by a stacked system in place of normal equations."""
    return toward(w, x, (1 - share) * x @ w + share * d @ w)


def toward(w, x, target):
    damping = 0.01 * np.mean(np.sum(x**2, 0))
    rows = np.concatenate([x, np.sqrt(damping) * np.eye(len(w))])
    return np.linalg.lstsq(rows, np.concatenate([target, np.sqrt(damping) * w]), rcond=None)[0]


@pytest.mark.slow
def test_all_of_the_drift_brings_outputs_nearer_to_the_dense_ones(network):
    blocks, batches = network
    order, errors = [only("up"), only("down")], {}
    for drift in (0.0, 1.0):
        pruned, _ = jp.oneshot.sequential(
            block, blocks, batches, sparsegpt, order=order, error_propagation=drift
        )
        got = want = jnp.concatenate(batches)
        for p, q in zip(blocks, pruned, strict=True):
            got, want = block(q, got), block(p, want)
        errors[drift] = float(jnp.linalg.norm(got - want))
    assert errors[1.0] < 0.95 * errors[0.0]


@pytest.mark.slow
def test_hidden_states_are_made_up_for_as_least_squares_do(network):
    """What is added to them is; what isn't makes up for its own outputs, beside numpy's sums."""
    blocks, batches = network
    given = []

    def prune(p, stats):
        given.append(next((k, np.asarray(leaf)) for k, leaf in p.items() if leaf is not None))
        return sparsegpt(p, stats)

    pruned, _ = jp.oneshot.sequential(
        block, blocks, batches, prune, error_propagation=0.5, error_of="states"
    )
    ours = theirs = np.concatenate(batches).astype(np.float64)
    for k, (dense, got) in enumerate(zip(blocks, pruned, strict=True)):
        dense, got = (
            {n: np.asarray(w, np.float64) for n, w in tree.items()} for tree in (dense, got)
        )
        want = least_squares(dense["up"], ours, theirs, 0.5)
        np.testing.assert_allclose(given[2 * k][1], want, atol=2e-3)
        x, d = np.tanh(ours @ got["up"]), np.tanh(theirs @ dense["up"])
        away = theirs + d @ dense["down"] - ours - x @ dense["down"]
        want = toward(dense["down"], x, x @ dense["down"] + 0.5 * away)
        assert given[2 * k + 1][0] == "down"
        np.testing.assert_allclose(given[2 * k + 1][1], want, atol=4e-3)
        ours, theirs = ours + x @ got["down"], theirs + d @ dense["down"]


@pytest.mark.slow
def test_hidden_states_stay_nearer_to_the_dense_ones_where_they_are_made_up_for(network):
    """On the calibration's tokens; a quarter of the hidden units goes."""
    blocks, batches = network
    units = np.arange(blocks[0]["up"].shape[1]) % 4 > 0

    def prune(p, stats):
        if p["up"] is not None:
            return p | {"up": p["up"] * units}, {"up": jnp.asarray(units)[None], "down": None}
        masks = {"up": None, "down": jnp.asarray(units)[:, None]}
        return jp.oneshot.refit(p, masks, stats), masks

    errors = {}
    for of in ("outputs", "states"):
        pruned, _ = jp.oneshot.sequential(
            block, blocks, batches, prune, error_propagation=1.0, error_of=of
        )
        got = want = jnp.concatenate(batches)
        for p, q in zip(blocks, pruned, strict=True):
            got, want = block(q, got), block(p, want)
        errors[of] = float(jnp.linalg.norm(got - want))
    assert errors["states"] < 0.97 * errors["outputs"]


USES = {
    "kernel": ((6, 4), lambda p, x: x @ p["w"]),
    "transposed": ((4, 6), lambda p, x: x @ p["w"].T),
    "twice": ((6, 6), lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]),
    "heads": ((6, 2, 3), lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"])),
    "experts": ((2, 6, 3), lambda p, x: jnp.einsum("td,edk->tek", x, p["w"])),
    "one of a stack": ((2, 6, 3), lambda p, x: x @ p["w"][1]),
    "convolution": (
        (3, 6, 4),
        lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_products_of_equal_inputs_are_gram_matrices(use):
    """X^T D where D is X, for every way in which a weight is used."""
    shape, fn = USES[use]
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    x = jax.random.normal(jax.random.key(1), (5, 6))
    stats = jp.calibrate(fn, params, [x])
    (found,) = _cross(fn, (True,), (False,), params, (x,), (x,)).values()
    np.testing.assert_allclose(found, stats.grams["w"], rtol=1e-5, atol=1e-5)
    same = Corrector(fn)(params, [((x,), (x,))], stats, 1.0)
    np.testing.assert_allclose(same["w"], params["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_drift_is_checked(network):
    blocks, batches = network
    run = functools.partial(jp.oneshot.sequential, block, blocks, batches, sparsegpt)
    with pytest.raises(ValueError, match=r"error_propagation=1.5; wanted a share in \[0, 1\]"):
        run(order=[only("up")], error_propagation=1.5)
    with pytest.raises(ValueError, match="up, .*has no Gram matrix .* without grams"):
        run(order=[only("up")], error_propagation=0.5, grams=False)
    with pytest.raises(ValueError, match='error_of=.stream.; wanted "outputs" or "states"'):
        run(error_propagation=0.5, error_of="stream")
    with pytest.raises(ValueError, match='error_of="states" .* give a share of it, error_prop'):
        run(error_of="states")

    def looped(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"]), x)

    stacks = [{"w": jnp.eye(8)}]
    with pytest.raises(ValueError, match=r"inputs of w, shape \(8, 8\), token by token"):
        jp.oneshot.sequential(
            looped, stacks, batches, sparsegpt, order=[only("w")], error_propagation=0.5
        )


def attention(p, x):
    q, k, v = (x @ p["attention"][name] for name in "qkv")
    return x + jax.nn.softmax(q @ k.T) @ v @ p["attention"]["o"]


def mlp(p, x):
    x = x * p["scale"]
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"] + p["bias"]


def squares(*names):
    return {name: jnp.eye(6) for name in names}


ORDERS = {
    "attention and MLP": (
        lambda p, x: mlp(p, attention(p, x)),
        [{"attention/q", "attention/k", "attention/v"}, {"attention/o"}, {"gate", "up"}, {"down"}],
    ),
    "beside each other": (
        lambda p, x: jax.jit(attention)(p, x) + jax.checkpoint(mlp)(p, x),
        [
            {"attention/q", "attention/k", "attention/v", "gate", "up"},
            {"attention/o", "down"},
        ],
    ),
    "used again": (lambda p, x: x @ p["gate"] @ p["up"] @ p["gate"], [{"gate"}, {"up"}]),
    "multiplied by each other": (
        lambda p, x: (x * jnp.sum(p["gate"] @ p["up"])) @ p["down"],
        [{"gate"}, {"up"}, {"down"}],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_use(name):
    fn, want = ORDERS[name]
    vectors = {"scale": jnp.ones(6), "bias": jnp.ones(6)}
    params = {"attention": squares(*"qkvo")} | squares("gate", "up", "down") | vectors
    found = orders.of_use(fn, params, jnp.ones((5, 6)), None)
    named = [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    assert [{path for path, leaf in named if group(path, leaf)} for group in found] == want


ADDED = {
    "attention and MLP": {"down"},
    "beside each other": {"attention/o", "down"},
    "used again": set(),
    "multiplied by each other": {"down"},
}


@pytest.mark.parametrize("name", ORDERS)
def test_whose_outputs_are_added_to_the_hidden_states(name):
    fn, _ = ORDERS[name]
    eyes = {"attention": squares(*"qkvo")} | squares("gate", "up", "down")
    draw = lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape)  # noqa: E731
    params = jax.tree.map(draw, eyes) | {"scale": jnp.ones(6), "bias": jnp.ones(6)}
    x = jax.random.normal(jax.random.key(0), (5, 6))
    stats = jp.calibrate(fn, params, [x])
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = tuple(path in stats.layouts and path not in ("scale", "bias") for path in paths)
    found = Corrector(fn, states=True)._added(chosen, params, (x,), stats)
    assert {path for path, is_added in zip(paths, found) if is_added} == ADDED[name]


@pytest.mark.slow
def test_order_of_use_equals_order_by_hand(network):
    blocks, batches = network
    by_hand = {"order": [only("up"), only("down")]}
    for drift, ask in ((0.0, {"order": "use"}), (0.5, {}), (0.5, {"order": "use"})):
        run = functools.partial(jp.oneshot.sequential, block, blocks, batches, sparsegpt)
        chex.assert_trees_all_equal(
            run(error_propagation=drift, **ask), run(error_propagation=drift, **by_hand)
        )


def test_order_of_use_is_checked(network):
    blocks, batches = network
    run = functools.partial(jp.oneshot.sequential, blocks=blocks, batches=batches, prune=sparsegpt)

    def looped(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: block(p, x), x)

    with pytest.raises(ValueError, match=r"down, shape \(16, 8\), is used within a loop of the"):
        run(looped, error_propagation=0.5)
    with pytest.raises(ValueError, match='order="use" finds no weight that the block contracts'):
        run(lambda p, x: x, order="use")
    with pytest.raises(ValueError, match='order=.up.; wanted "use", or groups of leaves as'):
        run(block, order="up")


def test_clear_errors(network):
    blocks, batches = network
    with pytest.raises(ValueError, match="sequential: blocks is empty"):
        jp.oneshot.sequential(block, [], batches, sparsegpt)
    with pytest.raises(TypeError, match=r"prune returned dict; wanted \(pruned, masks\)"):
        jp.oneshot.sequential(block, blocks, batches, lambda p, stats: p)
