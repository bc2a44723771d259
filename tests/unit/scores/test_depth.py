"""Scores of blocks: by hand and the slow way, both forms of blocks, into a search; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

LAYERS, WIDTH = 4, 6


def block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def drawn():
    keys = jax.random.split(jax.random.key(0), 5)
    blocks = {
        "up": jax.random.normal(keys[0], (LAYERS, WIDTH, 8)),
        "down": jax.random.normal(keys[1], (LAYERS, 8, WIDTH)) * jnp.arange(4.0)[:, None, None],
    }
    head = jax.random.normal(keys[2], (WIDTH, 5))
    states = [jax.random.normal(k, (3, WIDTH)) for k in keys[3:]]
    return blocks, head, states


def unstacked(blocks):
    return [{name: leaf[k] for name, leaf in blocks.items()} for k in range(LAYERS)]


def ends(blocks, x, swap=None):
    for k, p in enumerate(unstacked(blocks)):
        if swap is None or k != swap[0]:
            x = block(p, x)
        elif swap[1] is not None:
            x = block(swap[1], x)
    return np.asarray(x, np.float64)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_influence_is_one_less_the_cosine():
    blocks, _, states = drawn()
    found = jp.scores.block_influence(block, blocks, states)
    wanted = np.zeros(LAYERS)
    for x in states:
        for k, p in enumerate(unstacked(blocks)):
            y = block(p, x)
            for a, b in zip(np.asarray(x, float), np.asarray(y, float)):
                cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                wanted[k] += (1 - cosine) / sum(len(x) for x in states)
            x = y
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_loss_and_divergence_are_those_of_the_network_without_a_block(swapped):
    blocks, head, states = drawn()
    other = jax.tree.map(lambda leaf: leaf * 0.5, blocks)
    replaced = other if swapped else None
    targets = [jnp.ones((3, WIDTH)), jnp.zeros((3, WIDTH))]
    rise = jp.scores.block_loss(
        block, blocks, states, lambda x, y: jnp.mean((x - y) ** 2), targets=targets,
        replaced=replaced,
    )  # fmt: skip
    apart = jp.scores.block_divergence(block, blocks, states, lambda x: x @ head, replaced=replaced)
    for k in range(LAYERS):
        swap = k, unstacked(other)[k] if swapped else None
        wanted_rise = wanted_apart = 0.0
        for x, y in zip(states, targets):
            dense, without = ends(blocks, x), ends(blocks, x, swap)
            wanted_rise += (np.mean((without - y) ** 2) - np.mean((dense - y) ** 2)) / 2
            p, q = (log_softmax(z @ np.asarray(head, float)) for z in (dense, without))
            wanted_apart += np.mean(np.sum(np.exp(p) * (p - q), -1)) / 2
        assert rise[k] == pytest.approx(max(float(wanted_rise), 0), rel=1e-3, abs=1e-4)
        assert apart[k] == pytest.approx(float(wanted_apart), rel=1e-3, abs=1e-5)


def test_a_list_of_blocks_is_scored_like_their_stack():
    blocks, head, states = drawn()
    for score in (
        lambda b: jp.scores.block_influence(block, b, states),
        lambda b: jp.scores.block_loss(block, b, states, lambda x: jnp.sum(x**2)),
        lambda b: jp.scores.block_divergence(block, b, tuple(states), lambda x: x @ head),
    ):
        np.testing.assert_array_equal(score(blocks), score(unstacked(blocks)))


def test_scores_of_blocks_choose_the_layers_of_a_search():
    blocks, head, states = drawn()
    params = {"blocks": blocks, "head": head}

    def fn(p, x):
        return jax.lax.scan(lambda x, b: (block(b, x), None), x, p["blocks"])[0] @ p["head"]

    structure = jp.infer_structure(fn, params, states[0])
    (name,) = (n for n, d in structure.dims.items() if d.matches("* layers"))
    scores = {name: jp.scores.block_influence(block, blocks, states)}
    target = jp.Target(params=0.6)
    plan = jp.search(
        fn, params, structure, scores, states[0], dims=[name], target=target, round_to=1
    )
    best = np.isin(np.arange(LAYERS), np.argsort(scores[name])[2:])
    assert plan.keep[name].tolist() == best.tolist()
    small = jp.compact(fn, params, plan.masks, states[0])
    assert small.keep[name].sum() == 2
    wanted = states[0]
    for k in np.flatnonzero(best):
        wanted = block(unstacked(blocks)[k], wanted)
    wanted = wanted @ head
    np.testing.assert_allclose(small.fn(small.params, states[0]), wanted, rtol=1e-4)


ONE = [{"w": jnp.ones(2)}]
X = [jnp.ones((1, 2))]


def plus(p, x):
    return x + p["w"]


BAD = {
    "states": (
        lambda: jp.scores.block_influence(plus, ONE, X[0]), TypeError, "states is a .*wanted a list"
    ),
    "no states": (lambda: jp.scores.block_influence(plus, ONE, []), ValueError, "states is empty"),
    "no blocks": (lambda: jp.scores.block_influence(plus, [], X), ValueError, "blocks is empty"),
    "block": (lambda: jp.scores.block_influence(ONE, ONE, X), TypeError, "block is a list; wanted"),
    "layers": (
        lambda: jp.scores.block_influence(plus, {"a": jnp.ones(2), "b": jnp.ones((3, 2))}, X),
        ValueError,
        r"first axes of the leaves of blocks are \[\(2,\), \(3,\)\]; wanted one number of layers",
    ),
    "shape": (
        lambda: jp.scores.block_influence(lambda p, x: x[:, :1], ONE, X),
        ValueError,
        r"block returned \(1, 1\) for hidden states of \(1, 2\); wanted the same",
    ),
    "NaN": (
        lambda: jp.scores.block_influence(plus, [{"w": jnp.full(2, jnp.nan)}], X),
        ValueError,
        "score of block 0 is nan; look for NaN",
    ),
    "targets": (
        lambda: jp.scores.block_loss(plus, ONE, X, lambda x, y: jnp.sum(x), targets=[1, 2]),
        ValueError,
        "there are 2 targets and 1 states; give one target",
    ),
    "replaced": (
        lambda: jp.scores.block_divergence(plus, ONE, X, lambda x: x, replaced=ONE * 2),
        ValueError,
        "there are 2 replaced blocks and 1 blocks; give one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
