"""What is meant for ``fn``, and what is no array: errors that say the line to write."""

from __future__ import annotations

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune._calls import bound, calls_fn

X = jnp.ones((2, 3))
PARAMS = {"up": jnp.arange(24.0).reshape(3, 8), "down": jnp.ones((8, 2))}
LINE = re.escape("fn = functools.partial(fn, train=False)")


def net(p, x, train=False):
    return jnp.tanh(x @ p["up"]) @ p["down"] * (2 if train else 1)


STRUCTURE = jp.infer_structure(net, PARAMS, X)
MASKS = STRUCTURE.masks({"up:1": jnp.arange(8) > 3})
SCORES = jp.magnitude(PARAMS)
SEARCHED = (net, PARAMS, STRUCTURE, SCORES, X)

CALLS = {
    "jp.infer_structure": lambda **o: jp.infer_structure(net, PARAMS, X, **o),
    "jp.compact": lambda **o: jp.compact(net, PARAMS, MASKS, X, **o),
    "jp.cost": lambda **o: jp.cost(net, PARAMS, X, **o),
    "jp.calibrate": lambda **o: jp.calibrate(net, PARAMS, [X], **o),
    "jp.benchmark": lambda **o: jp.benchmark(net, PARAMS, X, **o),
    "jp.compare": lambda **o: jp.compare({"a": (net, (PARAMS, X))}, **o),
    "jp.Search": lambda **o: jp.Search(*SEARCHED, **o),
    "jp.search": lambda **o: jp.search(*SEARCHED, target=jp.Target(params=0.5), **o),
    "jp.pareto": lambda **o: jp.pareto(*SEARCHED, targets=[1.5], **o),
    "jp.prune_to_metric": lambda **o: jp.prune_to_metric(*SEARCHED, metric=len, floor=1, **o),
    "jp.export": lambda **o: jp.export(jp.compact(net, PARAMS, MASKS, X), "nowhere", X, **o),
    "jp.load": lambda **o: jp.load("nowhere", net, PARAMS, X, **o),
    "jp.oneshot.permute": lambda **o: jp.oneshot.permute(net, PARAMS, STRUCTURE, SCORES, X, **o),
    "jp.scores.activity": lambda **o: jp.scores.activity(net, PARAMS, [(X,)], **o),
}  # fmt: skip


@pytest.mark.parametrize("who", CALLS)
def test_a_keyword_meant_for_fn_says_the_line(who):
    with pytest.raises(TypeError, match=f"{who} has no option 'train'.* bound to it first: {LINE}"):
        CALLS[who](train=False)


def test_several_keywords_and_values_that_are_no_plain_text():
    text = re.escape("fn = functools.partial(fn, mutable=['batch_stats'], rngs=rngs)")
    with pytest.raises(TypeError, match=f"has no option 'mutable', 'rngs'; .*: {text}"):
        CALLS["jp.search"](mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})


def test_a_block_and_a_mode_are_named_as_users_name_them():
    line = re.escape("block = functools.partial(block, deterministic=True)")
    with pytest.raises(TypeError, match=line):
        jp.oneshot.sequential(net, [PARAMS], [X], lambda p, stats: (p, p), deterministic=True)


@pytest.mark.parametrize(
    ("who", "option", "near"),
    [
        ("jp.search", "objectiv", "objective"),
        ("jp.pareto", "minimun", "minimum"),
        ("jp.compact", "semantic", "semantics"),
        ("jp.benchmark", "repeat", "repeats"),
    ],
)
def test_a_slip_of_the_pen_is_told_the_option(who, option, near):
    with pytest.raises(TypeError, match=f"{who} has no option .{option}., did .*{near}.; its"):
        CALLS[who](**{option: 1})


def test_a_parameter_of_fn_is_no_slip_of_the_pen():
    @calls_fn("run")
    def run(fn, *args, repeats=1): ...

    run(len, repeats=2)
    with pytest.raises(TypeError, match="fn = functools.partial.fn, repeat=3."):
        run(lambda x, repeat: x, repeat=3)


