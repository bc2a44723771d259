"""The same function at smaller dense shapes, equal to the masked model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune.compaction import certificate as _certificate
from jaxprune.compaction import plan
from jaxprune.compaction.checking import Checker, Source
from jaxprune.compaction.cut import Cut
from jaxprune.compaction.masked import Masked
from jaxprune.compaction.model import Compact
from jaxprune.compaction.small_function import SmallFunction
from jaxprune.structure import infer as _infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.naming import from_program


@calls_fn("jp.compact")
def compact(
    fn: Callable[..., Any], params: Any, masks: Any, *args: Any, semantics: str = plan.MASKED
) -> Compact:
    """Evaluates ``fn`` at the smaller dense shapes that the masks leave, provably equal.

    The reference is the masked model ``fn(apply_masks(params, masks), *args)``. A unit of a
    dimension is a candidate when some slot masks all of it. It is removed if it contributes zero at
    every operation that reduces over its dimension (a product, a mean, softmax): because its own
    masked value is zero, or because all weights that read it are masked. Other candidates stay
    dense, and the certificate says why.

    Args:
      fn: a pure function of ``(params, *args)``.
      params: any pytree of arrays, or of ``jax.ShapeDtypeStruct`` for a model that does not fit
        into memory: the masks alone decide then, and ``restrict({path: leaf})`` of the result cuts
        leaf by leaf what is read later. Such leaves are to be zero where they are masked.
      masks: a tree like params, True = kept.
      *args: example arguments, arrays or ``jax.ShapeDtypeStruct``. The result works for every
        batch size and length that ``fn`` takes.
      semantics: "masked" equals the masked model. "kept" is for models that will be trained on:
        removed units count as not there, whatever their values, and means and variances over a
        cut axis divide by what is left, as in a module written at the small size. Other constants
        stay, the square root of the head size in attention among them. What is not there is not
        chosen either: whole experts of a mixture go, and the choice is among those that are left
        (docs/experts.md).

    Returns:
      A :class:`Compact` with ``fn``, ``params``, ``certificate``, ``restrict`` and ``expand``.

    Raises:
      TypeError: for a leaf that is a shape only, where values of its removed slices are needed.
      ValueError: for masks that do not fit params, semantics of another name, or masks that leave
        fewer units than ``top_k`` chooses of them.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> structure = jp.infer_structure(fn, params, x)
      >>> masks = structure.masks({"up:1": jnp.arange(8) < 2})
      >>> small = jp.compact(fn, params, masks, x)
      >>> small.params["up"].shape, small.params["down"].shape
      ((3, 2), (2, 2))
      >>> bool(jnp.allclose(small.fn(small.params, x), fn(jp.apply_masks(params, masks), x)))
      True
    """
    _infer.check_semantics(semantics)
    with _infer.collecting_later():
        (program,) = _infer.infer([(fn, args)], params, semantics)
        structure = from_program(program, params)
        masked = Masked.of(structure, params, masks)
        planned, demand = plan.decide(program, masked, semantics)
        small = Cut(structure, planned).masked(masked)
        made = assemble(fn, structure, planned, args, small, params, Source.of(masked))
        made.fn.stage(small, args, program, demand)  # type: ignore[attr-defined]
    return made


def assemble(
    fn: Callable[..., Any],
    structure: Structure,
    planned: plan.Plan,
    args: Any,
    small: Any,
    full: Any,
    source: Source | None = None,
) -> Compact:
    """A compact model of its plan and its small params.

    ``full`` has the types of the full params. Without a source of the masked model, that is the
    expansion of ``small``.
    """
    decisions = planned.decisions
    keep = {
        name: planned.kept(name) if name in decisions else np.ones(dim.size, bool)
        for name, dim in structure.dims.items()
    }
    function = SmallFunction(fn, structure, planned)
    function.traced_for = jax.eval_shape(lambda *tree: tree, full, args)
    cut = Cut(structure, planned)
    checker = Checker(function, cut, args, source or Source.of_small(small))
    certificate = _certificate.of_plan(planned, structure, checker)
    return Compact(function, small, certificate, keep, structure, planned)
