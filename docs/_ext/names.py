"""``:func:`jp.search``` in docstrings leads to ``jaxprune.search``, and to where it is documented."""

from __future__ import annotations

from typing import Any


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


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
