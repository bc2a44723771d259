"""Where searches land on devices whose times have cliffs, by clocks that are made up."""

import itertools

import numpy as np
import pytest

import jaxprune as jp
from jaxprune.budget import landing, solver, verification
from jaxprune.budget.verification import Verifier
from tests.unit.budget.networks import setting
from tests.unit.budget.test_verification import exactly, shrunk

UP, MID = "up/kernel:1", "mid/kernel:1"


def on_a_device(monkeypatch, search, seconds):
    """Operations take the time of their FLOPs, whole networks ``seconds(FLOPs, up, mid)``."""
    dense, measured = search.dense["flops"], []
    whole = seconds(dense, 64, 48)

    def timed():
        search.model.tables["latency"] = search.model.tables["flops"]
        search.measured.dense["latency"] = dense

    def speedups(self, tries, runs, asked):
        smalls = [t.small for t in tries]
        found = [jp.cost(s.fn, s.params, *self.args).flops for s in smalls]
        widths = [(int(s.keep[UP].sum()), int(s.keep[MID].sum())) for s in smalls]
        measured.extend(widths)
        return [exactly(whole / seconds(f, *w)) for f, w in zip(found, widths)]

    monkeypatch.setattr(search, "_time", timed)
    monkeypatch.setattr(verification, "compact", shrunk)
    monkeypatch.setattr(Verifier, "_speedups", speedups)
    return measured


def cliff_in_one(flops, up, mid):
    """The last layer takes 1.8 times as much from 20 units on."""
    return flops * (1.8 if mid >= 20 else 1.0)


def cliff_in_each(flops, up, mid):
    return flops * (1.4 if mid >= 24 else 1.0) * (1.3 if up >= 40 else 1.0)


def faster_than_told(flops, up, mid):
    return flops**1.5 / 11_000**0.5


def slower_than_told(flops, up, mid):
    return flops**0.75 * 11_000**0.25


def slow_in_part(flops, up, mid):
    """A compiler chooses a slow algorithm where one layer is whole and the other one isn't."""
    return flops * (1.5 if up > 62 and mid < 46 else 1.0)


