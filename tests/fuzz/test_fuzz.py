"""Random programs: compact equals the masked model, or says what stayed. Never a silent difference.

The programs are evaluated with numpy, see ``tests.fuzz.numpy_eval``: XLA would compile each.
``python -m tests.fuzz`` runs as many as one likes.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.compaction.certificate import Certificate
from jaxprune.compaction.cut import Cut
from jaxprune.rules import registry, zeros
from jaxprune.structure import parents
from tests.fuzz import laws as fuzz_laws
from tests.fuzz import masks as fuzz_masks
from tests.fuzz import numpy_eval
from tests.fuzz import run as fuzz
from tests.fuzz.layers.catalogue import KINDS, Draw
from tests.fuzz.programs import Program, random_program

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
        _, masks = next(fuzz.draw_masks(checker.structure, program.params, seed, 1))
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
                y = jax.eval_shape(layer.apply, layer.params, x)
                assert (y.shape, y.dtype) == (layer.shape, np.float64), layer.text
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


def a_program(fn, params, *args):
    return Program(0, (), fn, params, args, differentiable=True)


def ramp(*shape):
    return np.sin(np.arange(1.0, 1 + np.prod(shape))).reshape(shape)


def test_a_certificate_warns_where_nan_decides():
    """The masked weight norm is 0 / 0; the step after it takes that NaN for negative."""
    params = {"v": ramp(3, 4), "mid": ramp(4, 3), "out": ramp(3, 2)}

    def fn(p, x):
        h = x @ (p["v"] / jnp.linalg.norm(p["v"], axis=0)) @ p["mid"]
        return jnp.where(h > 0, 1.0, 0.3) @ p["out"]

    kept = np.arange(4) != 1
    checker = fuzz.Checker(a_program(fn, params, ramp(5, 3)))
    masks = {"v": kept, "mid": kept[:, None], "out": np.array(True)}
    nan = checker.check("one column", masks, gradients=False)
    assert (nan.verdict, nan.by_nan) == ("equal", True)
    (row,) = fuzz.excused([fuzz.Chunk([0], [nan], [])])
    assert (row["seed"], row["why"]) == (0, "masked NaN is compared")


def test_the_narrowest_float_of_a_program_sets_its_rounding():
    """The softmax of ``jax.nn`` is in float32, so that evaluations differ there by more."""

    def fn(x):
        return jax.jit(lambda x: x.astype(np.float32).astype(np.float64))(x)

    assert fuzz.rounding_of(jax.make_jaxpr(fn)(np.ones(2))) == np.finfo(np.float32).eps
    assert fuzz.rounding_of(jax.make_jaxpr(lambda x: x + x)(np.ones(2))) == np.finfo(float).eps


def test_few_bits_are_evaluated_in_many():
    """So that equal programs differ by 1e-16, and by 1e-3 where one is rounded on the way."""

    def fn(w, x):
        return jnp.matmul(x.astype(jnp.bfloat16), w).astype(float)

    w, x = ramp(3, 4).astype(jnp.bfloat16), ramp(2, 3)
    (y,) = numpy_eval.evaluate(jax.make_jaxpr(fn)(w, x), w, x)
    np.testing.assert_allclose(y, x @ w.astype(float), rtol=1e-15)
    eps = fuzz.rounding_of(jax.make_jaxpr(fn)(w, x))
    assert fuzz.allowed(eps) * eps < 0.1 < fuzz.ROUNDING * eps
    assert fuzz.allowed(np.finfo(float).eps) == fuzz.ROUNDING


def test_integers_complex_and_empty_leaves_are_masked_moved_and_differentiated():
    params = {"i": np.array([1, 2]), "c": np.array([1j, 2.0]), "none": np.zeros((0, 2))}
    masks = {"i": np.array([True, False]), "c": np.array([False, True]), "none": np.array(True)}
    masked = fuzz.masked_params(params, masks)
    assert masked["i"].tolist() == [1, 0] and masked["i"].dtype == params["i"].dtype
    assert masked["c"].tolist() == [0, 2] and masked["none"].shape == (0, 2)
    near = fuzz.moved(params, 0, 1e-3)
    assert near["i"] is params["i"] and 1e-4 < abs(near["c"][0] - 1j) < 1e-2
    steep = fuzz.gradient_of(lambda p: {"y": p["i"] * p["c"], "n": p["none"]})(params)
    assert steep["i"].dtype == params["i"].dtype and not steep["i"].any()
    assert steep["c"].dtype == complex and abs(steep["c"]).min() > 0.1


def test_a_primitive_that_numpy_lacks_is_evaluated_by_jax():
    numpy_eval.BOUND.clear()
    a = np.eye(3) + 0.1
    (y,) = numpy_eval.evaluate(jax.make_jaxpr(jnp.linalg.cholesky)(a), a)
    np.testing.assert_allclose(y, np.linalg.cholesky(a))
    assert numpy_eval.BOUND["cholesky"] == 1


def test_integers_out_of_bounds_read_what_xla_reads():
    at = np.array([1, 9])
    for dtype in (np.int32, np.uint8, np.bool_, np.float32):
        x = np.arange(3).astype(dtype)
        closed = jax.make_jaxpr(lambda x: jnp.take(x, at, mode="fill"))(x)
        (y,) = numpy_eval.evaluate(closed, x)
        np.testing.assert_array_equal(y, np.asarray(jnp.take(x, at, mode="fill")))


# ------------------------------------------------------------------------------------------- masks


def meeting_itself():
    """The residual width is both axes of a @ b: its units can't have an order of their own."""
    params = {"w": ramp(3, 6), "a": ramp(6, 4), "b": ramp(4, 6), "c": ramp(6, 2)}

    def fn(p, x):
        h = x @ p["w"]
        return (h + h @ (p["a"] @ p["b"])) @ p["c"]

    return a_program(fn, params, ramp(5, 3))