def test_signatures_stay():
    assert jp.Search.__init__.__kwdefaults__["repeats"] == 9
    assert "target" in jp.search.__kwdefaults__ or jp.search.__wrapped__


FLAGGED = {
    "infer_structure": lambda: jp.infer_structure(net, PARAMS, X, False),
    "compact": lambda: jp.compact(net, PARAMS, MASKS, X, False),
    "calibrate": lambda: jp.calibrate(net, PARAMS, [(X, False)]),
    "the small function": lambda: jp.compact(net, PARAMS, MASKS, X).fn(
        {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}, X, False
    ),
}


@pytest.mark.parametrize("who", FLAGGED)
def test_a_bool_that_is_a_condition_says_the_line(who):
    with pytest.raises(TypeError, match=f"argument 1 after params is the bool False.*: {LINE}"):
        FLAGGED[who]()


@pytest.mark.parametrize("who", ["cost", "benchmark"])
def test_a_bool_among_what_is_counted_says_the_line(who):
    with pytest.raises(TypeError, match=f"argument 2 holds bool False.*static: {LINE}"):
        getattr(jp, who)(net, PARAMS, X, False)


def test_the_name_of_the_flag_is_looked_up():
    def fn(p, x, deterministic):
        return x @ p["up"] if deterministic else x

    with pytest.raises(TypeError, match="functools.partial.fn, deterministic=True."):
        jp.infer_structure(fn, PARAMS, X, True)


def test_a_linen_module_with_a_flag():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))

    model = Net()
    v = model.init(jax.random.key(0), X, False)
    for call in (
        lambda: jp.infer_structure(model.apply, v, X, False),
        lambda: jp.infer_structure(model.apply, v, X, train=False),
    ):
        with pytest.raises(TypeError, match=LINE):
            call()


def test_a_bool_that_is_data_is_traced():
    fn = lambda p, x, flip: jnp.where(flip, -x, x) @ p["up"]  # noqa: E731
    assert jp.infer_structure(fn, PARAMS, X, True).dims


def test_another_traced_condition_stays_as_it_is():
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jp.infer_structure(lambda p, x: x if x.sum() > 0 else -x, PARAMS, X)


PARTITION = re.escape(
    "params, static = eqx.partition(module, eqx.is_inexact_array); "
    "fn = lambda p, x: eqx.combine(p, static)(x)"
)
MODULE = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
WHOLE = {
    "infer_structure": lambda fn: jp.infer_structure(fn, MODULE, X),
    "compact": lambda fn: jp.compact(fn, MODULE, MODULE, X),
    "calibrate": lambda fn: jp.calibrate(fn, MODULE, [X]),
    "cost": lambda fn: jp.cost(fn, MODULE, X),
    "benchmark": lambda fn: jp.benchmark(fn, MODULE, X),
}


@pytest.mark.parametrize("who", WHOLE)
def test_a_whole_equinox_module_is_told_to_partition(who):
    with pytest.raises(TypeError, match=f"activation.*{PARTITION}"):
        WHOLE[who](lambda m, x: jax.vmap(m)(x))


def test_the_line_for_a_module_works():
    params, static = eqx.partition(MODULE, eqx.is_inexact_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731
    free = [d.label for d in jp.infer_structure(fn, params, X).dims.values() if not d.frozen]
    assert free == ["layers hidden"]


def test_a_module_whose_flag_is_a_leaf_is_told_to_partition():
    drop = eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    drop = eqx.nn.inference_mode(drop)
    with pytest.raises(TypeError, match=f"params hold a bool at layers/1/inference.*{PARTITION}"):
        jp.infer_structure(lambda m, x: jax.vmap(m)(x), drop, X)


def test_text_among_the_arguments():
    with pytest.raises(
        TypeError, match="argument 1 after params is the str 'mean', .* mode='mean'"
    ):
        jp.infer_structure(lambda p, x, how: x @ p["up"], PARAMS, X, "mean")


def test_what_is_bound():
    line = bound({"train": True, "rngs": {"dropout": jax.random.key(0)}})
    assert line == "fn = functools.partial(fn, train=True, rngs=rngs)"
