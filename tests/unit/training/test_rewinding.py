"""Rounds of pruning and rewinding, against the plain loop written out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxprune as jp
from jaxprune.training import Round, iterative
from tests.helpers.oracles import keep_largest

STEPS, ROUNDS, SPARSITY = 6, 2, 0.75
DENSITIES = [24, 12, 6]  # of 24 entries
TX = jp.training.static(
    optax.chain(optax.clip(10.0), optax.sgd(optax.linear_schedule(0.5, 0.1, STEPS), momentum=0.5)),
    0.0,
)
CALLS: list[tuple[int, int]] = []


def gradient(params: Any, step: Any) -> Any:
    return jax.tree.map(lambda w: w - jnp.cos(jnp.arange(w.size).reshape(w.shape) + step), params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def one(params: Any, state: Any, step: Any) -> Any:
    updates, state = TX.update(gradient(params, step), state, params)
    return optax.apply_updates(params, updates), state


def train(params: Any, state: Any, start: int, stop: int) -> Any:
    CALLS.append((start, stop))
    for step in range(start, stop):
        params, state = one(params, state, step)
    return params, state


def start() -> Any:
    return {"w": jax.random.normal(jax.random.key(0), (6, 4))}


def plain(w: np.ndarray, mask: np.ndarray, trace: Any, begin: int) -> Any:
    """SGD with momentum in numpy; returns weights and trace after each step from ``begin``."""
    seen = []
    for step in range(begin, STEPS):
        grad = w - np.cos(np.arange(w.size).reshape(w.shape) + np.float32(step))
        trace = np.where(mask, grad, 0) + np.float32(0.5) * trace
        rate = np.float32(0.5 - (0.5 - 0.1) * step / STEPS)
        w = np.where(mask, w - rate * trace, 0)
        seen.append((w, trace))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewind", "rewind_to"), [("weights", 2), ("weights", 0), ("learning rate", 2), ("reset", 2)]
)
def test_rounds_match_the_loop_in_numpy(rewind: Any, rewind_to: int) -> None:
    begin = 0 if rewind == "reset" else rewind_to
    w, mask = np.asarray(start()["w"]), np.ones((6, 4), bool)
    run = plain(w, mask, np.zeros_like(w), 0)
    early = run[begin - 1] if begin else (w, np.zeros_like(w))
    CALLS.clear()
    tickets = list(
        iterative(
            train, TX, start(), SPARSITY, rounds=ROUNDS, steps=STEPS, rewind=rewind,
            rewind_to=rewind_to,
        )
    )  # fmt: skip
    assert [(0, begin)] * bool(begin) + [(begin, STEPS)] * (ROUNDS + 1) == CALLS
    for index, ticket in enumerate(tickets):
        if index:
            mask = keep_largest(np.where(mask, np.abs(run[-1][0]), -1), DENSITIES[index])
            first = run[-1][0] if rewind == "learning rate" else early[0]
            run = plain(np.where(mask, first, 0), mask, early[1], begin)
        assert int(ticket.index) == index
        np.testing.assert_array_equal(ticket.masks["w"], mask)
        np.testing.assert_allclose(ticket.params["w"], run[-1][0], rtol=1e-5, atol=1e-6)
        assert not np.asarray(ticket.params["w"])[~mask].any()


@pytest.mark.slow
def test_a_run_is_resumed_from_any_round_bitwise(tmp_path: Any) -> None:
    settings: Any = {"rounds": 2, "steps": STEPS, "rewind_to": 1}
    wanted = list(iterative(train, TX, start(), SPARSITY, **settings))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "round", wanted[1]._asdict())
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: wanted[1]._asdict())
        restored = Round(**checkpointer.restore(tmp_path / "round", like))
    (last,) = iterative(train, TX, start(), SPARSITY, resume=restored, **settings)
    for x, y in zip(jax.tree.leaves(last), jax.tree.leaves(wanted[2]), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_masks_are_set_anywhere_in_a_state() -> None:
    masks = {"w": jnp.eye(6, 4, dtype=bool)}
    for tx in (
        optax.chain(optax.clip(1.0), TX),
        optax.chain(optax.sgd(0.1), jp.keep_params_sparse(jax.tree.map(jnp.ones_like, masks))),
        optax.MultiSteps(TX, 2),
    ):
        state = jp.training.set_masks(tx.init(start()), masks)
        np.testing.assert_array_equal(optax.tree_utils.tree_get(state, "masks")["w"], masks["w"])


def test_masks_of_a_weak_type_do_not_compile_a_second_time() -> None:
    """A pattern that compares with Python numbers makes them."""

    def weak(scores: Any, sparsity: Any) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape) + jnp.asarray(sparsity) < 2.0, scores)

    masks = {"w": jax.jit(lambda x: x < 2)(3) & weak(start(), 0.5)["w"]}
    tx = jp.training.set(optax.sgd(0.1), 0.5, every=1, pattern=weak)
    for state in (tx.init(start()), jp.training.set_masks(TX.init(start()), masks)):
        assert not optax.tree_utils.tree_get(state, "masks")["w"].weak_type


W = start()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rewind": "back"}, "rewind is 'back'; wanted 'weights', 'learning rate' or 'reset'"),
        ({"rounds": 0}, "rounds is 0; wanted how often to prune, at least 1"),
        ({"rewind_to": 6}, "rewind_to is 6 of 6 steps; wanted a step of training, from 0 to 5"),
        ({"sparsity": 1.0}, "exponential: final is 1"),
        ({"sparsity": 90}, "final is 90; wanted a sparsity in"),
    ],
)
def test_bad_rounds_say_what_to_write(settings: Any, text: str) -> None:
    settings = {"sparsity": 0.5, "rounds": 1, "steps": 6} | settings
    with pytest.raises(ValueError, match=text):
        iterative(train, TX, W, settings.pop("sparsity"), **settings)


def test_a_run_is_resumed_only_at_the_step_that_was_saved() -> None:
    settings: Any = {"rounds": 1, "steps": STEPS}
    first = next(iterative(train, TX, start(), SPARSITY, rewind_to=2, **settings))
    text = "holds the network at step 2, and rounds are to begin at step {}, which was never saved"
    for wrong in ({"rewind_to": 3}, {"rewind_to": 2, "rewind": "reset"}):
        begin = 0 if "rewind" in wrong else 3
        with pytest.raises(ValueError, match=f"{text.format(begin)}; pass rewind_to=2, or start"):
            iterative(train, TX, start(), SPARSITY, resume=first, **settings, **wrong)
    late = first._replace(index=jnp.int32(4))
    with pytest.raises(ValueError, match="resume is round 4 of 1; pass the number of round"):
        iterative(train, TX, start(), SPARSITY, rewind_to=2, resume=late, **settings)


def test_an_optimizer_without_masks_says_what_to_build() -> None:
    rounds = iterative(train, optax.sgd(0.1), W, 0.5, rounds=1, steps=2)
    with pytest.raises(ValueError, match="holds no masks to set; build the optimizer as jp.train"):
        next(rounds)
    with pytest.raises(ValueError, match=r"the new mask of w has the shape \(4,\), that in"):
        jp.training.set_masks(TX.init(W), {"w": jnp.ones(4, bool)})
    with pytest.raises(TypeError, match="score is a int; wanted a function"):
        iterative(train, TX, W, 0.5, rounds=1, steps=2, score=3)  # type: ignore[arg-type]
