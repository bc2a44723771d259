"""Times over all counts from few: exact where they are taken, and more where it counts."""

import itertools

import pytest

import jaxprune as jp
from jaxprune.budget import clock, model, times, verification
from jaxprune.budget.times import Times
from tests.unit.budget.networks import built, setting


def cliffs(group, at):
    """Seconds on a device that is slow at few units, as CPUs are at few channels."""
    narrow = max(at.values(), default=99) < 20
    return 1e-7 + 1e-9 * float(group.work(at)) * (3 if narrow else 1)


@pytest.fixture
def device(monkeypatch):
    """The device of cliffs, and a list of what it has timed."""
    taken = []

    def time_group(group, at):
        taken.append(dict(at))
        return lambda: cliffs(group, at)

    monkeypatch.setattr(clock, "time_group", time_group)
    return taken


def timed(made):
    return Times([g for g in made.groups if g.runs], made.counts_of, jp.budget.LatencyTable(False))


def test_times_are_exact_where_they_were_taken(device):
    made = built("mlp")
    found = timed(made)
    choices = [{axis: int(c[k]) for axis, c in made.counts_of.items()} for k in (0, 3, 9, 15, -1)]
    for chosen in choices:
        while found.refine(chosen):
            pass
    for chosen in choices:
        for i, g in enumerate(found.groups):
            at = {d: chosen[d] for d in g.dims}
            if tuple(at.values()) in found.taken[i]:
                assert found.seconds(i, chosen) == pytest.approx(cliffs(g, at), rel=1e-6)


def test_what_hardly_counts_is_timed_once_and_what_dominates_at_its_ends(device):
    found = timed(built("mlp"))
    whole = {axis: int(c[-1]) for axis, c in found.counts.items()}
    at = [found.seconds(i, whole) for i in range(len(found.groups))]
    for i, group in enumerate(found.groups):
        large = at[i] > times.SMALL * sum(at)
        assert len(found.taken[i]) == (2 ** len(group.dims) if large else 1)


def test_few_times_are_enough(device, monkeypatch):
    """A choice keeps as much score as with a table that is timed at every width."""
    fn, params, structure, scores, x = setting("mlp")
    monkeypatch.setattr(verification.Verifier, "dense_seconds", lambda self: 1e-3)
    found = {}
    for name in ("few", "all"):
        device.clear()
        table = jp.budget.LatencyTable(False)
        search = jp.Search(
            fn, params, structure, scores, x, round_to=4, table=table, objective="sum"
        )
        if name == "all":
            search._time()
            every = search.model.times
            for i, g in enumerate(every.groups):
                counts = [every.counts[d].tolist() for d in g.dims]
                every.take((i, at) for at in itertools.product(*counts))
            terms = model.merged(model._timed_terms(search.model))
            search.model.tables["latency"] = model.Total(terms, 2)
        plan = search.plan(jp.Target(speedup=2.0), verify=False)
        found[name] = plan.score, len(device)
    assert found["few"][1] < 0.2 * found["all"][1]
    assert found["few"][0] >= 0.97 * found["all"][0]
