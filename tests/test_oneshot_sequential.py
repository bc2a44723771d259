"""Block by block: the same as calibrating and pruning by hand, and better than all at once."""

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp


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


def output(blocks, x):
    for p in blocks:
        x = block(p, x)
    return x


def test_equals_the_loop_by_hand(network):
    blocks, batches = network
    pruned, masks = jp.oneshot.sequential(block, blocks, iter(batches), sparsegpt)
    states = batches
    for p, got, mask in zip(blocks, pruned, masks, strict=True):
        want, kept = sparsegpt(p, jp.calibrate(block, p, states))
        chex.assert_trees_all_close(got, want, atol=1e-5)
        chex.assert_trees_all_equal(mask, kept)
        states = [block(got, x) for x in states]


def test_later_blocks_make_up_for_earlier_ones(network):
    """Against blocks that are all calibrated on the dense network."""
    blocks, batches = network
    pruned, _ = jp.oneshot.sequential(block, blocks, batches, sparsegpt)
    states, apart = batches, []
    for p in blocks:
        apart.append(sparsegpt(p, jp.calibrate(block, p, states))[0])
        states = [block(p, x) for x in states]

    def error(new):
        return sum(float(jnp.sum((output(new, x) - output(blocks, x)) ** 2)) for x in batches)

    assert error(pruned) < error(apart)


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


def test_clear_errors(network):
    blocks, batches = network
    with pytest.raises(ValueError, match="sequential: blocks is empty"):
        jp.oneshot.sequential(block, [], batches, sparsegpt)
    with pytest.raises(TypeError, match=r"prune returned dict; wanted \(pruned, masks\)"):
        jp.oneshot.sequential(block, blocks, batches, lambda p, stats: p)
