"""Results are tables: as text where they are printed, as plain HTML in notebooks."""

from __future__ import annotations

import functools
import html.parser
import re

import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import _tables as tables

X = jnp.ones((2, 3))
PARAMS = {
    "embed": jnp.ones((5, 3)),
    "layers": [{"w": jnp.ones((3, 3))}, {"w": jnp.ones((3, 3))}],
    "up<1>": jnp.arange(24.0).reshape(3, 8),
    "down": jnp.ones((8, 2)),
}


def net(p, tokens):
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = jnp.tanh(x @ layer["w"])
    return jnp.tanh(x @ p["up<1>"]) @ p["down"]


TOKENS = jnp.arange(4)


def first(params):
    return float(params["embed"][0, 0])


@functools.cache
def shown():
    """One of each result that a notebook shows."""
    structure = jp.infer_structure(net, PARAMS, TOKENS)
    masks = structure.masks({"up<1>:1": jnp.arange(8) > 3})
    target = jp.Target(params=0.8)
    dims = "up<1>:1"
    scores = jp.magnitude(PARAMS)
    search = jp.Search(net, PARAMS, structure, scores, TOKENS, dims=dims)
    return {
        "structure": structure,
        "certificate": jp.compact(net, PARAMS, masks, TOKENS).certificate,
        "comparison": jp.compare({"a & b": (jnp.sin, (X,)), "c": (jnp.cos, (X,))}, repeats=2),
        "plan": search.plan(target),
        "front": search.pareto([target, jp.Target(params=0.9)], metric=first),
        "metric": search.to_metric(first, floor=1.0, minimize="params", bisections=2),
        "stats": jp.calibrate(net, PARAMS, [TOKENS]),
        "summary": jp.summary(PARAMS, masks, fn=net, args=(TOKENS,)),
        "cost": jp.cost(net, PARAMS, TOKENS),
        "timing": jp.benchmark(jnp.sin, X, repeats=2),
    }


KINDS = ("structure", "certificate", "comparison", "plan", "front", "metric", "stats", "summary",
         "cost", "timing")  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and collects rows of tables and all text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.rows, self.text, self.attributes = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("kind", KINDS)
def test_html_says_what_print_says(kind):
    result = shown()[kind]
    page = Reader(result._repr_html_())
    assert page.rows and {len(row) for row in page.rows} <= set(range(2, 9))
    printed = str(result)
    for word in (w for row in page.rows for cell in row for w in cell.split() if kind != "timing"):
        assert word in printed
    assert page.text and not any(tag in str(page.attributes) for tag in ("src", "href", "class"))


@pytest.mark.parametrize("kind", KINDS)
def test_html_needs_nothing_and_has_no_colors_of_its_own(kind):
    page = shown()[kind]._repr_html_()
    assert not re.search(
        r"<(script|style|link|img)|https?:|#[0-9a-f]{3}|background|color:(?!inherit)", page
    )
    assert "currentColor" in page


def test_texts_are_escaped():
    page = shown()["structure"]._repr_html_()
    assert "up&lt;1&gt;" in page and "<1>" not in page
    assert "a &amp; b" in shown()["comparison"]._repr_html_()


def test_statistics_are_a_short_table():
    text = str(shown()["stats"])
    assert repr(shown()["stats"]) == text and "Array" not in text and len(text.splitlines()) < 12
    lines = text.splitlines()
    assert lines[0] == "statistics of the inputs of 4 leaves"
    assert re.search(r"^layers/0-1/w +3 +4 +3 x 3$", text, re.M)
    assert re.search(r"^down +8 +4 +8 x 8$", text, re.M)
    assert re.search(r"^embed +gather at .*its rows are looked up$", text, re.M)


def test_statistics_of_stacks_and_without_grams():
    stack = jnp.ones((6, 4, 4))
    fn = lambda p, x: jnp.einsum("eab,eta->etb", p["w"], x)  # noqa: E731
    stats = jp.calibrate(fn, {"w": stack}, [jnp.ones((6, 2, 4))], grams=False)
    assert re.search(r"^w +6 x 4 +2 +-$", str(stats), re.M)


def test_columns_stand_below_each_other():
    parts = ["head", tables.Table(("a", "n"), [("xyz", "1")], (1,)), "",
             tables.Table(("bcdef", "m"), [("x", "100")], (1,))]  # fmt: skip
    assert tables.text(parts).split("\n") == [
        "head", "a        n", "xyz      1", "", "bcdef    m", "x      100",
    ]  # fmt: skip
