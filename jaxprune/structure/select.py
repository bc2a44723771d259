"""Which dimensions are meant, by names or labels with wildcards."""

from __future__ import annotations

from collections.abc import Sequence

from jaxprune.structure.dimensions import Structure
from jaxprune.structure.table import hints


def chosen_dims(
    structure: Structure, dims: str | Sequence[str], argument: str = "dims"
) -> list[str]:
    """The prunable dimensions whose names or labels match one of the patterns (``fnmatch``).

    Raises:
      TypeError: for dims that are neither a pattern nor several.
      ValueError: without patterns; when one matches no dimension, or only frozen ones.
    """
    patterns = [dims] if isinstance(dims, str) else dims
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f'{argument} is {dims!r}; wanted names or labels, such as "*hidden" or ["a:1", "b:1"]'
        )
    if not patterns:
        raise ValueError(f'{argument} is empty; write {argument}="*" for all prunable dimensions')
    found: list[str] = []
    for pattern in patterns:
        matched = [n for n, d in structure.dims.items() if d.matches(pattern)]
        free = [n for n in matched if not structure.dims[n].frozen]
        if not free:
            why = "; ".join(f"{n}: {structure.dims[n].frozen}" for n in matched[:4])
            every = [d for d in structure.dims.values() if not d.frozen]
            names = ", ".join(f"{d.name} ({d.label})" for d in every[:8])
            advice = "".join(f"; {hint}" for hint in hints(structure))
            raise ValueError(
                f"{argument}={pattern!r} matches no prunable dimension"
                + (f" (frozen: {why})" if matched else "")
                + f"; prunable are: {names or 'none, see print(structure)'}{advice}"
            )
        found += [n for n in free if n not in found]
    return found