def test_the_masks_find_orders_that_are_not_proved(monkeypatch):
    monkeypatch.setattr(parents.Obstacles, "between", lambda *_: None)
    checker, found = fuzz.Checker(meeting_itself()), set()
    for seed in range(12):
        for name, masks in fuzz.draw_masks(checker.structure, checker.program.params, seed, 12):
            if checker.check(name, masks, gradients=False).error > 1e-3:
                found.add(name)
    assert {"under parents", "evenly", "n of m"} <= found


def test_orders_that_are_not_proved_are_not_taken():
    checker = fuzz.Checker(meeting_itself())
    for seed in range(3):
        for name, masks in fuzz.draw_masks(checker.structure, checker.program.params, seed, 12):
            assert checker.check(name, masks, gradients=True).verdict != "different"


def test_even_masks_keep_as_many_in_each_row_and_column():
    for seed in range(20):
        mask = fuzz_masks._evenly(np.random.default_rng(seed), (4, 6))
        assert mask.shape == (4, 6) and 0 < mask.sum() < mask.size
        assert len(set(mask.sum(0))) == len(set(mask.sum(1))) == 1
    assert fuzz_masks._evenly(np.random.default_rng(0), (4, 1)).all()


def test_n_of_m_is_the_pattern_of_the_library():
    params = {"w": ramp(8, 3), "odd": ramp(5, 3), "bias": ramp(4)}
    rng = np.random.default_rng(2)
    odd, bias, *_ = sorted(fuzz_masks.n_of_m(None, params, rng), key=np.ndim)
    assert odd.ndim == bias.ndim == 0
    seen = set()
    for seed in range(40):
        _, _, w = fuzz_masks.n_of_m(None, params, np.random.default_rng(seed))
        for n, m in ((2, 4), (1, 2), (1, 4)):
            want = jp.n_m(n, m)({"w": np.abs(params["w"])})["w"]
            seen |= {(n, m)} if np.array_equal(w, want) else set()
    assert seen == {(2, 4), (1, 2), (1, 4)}


