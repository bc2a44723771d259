"""Random programs: compact equals the masked model, or says what stayed. Never a silent difference.

The programs are evaluated with numpy, see ``benchmarks.numpy_eval``: XLA would compile each.
``python -m benchmarks.fuzz`` runs as many as one likes.
"""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import fuzz, numpy_eval
from benchmarks.layers.catalogue import KINDS, Draw
from benchmarks.programs import random_program
from jaxprune.rules import registry, zeros

PROGRAMS = 200
SHARE = 20  # programs of one test
MASKS = 2


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield
    jax.clear_caches()


@pytest.mark.parametrize("first", range(0, PROGRAMS, SHARE))
def test_compact_equals_the_masked_model(first):
    outcomes = [o for s in range(first, first + SHARE) for o in fuzz.check_program(s, MASKS)]
    bad = [o for o in outcomes if o.verdict in ("crash", "different")]
    assert not bad, "\n".join(f"--show {o.seed}: {o.mask}, {o.error}\n{o.detail}" for o in bad)
    counts = collections.Counter(o.verdict for o in outcomes)
    assert counts["equal"] >= len(outcomes) // 4  # most programs do lose something
    assert any(o.whole and o.verdict == "equal" for o in outcomes)


def test_a_wrong_claim_of_zero_is_seen(monkeypatch):
    """A rule that calls every elementwise result zero lets units go that still count."""

    def all_zero(step, known):
        return [zeros.everywhere(v.aval.shape) for v in step.eqn.outvars]

    for name in ("add", "logistic", "cos", "exp", "sub"):
        wrong = dataclasses.replace(registry.RULES[name], zeros=all_zero)
        monkeypatch.setitem(registry.RULES, name, wrong)
    outcomes = [o for seed in range(SHARE) for o in fuzz.check_program(seed, MASKS)]
    assert any(o.verdict == "different" for o in outcomes)


def test_a_program_is_determined_by_its_seed_and_masks_change_it():
    changed = 0
    for seed in range(SHARE):
        program, again = random_program(seed), random_program(seed)
        assert str(program) == str(again)
        jax.tree.map(np.testing.assert_array_equal, program.params, again.params)
        assert all((leaf != 0).all() for leaf in jax.tree.leaves(program.params))
        checker = fuzz.Checker(program)
        _, masks = next(fuzz.draw_masks(checker.structure, seed, 1))
        masked = fuzz.masked_params(program.params, masks)
        dense, zeroed = (fuzz.run(checker.full, p, *program.args) for p in (program.params, masked))
        changed += fuzz.difference(dense, zeroed)[0] > fuzz.TOLERANCE
    assert changed > SHARE // 3


def test_every_layer_has_the_shape_that_it_says():
    for kind in KINDS:
        seen = 0
        for seed in range(8):
            draw = Draw(np.random.default_rng(seed))
            shape = {2: (2, 12), 3: (2, 4, 12), 4: (2, 4, 6, 12)}[draw.one(kind.ranks)]
            layer = kind.draw(draw, shape)
            if layer is not None:
                x = jax.ShapeDtypeStruct(shape, np.float64)
                assert jax.eval_shape(layer.apply, layer.params, x).shape == layer.shape, layer.text
                assert not kind.keeps or layer.shape == shape
                seen += 1
        assert seen, f"{kind.name} was never drawn"


def test_numpy_agrees_with_xla():
    assert all(fuzz.agrees_with_xla(seed) for seed in range(6))


def test_a_wrong_shape_from_numpy_is_an_error(monkeypatch):
    monkeypatch.setitem(numpy_eval.TABLE, "add", lambda eqn, xs: np.zeros((9, 9)))
    closed = jax.make_jaxpr(lambda x: x + x)(np.ones(3))
    with pytest.raises(AssertionError, match="numpy gave shape"):
        numpy_eval.evaluate(closed, np.ones(3))


def test_only_numbers_of_the_masked_model_are_compared():
    nan, one = np.array([np.nan, 1.0]), np.array([1.0, 1.0])
    assert fuzz.difference([nan], [one]) == (0.0, False)
    assert fuzz.difference([one], [nan]) == (float("inf"), True)
    assert fuzz.difference([one], [np.ones(3)]) == (float("inf"), True)
    assert fuzz.difference([one], [one * 2]) == (1.0, True)


def test_a_crash_is_reported_with_its_place(monkeypatch):
    def broken(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(fuzz.jp, "compact", broken)
    outcomes = [o for o in fuzz.check_program(1, MASKS) if o.verdict != "nothing"]
    assert outcomes and all(o.verdict == "crash" and "on purpose" in o.detail for o in outcomes)


def test_a_slow_program_is_a_crash():
    with pytest.raises(TimeoutError, match="took more than"):
        fuzz._too_slow()


def test_a_loop_of_no_steps_gives_empty_rows():
    def fn(x):
        return jax.lax.scan(lambda c, row: (c + row.sum(), c * row), 1.0, x)

    closed = jax.make_jaxpr(fn)(np.ones((0, 3)))
    last, rows = numpy_eval.evaluate(closed, np.ones((0, 3)))
    assert last == 1.0 and rows.shape == (0, 3)


def test_what_decides_by_nan_is_listed():
    closed = jax.make_jaxpr(lambda x: jax.numpy.where(x > 0, x, 0.0) + 1)(np.ones(2))
    with numpy_eval.watching() as decided:
        numpy_eval.evaluate(closed, np.ones(2))
        assert decided == []
        numpy_eval.evaluate(closed, np.array([np.nan, 1.0]))
    assert decided == ["gt"]


def test_a_certificate_warns_where_nan_decides():
    """The masked weight norm is 0 / 0; the relu after it takes that NaN for negative."""
    nan = [o for o in fuzz.check_program(1989, 1) if o.error > fuzz.TOLERANCE]
    assert [(o.verdict, o.by_nan) for o in nan] == [("equal", True)]
    (row,) = fuzz.excused([fuzz.Chunk([1989], nan, [])])
    assert (row["seed"], row["why"]) == (1989, "masked NaN is compared")


def test_the_narrowest_float_of_a_program_sets_its_rounding():
    """The softmax of ``jax.nn`` is in float32, so that evaluations differ there by more."""

    def fn(x):
        return jax.jit(lambda x: x.astype(np.float32).astype(np.float64))(x)

    assert fuzz.rounding_of(jax.make_jaxpr(fn)(np.ones(2))) == np.finfo(np.float32).eps
    assert fuzz.rounding_of(jax.make_jaxpr(lambda x: x + x)(np.ones(2))) == np.finfo(float).eps
    assert fuzz.agrees_with_xla(7800)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def run_all(seeds, count, workers):
        return (fuzz.work(seeds[i : i + 2], count) for i in range(0, len(seeds), 2))

    monkeypatch.setattr(fuzz, "run_all", run_all)
    whole = list(run_all(range(6), 1, 1))
    stopped = fuzz.resumed(tmp_path / "done", range(6), 1, 1)
    assert next(stopped) == whole[0]
    assert list(fuzz.resumed(tmp_path / "done", range(6), 1, 1)) == whole
    assert len((tmp_path / "done").read_text().splitlines()) == 3
    monkeypatch.setattr(fuzz, "run_all", lambda seeds, *_: iter(seeds))  # nothing is left
    assert fuzz.summary(list(fuzz.resumed(tmp_path / "done", range(6), 1, 1)))["programs"] == 6
