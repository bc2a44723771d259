"""What is taken as a pattern: one of ours, or any function of scores and a sparsity."""

from __future__ import annotations

from typing import Any

from jaxprune.patterns._block import block
from jaxprune.patterns._channel import channel
from jaxprune.patterns._n_m import n_m
from jaxprune.patterns._structured import structured
from jaxprune.patterns._threshold import threshold
from jaxprune.patterns._unstructured import unstructured
from jaxprune.typing import Pattern, PatternFn

_FACTORIES: dict[Any, str] = {
    unstructured: "jp.unstructured()",
    n_m: "jp.n_m(2, 4)",
    block: "jp.block((4, 4))",
    channel: "jp.channel()",
    threshold: "jp.threshold(0.1)",
    structured: "jp.structured(jp.infer_structure(fn, params, x))",
}


def as_pattern(pattern: PatternFn) -> Pattern:
    """Returns a pattern as it is, and a function ``(scores, sparsity) -> masks`` wrapped as one.

    Raises:
      TypeError: for what is no function, and for a factory such as ``jp.n_m`` that wasn't called.

    Example:
      >>> import jax, jaxprune as jp
      >>> own = lambda scores, sparsity: jax.tree.map(lambda s: s > sparsity, scores)
      >>> jp.patterns.as_pattern(own)({"w": jax.numpy.array([0.1, 0.9])}, 0.5)["w"]
      Array([False,  True], dtype=bool)
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not callable(pattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; wanted a function (scores, sparsity) -> masks "
            "such as jp.unstructured()"
        )
    factory = _FACTORIES.get(pattern)
    if factory is not None:
        raise TypeError(
            f"pattern is jp.{pattern.__name__} itself, which makes patterns; call it: {factory}"
        )
    return Pattern(pattern, repr(pattern))
