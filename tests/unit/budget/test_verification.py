"""The protocol of measuring, on devices whose times are known."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import model, verification
from jaxprune.budget.verification import Verifier, uncertainty
from tests.unit.budget.networks import setting


def shrunk(fn, params, masks, *args):
    """In place of ``jp.compact``, of the mlp: shapes tell its FLOPs, and nothing is compiled."""
    found = setting("mlp")[2].keep(masks)
    up, mid = (int(found[name].sum()) for name in ("up/kernel:1", "mid/kernel:1"))
    shapes = {
        "up": {"kernel": (16, up), "bias": (up,)},
        "mid": {"kernel": (up, mid)},
        "down": {"kernel": (mid, 5)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    small = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)
    return types.SimpleNamespace(fn=fn, params=small, keep=found)


@pytest.mark.slow
def test_shrunk_networks_cost_what_compact_ones_do():
    fn, params, structure, _, x = setting("mlp")
    masks = structure.masks({"up/kernel:1": np.arange(64) < 20, "mid/kernel:1": np.arange(48) < 9})
    found = [make(fn, params, masks, x) for make in (shrunk, jp.compact)]
    small, real = (jp.cost(f.fn, f.params, x) for f in found)
    assert (small.flops, small.bytes, small.params) == (real.flops, real.bytes, real.params)


def on_a_device_of_flops(monkeypatch, search, speedup):
    """Time is FLOPs; ``speedup(true one, whether the run is a long one)`` is what is measured."""
    dense, every = search.dense["flops"], []

    def timed():
        search.model.tables["latency"] = search.model.tables["flops"]
        search.measured.dense["latency"] = dense

    def speedups(self, smalls, runs):
        true = [dense / jp.cost(s.fn, s.params, *self.args).flops for s in smalls]
        every.append((runs > 1, true))
        return [speedup(t, runs > 1) for t in true]

    monkeypatch.setattr(search, "_time", timed)
    monkeypatch.setattr(verification, "compact", shrunk)
    monkeypatch.setattr(Verifier, "_speedups", speedups)
    return every


@pytest.mark.parametrize("truth", ["faster than expected", "as expected"])
def test_least_is_measured_before_a_speed_is_called_unreachable(monkeypatch, truth):
    """The table says that half of the time stays; the device may know better."""
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    dense = search.dense["flops"]
    constant = dense / 2 if truth == "as expected" else 0
    measured = []

    def timed():
        half = [model.Term(t.dims, t.table / 2) for t in search.model.tables["flops"].terms]
        table = model.Total(half, len(search.model.names), dense / 2)
        search.model.tables["latency"], search.measured.dense["latency"] = table, dense

    def speedups(self, smalls, runs):
        measured.extend(jp.cost(small.fn, small.params, x).flops for small in smalls)
        return [dense / (constant + m * (1 - constant / dense)) for m in measured[-len(smalls) :]]

    monkeypatch.setattr(search, "_time", timed)
    monkeypatch.setattr(verification, "compact", shrunk)
    monkeypatch.setattr(Verifier, "_speedups", speedups)
    if truth == "as expected":
        with pytest.raises(
            ValueError, match="with all of them at their least it would be speedup=1"
        ):
            search.plan(jp.Target(speedup=3.0))
    else:
        assert search.plan(jp.Target(speedup=3.0)).measured.speedup >= 3
    assert len(measured) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("asked", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("flattery", [0.85, 1.0, 1.15])
def test_a_long_run_decides(monkeypatch, asked, flattery):
    """Short runs are 15 % off; what is chosen truly meets the target, and is among the best."""
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=4)
    runs = on_a_device_of_flops(monkeypatch, search, lambda t, long: t if long else t * flattery)
    plan = search.plan(jp.Target(speedup=asked))
    assert asked * 0.99 <= plan.measured.speedup <= asked * 1.12
    long_run = [true for long, true in runs if long][-1]
    assert len(long_run) > 1 and plan.measured.speedup in np.asarray(long_run)
    uniform = search.plan(jp.Target(speedup=asked), uniform=True)
    assert plan.score >= 0.97 * uniform.score  # each as near to the target as is enough


def test_the_best_of_those_that_meet_the_target_in_the_long_run(monkeypatch):
    """The clock prefers every second choice, whatever was expected."""
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=4)
    odd = itertools.count()
    on_a_device_of_flops(monkeypatch, search, lambda t, long: t * (0.9 + 0.2 * (next(odd) % 2)))
    plan = search.plan(jp.Target(speedup=2.0))
    assert plan.measured.speedup >= 1.98 and not any("missed" in note for note in plan.notes)
    assert plan.score > 0.4


def test_a_target_that_is_missed_is_said(monkeypatch):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=4)
    on_a_device_of_flops(monkeypatch, search, lambda t, long: t if not long else 1.5)
    plan = search.plan(jp.Target(speedup=2.0))
    assert any("the target is missed: 1.3" in note for note in plan.notes)


def test_the_clock_is_unsure_until_rounds_agree():
    """The standard error of a median of normal numbers, within what 4000 rows tell."""
    rng = np.random.default_rng(0)
    rows = rng.normal(2.0, 0.1, (4000, 25))
    error = np.median(rows, axis=1).std() / 2.0
    assert np.mean([uncertainty(row[None]) for row in rows]) == pytest.approx(error, rel=0.1)
    assert uncertainty(np.full((3, 9), 2.0)) == 0
