"""Block by block: the same as calibrating and pruning by hand, and fit to what blocks will meet."""

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


def test_equals_the_loop_by_hand(network):
    blocks, batches = network
    pruned, masks = jp.oneshot.sequential(block, blocks, iter(batches), sparsegpt)
    states = batches
    for p, got, mask in zip(blocks, pruned, masks, strict=True):
        want, kept = sparsegpt(p, jp.calibrate(block, p, states))
        chex.assert_trees_all_close(got, want, atol=1e-5)
        chex.assert_trees_all_equal(mask, kept)
        states = [block(got, x) for x in states]


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


def test_clear_errors(network):
    blocks, batches = network
    with pytest.raises(ValueError, match="sequential: blocks is empty"):
        jp.oneshot.sequential(block, [], batches, sparsegpt)
    with pytest.raises(TypeError, match=r"prune returned dict; wanted \(pruned, masks\)"):
        jp.oneshot.sequential(block, blocks, batches, lambda p, stats: p)
