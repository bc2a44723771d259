"""Formulas as MathML, which browsers draw by themselves: the site works without a network."""

from __future__ import annotations

from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

# What LaTeX knows and docutils does not.
WORDS = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)", r"\textstyle": ""}


def mathml(latex: str, block: bool = False) -> str:
    """Returns a formula as a ``<math>`` element."""
    for word, other in WORDS.items():
        latex = latex.replace(word, other)
    return tex2mathml(latex, as_block=block)


def inline(self: Any, node: Any) -> None:
    self.body.append(mathml(node.astext()))
    raise SkipNode


def display(self: Any, node: Any) -> None:
    shown = mathml(node.astext(), block=True)
    self.body.append(f'<div class="math-block">{shown}</div>')
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