def test_rows_under_a_parent_keep_as_many_at_other_places():
    rows = fuzz_masks._rows(np.random.default_rng(0), 5, 6)
    assert len(set(rows.sum(1))) == 1 and len(np.unique(rows, axis=0)) > 1


# -------------------------------------------------------------------------------------------- laws


def a_case(gone=(1, 5), out="o"):
    """Two heads of four channels that lose channel 1; or other ones in each head."""
    params = {"w": ramp(5, 8), "o": ramp(8, 3)}

    def fn(p, x):
        h = jnp.tanh((x @ p["w"]).reshape(-1, 2, 4)).reshape(-1, 8)
        return h @ p["o"] if out == "o" else (h, h @ p["o"])

    masks = {"w": ~np.isin(np.arange(8), gone) & np.ones((5, 1), bool), "o": np.array(True)}
    x = ramp(4, 5)
    small = jp.compact(fn, params, masks, x)
    masked = fuzz_masks.masked_params(params, masks)
    return fuzz_laws.Case(fn, params, (x,), masks, masked, small, 0)


@pytest.mark.parametrize("gone", [(1, 5), (1, 6), (1,), ()])
def test_all_laws_hold_of_heads(gone):
    assert fuzz_laws.broken(a_case(gone)) == []
    assert a_case((1, 5)).small.params["w"].shape == (5, 6)


def test_a_matrix_in_keep_says_what_is_gone_under_each_layer():
    params = {"up": ramp(2, 3, 4), "down": ramp(2, 4, 3)}
    rows = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    masks = {"up": rows[:, None], "down": rows[:, :, None]}

    def fn(p, x):
        step = lambda h, q: (h + jnp.tanh(h @ q["up"]) @ q["down"], None)  # noqa: E731
        return jax.lax.scan(step, x, p)[0]

    small = jp.compact(fn, params, masks, ramp(2, 3))
    (name,) = (n for n, kept in small.keep.items() if kept.ndim == 2)
    np.testing.assert_array_equal(small.keep[name], rows)
    (entries,) = fuzz_laws.removed(small, small._structure)
    down, up = entries
    np.testing.assert_array_equal(up, np.broadcast_to(~rows[:, None], up.shape))
    np.testing.assert_array_equal(down, np.broadcast_to(~rows[:, :, None], down.shape))


def test_a_wrong_place_in_expand_is_seen(monkeypatch):
    grow = Cut.grow
    monkeypatch.setattr(Cut, "grow", lambda self, x, i: jnp.roll(grow(self, x, i), 1, -1))
    laws = {line.partition(":")[0] for line in fuzz_laws.broken(a_case())}
    assert laws == {"expands_in_place", "restricts_back"}


def test_a_masked_unit_that_stays_is_seen(monkeypatch):
    case = a_case(out="channels")  # they come out, so that none can go
    assert not case.small.certificate.exact and not fuzz_laws.broken(case)
    monkeypatch.setattr(Certificate, "exact", property(lambda self: True))
    assert [line for line in fuzz_laws.broken(case) if "masked units stay" in line]


def test_another_type_and_a_certificate_that_says_nothing_are_seen(monkeypatch):
    case = a_case()
    short = jax.tree.map(lambda w: w.astype(np.float32), case.small.params)
    object.__setattr__(case.small, "params", short)
    assert any(line.startswith("keeps_types") for line in fuzz_laws.broken(case))
    monkeypatch.setattr(Certificate, "__str__", lambda self: "")
    assert any(line.startswith("prints") for line in fuzz_laws.broken(case))


def test_all_true_masks_that_change_something_are_seen(monkeypatch):
    case = a_case()
    assert fuzz_laws.all_true_is_the_identity(case.fn, case.params, case.args) == []
    monkeypatch.setattr(fuzz_laws.jp, "compact", lambda *_: case.small)
    lines = fuzz_laws.all_true_is_the_identity(case.fn, case.params, case.args)
    assert any("small.params differ" in line for line in lines)
    assert any("certificate says" in line for line in lines)


def test_compact_functions_run_eagerly_and_compiled():
    assert fuzz.compiled_agrees(3) == []


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
