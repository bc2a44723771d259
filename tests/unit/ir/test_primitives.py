"""The table of primitives: every row has its columns, and no other file knows a name."""

import ast
from pathlib import Path

import jax
import pytest

import jaxprune
from jaxprune.costs.flops import FORMULAS
from jaxprune.ir import compat, primitives, views
from jaxprune.ir.primitives import ANY, CALLS, CONTROL, ROWS, Flops, Kind, Passes
from jaxprune.rules import registry
from tests.models.zoo import ENTRIES

PACKAGE = Path(jaxprune.__file__).parent
KNOWING = ("ir", "rules")  # the folders that may read names and parameters
# What a converter lacks is written as rules, too.
FILES = [
    p for p in PACKAGE.rglob("*.py")
    if p.relative_to(PACKAGE).parts[0] not in KNOWING and p.name != "_onnx_rules.py"
]  # fmt: skip
RULELESS = {
    Kind.INLINED,
    Kind.KERNEL,
    Kind.SIZE,
    Kind.OTHER,
    Kind.OPAQUE,
}  # these get no rule of their own


def names_in(jaxpr):
    """The primitives of a program and of all that it holds."""
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        yield eqn.primitive.name
        for sub in compat.sub_jaxprs(eqn):
            yield from names_in(sub)


def met(entries):
    """The primitives in the models of some entries of the zoo."""
    for entry in entries:
        fn, params, args = entry.build()
        yield from names_in(jax.make_jaxpr(fn)(params, *args))


@pytest.mark.slow
def test_every_primitive_that_the_zoo_meets_has_a_row():
    """Of each row of the zoo the first model and the last; tests/zoo has the test of all."""
    ends = {**{e.row: e for e in reversed(ENTRIES)}}, {e.row: e for e in ENTRIES}
    found = set(met({e: None for end in ends for e in end.values()}))
    assert len(found) > 50
    assert found <= set(ROWS), "add a row to jaxprune/ir/primitives.py"


def test_rules_and_rows_are_of_the_same_primitives():
    own = {n for n in registry.RULES if " of " not in n and not n.startswith(("doc_", "test_"))}
    rows = {n for n, row in ROWS.items() if row.kind not in RULELESS}
    assert rows <= own, "these have a row and no rule"


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_a_member_but_that_of_no_row(kind):
    assert bool(primitives.names(kind)) == (kind is not Kind.UNKNOWN)


@pytest.mark.parametrize("name", ROWS)
def test_the_columns_of_a_row_fit_together(name):
    row = ROWS[name]
    assert row.flops in FORMULAS
    assert row.runs or (row.fused and row.flops is Flops.NONE), "what isn't run costs nothing"
    assert not row.passes or row.fused, "what is handed on is merged"
    assert (row.core > 0) == (row.kind in (Kind.MATRIX, Kind.SOLVE))
    assert row.kind is not Kind.REDUCTION or row.combine or name == "reduce_xor"
    assert row.neutral in (None, ANY, 0)
    assert row.kind is not Kind.TYPE or row.zeros == "first"
    assert row.zeros in ("", "any", "first", "quotient")
    holds = row.kind in CALLS | CONTROL | {Kind.INLINED, Kind.SHARDS}
    assert not holds or row.flops is Flops.UNKNOWN, "it costs what it holds"


def test_a_primitive_without_a_row_is_known_for_nothing():
    row = primitives.row("no such primitive")
    assert row.kind is Kind.UNKNOWN and row.flops is Flops.UNKNOWN
    assert not row.fused and row.runs and row.passes is Passes.NOTHING


def holding(fn, *args):
    return next(e for e in jax.make_jaxpr(fn)(*args).jaxpr.eqns if compat.sub_jaxprs(e))


def relu_by_rule():
    @jax.custom_vjp
    def f(x):
        return x * 2

    f.defvjp(lambda x: (x * 2, x), lambda x, g: (g,))
    return f


PROGRAMS = {
    Kind.LOOP: lambda x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x),
    Kind.WHILE: lambda x: jax.lax.while_loop(lambda c: c.sum() < x.max(), lambda c: c + x, x),
    Kind.BRANCH: lambda x: jax.lax.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * x, x),
    Kind.REMAT: jax.checkpoint(lambda x: x * 2),
    Kind.CUSTOM_JVP: lambda x: jax.nn.relu(x),
    Kind.CUSTOM_VJP: relu_by_rule(),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_a_program_inside_gets_fits_its_inputs(kind):
    eqn = holding(PROGRAMS[kind], jax.numpy.ones((2, 3)))
    while primitives.kind(eqn) is Kind.INLINED:
        eqn = compat.open_jaxpr(compat.sub_jaxprs(eqn)[0])[0].eqns[0]
    assert primitives.kind(eqn) is kind
    for inside in views.entered(eqn, eqn.invars):
        inner = compat.open_jaxpr(inside.jaxpr)[0].invars
        given = [v.aval.shape for v in inside.operands]
        rows = len(compat.scanned(eqn, eqn.invars)) if kind is Kind.LOOP else 0
        held = len(given) - rows
        assert [v.aval.shape for v in inner[:held]] == given[:held]
        assert [v.aval.shape for v in inner[held:]] == [shape[1:] for shape in given[held:]]
        assert inside.fixed.count(None) == len(inside.carried)


# ------------------------------------------------------------------- nobody else knows a name


def is_name(node):
    """``eqn.primitive.name``, ``step.name``."""
    if not (isinstance(node, ast.Attribute) and node.attr == "name"):
        return False
    of = node.value
    return (isinstance(of, ast.Attribute) and of.attr in ("primitive", "step")) or (
        isinstance(of, ast.Name) and of.id in ("primitive", "step", "eqn", "maker")
    )


def is_params(node):
    """``eqn.params``, ``step.params``, ``op.step.params``."""
    if not (isinstance(node, ast.Attribute) and node.attr == "params"):
        return False
    of = node.value
    name = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
    return name in ("step", "eqn", "maker")


def offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(is_name, [node.left, *node.comparators])):
            yield node, "compares a primitive's name"
        if isinstance(node, ast.Subscript) and is_name(node.slice):
            yield node, "looks a primitive's name up"
        gets = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get"
        if gets and any(map(is_name, node.args)):
            yield node, "looks a primitive's name up"
        if is_params(node):
            yield node, "reads a parameter"


def test_only_ir_and_rules_know_names_and_parameters():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {what}"
        for path in FILES
        for node, what in offences(ast.parse(path.read_text()))
    ]
    assert not found, "ask jaxprune/ir/primitives.py or jaxprune/ir/views.py"


@pytest.mark.parametrize(
    "text", ["step.name == 'scan'", "T[step.name]", "T.get(eqn.primitive.name)",
             "eqn.params['y']", "op.step.params.get('y')", "eqn.primitive.name in T"],
)  # fmt: skip
def test_the_search_for_names_finds_them(text):
    assert list(offences(ast.parse(text)))


PRIVATE = {"ctx", "source_info", "call_wrapped", "debug_info", "to_tangent_aval"}


def test_only_compat_reads_what_jax_keeps_private():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} .{node.attr}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "compat.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE
    ]
    assert not found
