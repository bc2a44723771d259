"""Formulas as MathML, which browsers draw by themselves: the site works without a network."""

from __future__ import annotations

from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml


def inline(self: Any, node: Any) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise SkipNode


def display(self: Any, node: Any) -> None:
    shown = tex2mathml(node.astext(), as_block=True)
    self.body.append(f'<div class="math-block">{shown}</div>')
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
