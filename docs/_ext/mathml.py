"""Formulas as MathML, which browsers draw by themselves: the site works without a network."""

from __future__ import annotations

from typing import Any

from docutils.utils.math import latex2mathml, pick_math_environment
from sphinx.util.nodes import get_node_equation_number


def formula(latex: str, block: bool) -> str:
    """Returns a ``<math>`` element of a formula."""
    tree = latex2mathml.TexToMathML if hasattr(latex2mathml, "TexToMathML") else None
    if tree is None:
        return latex2mathml.tex2mathml(latex, as_block=block)
    return latex2mathml.tex2mathml(latex, as_block=block)


def inline(self: Any, node: Any) -> None:
    self.body.append(formula(node.astext(), block=False))


def display(self: Any, node: Any) -> None:
    latex = node.astext()
    environment = pick_math_environment(latex)
    wrapped = f"\\begin{{{environment}}}{latex}\\end{{{environment}}}"
    number = get_node_equation_number(self, node) if node.get("number") else ""
    shown = formula(wrapped if "align" in environment and "\\\\" in latex else latex, block=True)
    self.body.append(f'<div class="math-block">{shown}{number}</div>')


def skip(self: Any, node: Any) -> None:
    inline(self, node)
    raise_skip()


def raise_skip() -> None:
    from docutils.nodes import SkipNode

    raise SkipNode


def skip_display(self: Any, node: Any) -> None:
    display(self, node)
    raise_skip()


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (skip, None), (skip_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
