"""Docstrings for Sphinx: where ``jp.search`` leads to, and stars that are no emphasis."""

from __future__ import annotations

import re
from typing import Any

# A star before arguments that stand in a list of several, "fn, params, *args".
STAR = re.compile(r"(?<![\\*\w`])\*(?=[a-z]+\b(?!\*))")


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolves a reference by the name under which the reference lists the object."""
    if node.get("refdomain") != "py":
        return None
    target, domain = node["reftarget"], env.get_domain("py")
    for name in (target.replace("jp.", "jaxprune.", 1), f"jaxprune.{target}"):
        found = domain.objects.get(name)
        if found is not None:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
    return None


def escaped(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Escapes stars before the names of arguments, which Markdown and reST take for emphasis."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[k] = STAR.sub(r"\\*", line)


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escaped, priority=400)  # before napoleon's
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
