"""Finding the structure of a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune._calls import calls_fn
from jaxprune.structure import infer as _infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.naming import from_programs


@calls_fn("jp.infer_structure")
@_infer.collecting_later()
def infer_structure(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    also: Sequence[tuple[Callable[..., Any], Sequence[Any]]] = (),
    semantics: str = _infer.MASKED,
) -> Structure:
    """Finds the logical dimensions of ``fn(params, *args)`` by reading its jaxpr.

    Args:
      fn: a pure function whose first argument is the params tree, in any framework.
      params: any pytree of arrays or ``jax.ShapeDtypeStruct``. State that travels with the
        parameters (batch statistics, caches) belongs here, too.
      *args: the other arguments, arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      also: further uses of the same params, ``[(train_step, (batch,)), ...]``. A dimension is
        prunable only if every use allows it; parameters that only one of them reads are included.
      semantics: what ``jp.compact`` will be asked for. With "masked", what ``top_k`` or ``argmax``
        chooses from is frozen, for what is masked could still be chosen. With "kept" it isn't there
        to be chosen: whole experts of a mixture are a dimension, in the router and in the weights
        that are looked up by what was chosen.

    Returns:
      A :class:`Structure`: ``.dims``, ``.masks(keep)``, ``.keep(masks)``. ``print`` it.

    Raises:
      TypeError: for an fn that isn't a function, or an entry of also that isn't (fn, args).
      ValueError: for params without an array, or semantics of another name.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
      >>> [(d.name, d.size) for d in structure.dims.values() if not d.frozen]
      [('up:1', 8)]
    """
    for entry in also:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], tuple)):
            raise TypeError(
                f"also wants pairs (fn, args) with args a tuple, got {entry!r:.80}; for example "
                "also=[(train_step, (batch,))]"
            )
    _infer.check_semantics(semantics)
    return from_programs(_infer.infer([(fn, args), *also], params, semantics), params)