def tiles(flops, up, mid):
    """Widths count as the next multiple of 4 does."""
    return float(4 * -(-up // 4) * (16 + 4 * -(-mid // 4)))


CLOCKS = [cliff_in_one, cliff_in_each, faster_than_told, slower_than_told, slow_in_part, tiles]


def best_by_trying(search, seconds, asked):
    """(worth, speed-up) of the best of all choices that meet the target."""
    choices, table = search.choices, search.model.tables["flops"]
    counts = [c.tolist() for c in search.model.counts]
    whole, found = seconds(search.dense["flops"], 64, 48), []
    for choice in map(np.array, itertools.product(*(range(len(c)) for c in counts))):
        widths = dict(zip(search.model.names, (c[i] for c, i in zip(counts, choice))))
        speedup = whole / seconds(table.at(choice), widths[UP], widths[MID])
        if speedup >= 0.99 * asked:
            found.append((choices.worth.at(choice), speedup))
    return max(found)


@pytest.mark.parametrize("asked", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("seconds", CLOCKS)
def test_lands_just_above_the_target_or_where_the_best_choice_is(monkeypatch, seconds, asked):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    measured = on_a_device(monkeypatch, search, seconds)
    plan = search.plan(jp.Target(speedup=asked))
    worth, speedup = best_by_trying(search, seconds, asked)
    assert 0.99 * asked <= plan.measured.speedup <= max(1.031 * asked, 1.02 * speedup)
    assert search.choices.worth.at(plan._choice) >= 0.95 * worth
    assert len(measured) <= 24


def less_by_mid(flops, up, mid):
    """Cutting the last layer spares a third of what is told; a fixed part is never spared."""
    return 3_000 + up * (16 + 48 - (48 - mid) / 3)


@pytest.mark.parametrize("asked", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("share", [0.003, 0.03])
@pytest.mark.parametrize("seconds", [less_by_mid, slower_than_told, cliff_in_each])
def test_a_uniform_choice_is_not_taken_where_much_less_need_be_given_up(
    monkeypatch, seconds, share, asked
):
    """What a choice gives up is what recovery has to win back, however little it is of all."""
    fn, params, structure, _, x = setting("mlp")
    scores = {UP: np.linspace(0.5, 1.5, 64), MID: share * np.linspace(0.5, 1.5, 48)}
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    on_a_device(monkeypatch, search, seconds)
    plan = search.plan(jp.Target(speedup=asked))
    worth, _ = best_by_trying(search, seconds, asked)
    whole = search.choices.worth.at(search.choices.full)
    given_up = whole - search.choices.worth.at(plan._choice)
    assert given_up <= 1.3 * (whole - worth) + 0.01 * whole


@pytest.mark.parametrize("asked", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("share", [1.0, 2.0, 8.0])
def test_a_step_off_a_cliff_gives_up_little(monkeypatch, asked, share):
    """The layer that should stay whole is the one that has to give up a step."""
    fn, params, structure, _, x = setting("mlp")
    scores = {UP: share * np.linspace(0.5, 1.5, 64), MID: np.linspace(0.5, 1.5, 48)}
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    on_a_device(monkeypatch, search, slow_in_part)
    plan = search.plan(jp.Target(speedup=asked))
    worth, _ = best_by_trying(search, slow_in_part, asked)
    whole = search.choices.worth.at(search.choices.full)
    assert whole - search.choices.worth.at(plan._choice) <= 1.3 * (whole - worth) + 0.005 * whole


@pytest.mark.parametrize("seconds, count", [(20.0, 0), (4.0, 3), (0.1, 4)])
def test_fewer_neighbors_are_measured_where_each_takes_long(monkeypatch, seconds, count):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    measured = on_a_device(monkeypatch, search, slower_than_told)
    search._time()
    monkeypatch.setattr(verification, "DESCENTS", 1)
    monkeypatch.setattr(type(search.choices), "below", lambda self, tried: [
        self.tried(tried.choice - k) for k in range(1, 5)
    ])  # fmt: skip
    tried = search.choices.tried(search.choices.full - [0, 4])
    tried.used = 1.5
    budgets = {"latency": search.dense["latency"] / 1.5}
    search.verifier.descended(search.choices, tried, budgets, seconds)
    assert len(measured) == count


@pytest.mark.parametrize("seconds", [slower_than_told, slow_in_part])
def test_less_time_is_aimed_at_where_nothing_but_a_uniform_choice_fits(monkeypatch, seconds):
    fn, params, structure, _, x = setting("mlp")
    scores = {UP: np.linspace(0.5, 1.5, 64), MID: 0.01 * np.linspace(0.5, 1.5, 48)}
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    on_a_device(monkeypatch, search, seconds)
    search._time()
    budgets = {"latency": search.dense["latency"] / 1.3}
    even = search.choices.tried(search.choices.full // 4, apart=True)
    search.verifier.verify([even], budgets)
    missed = search.choices.tried(search.choices.solved(budgets))
    search.verifier.verify([missed], budgets)
    missed.used = max(missed.used, 1.02)
    found = search.verifier._lower(search.choices, budgets, False, [even, missed])
    best = search.choices.best([even, missed, *found])
    assert even.used <= 1 and best in found and best.used <= 1


@pytest.mark.parametrize("asked", [1.3, 1.6])
def test_a_uniform_choice_is_not_what_is_left_once_all_others_were_measured_again(
    monkeypatch, asked
):
    """All but it looked two per cent faster than they are."""
    fn, params, structure, _, x = setting("mlp")
    scores = {UP: np.linspace(0.5, 1.5, 64), MID: 0.01 * np.linspace(0.5, 1.5, 48)}
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    on_a_device(monkeypatch, search, slower_than_told)
    confirm, calls = Verifier._confirm, []

    def again(self, choices, budgets, tries):
        calls.append([t.apart for t in tries])
        for tried in tries if len(calls) == 1 else ():
            tried.used *= 1.0 if tried.apart else 1.02 / min(tried.used, 1.0)
        confirm(self, choices, budgets, tries)

    monkeypatch.setattr(Verifier, "_confirm", again)
    monkeypatch.setattr(verification, "CONFIRMED", 0)
    plan = search.plan(jp.Target(speedup=asked))
    assert any(calls[0]), "no uniform choice was measured"
    worth, _ = best_by_trying(search, slower_than_told, asked)
    whole = search.choices.worth.at(search.choices.full)
    given_up = whole - search.choices.worth.at(plan._choice)
    assert plan.measured.speedup >= asked * 0.99 and given_up <= 1.5 * (whole - worth)


@pytest.mark.parametrize("asked", [1.2, 1.5])
def test_a_walk_is_not_bound_by_the_cliffs_that_proposals_stay_below(monkeypatch, asked):
    """What was held went too far: the rest is whole, and there is time left."""
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1, minimum={"*": 1})
    on_a_device(monkeypatch, search, slower_than_told)
    search._time()
    budgets, full = {"latency": search.dense["latency"] / asked}, search.choices.full
    far = search.choices.tried(full - [full[0] - 5, 0])
    held = search.choices.held_below(search.choices.tried(full), far)
    far = held.tried(far.choice)  # As much as is held: that isn't all that may be kept.
    search.verifier.verify([far], budgets)
    tries = search.verifier.decided(held, budgets, False, [far])
    best = search.choices.best(tries)
    assert far.used < 0.9 and best.used >= 0.96 and best.choice[0] > far.choice[0]


def test_uniform_choices_land_too(monkeypatch):
    """There is one way up: what is told is off, and the last choice before the target is found."""
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    on_a_device(monkeypatch, search, faster_than_told)
    plan = search.plan(jp.Target(speedup=2.0), uniform=True)
    table, whole = search.model.tables["flops"], faster_than_told(search.dense["flops"], 64, 48)
    every = [table.at(c) for c in solver.uniform(search.choices.problem({}))]
    speedups = [whole / faster_than_told(flops, 0, 0) for flops in every]
    assert plan.measured.speedup == pytest.approx(min(s for s in speedups if s >= 0.99 * 2.0))


def test_no_run_begins_once_the_time_is_up(monkeypatch):
    fn, params, structure, scores, x = setting("mlp")
    count = []
    for seconds in (landing.SECONDS, -1.0):
        monkeypatch.setattr(landing, "SECONDS", seconds)
        search = jp.Search(fn, params, structure, scores, x, round_to=1)
        measured = on_a_device(monkeypatch, search, cliff_in_one)
        search.plan(jp.Target(speedup=3.0))
        count.append(len(measured))
    assert count[1] < count[0]


def test_other_budgets_hold_on_the_way_up(monkeypatch):
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, round_to=1)
    on_a_device(monkeypatch, search, faster_than_told)
    plan = search.plan(jp.Target(speedup=1.2, params=0.5))
    assert plan.measured.params <= 0.5 and plan.measured.speedup > 1.5


def known(choices, way, found):
    """A way of which some positions were measured: position -> (time, share of the budget)."""
    for k, (seconds, used) in found.items():
        way.known[k] = choices.tried(way.choices[k])
        way.known[k].found["latency"], way.known[k].used = seconds, used


def test_a_way_is_looked_at_where_the_target_is_expected():
    fn, params, structure, scores, x = setting("mlp")
    search = jp.Search(fn, params, structure, scores, x, device="h100", round_to=1)
    search._time()
    choices = search.choices
    steps = [np.array([k, 0]) for k in range(21)]
    way = landing.Way(steps, [1.0 + k for k in range(21)], {}, (21.0, 21.0))
    known(choices, way, {0: (1.0, 0.5)})
    assert way.picks(11.0) == [5, 10, 15]  # between what fits and the dense network
    known(choices, way, {5: (6.0, 0.7), 10: (20.0, 1.5)})
    assert (way.low, way.high, way.top) == (5, 10, way.known[5])
    assert way.picks(9.0) == [6, 7, 8]  # 3 of 14 parts of the way: near its low end
    known(choices, way, {9: (7.0, 0.8)})
    assert way.picks(9.0) == []  # the next step is a cliff
