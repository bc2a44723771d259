"""What goes, by which score, and how the rest is repaired: the rows that take no training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks.studies.pretrained import energy, flap
from benchmarks.studies.speech import in_order
from benchmarks.studies.speech.case import FFN, HEADS, Case, loss
from benchmarks.studies.speech.repair import in_blocks, repaired
from jaxprune.runtimes._sensitivity import rounded

WIDTHS = ("encoder/conv2/kernel:2", "decoder/embedding:1")  # of the residual streams


class Pruned(NamedTuple):
    """Parameters of the dense shapes, and masks where whole units went."""

    params: Any
    masks: Any = None


# ---- whole units ---------------------------------------------------------------------------------


def magnitude(case: Case) -> Any:
    return jax.tree.map(jnp.square, case.model.params)


def by_energy(case: Case) -> Any:
    return energy(case.model.params, case.stats)


def by_flap(case: Case) -> Any:
    return flap(case.model.params, case.stats)


def by_taylor(case: Case) -> Any:
    return case.taylor


def units(
    case: Case, score: Callable[[Case], Any], dims: Sequence[str], sparsity: float, repair: bool
) -> Pruned:
    """The same share of the units of each dimension."""
    pattern = jp.structured(case.model.structure, dims=tuple(dims), reduce=jp.reduce.sum)
    return cut(case, pattern(score(case), sparsity), repair)


def cut(case: Case, masks: Any, repair: bool = True) -> Pruned:
    """The dense model without some units; repaired: what reads them is refit, biases make up."""
    dense = case.model.params
    params = jp.apply_masks(dense, masks)
    if repair:
        params = repaired(dense, params, masks, case.stats)
    return Pruned(jp.apply_masks(params, masks), masks)


def without_layer(case: Case, side: str) -> Pruned:
    """Without the layer of one side that the loss on some calibration data needs least."""
    tried = [layer_masks(case, side, k) for k in range(len(case.model.params[side]["blocks"]))]
    found = [calibration_loss(case, jp.apply_masks(case.model.params, masks)) for masks in tried]
    return cut(case, tried[int(np.argmin(found))])


def layer_masks(case: Case, side: str, layer: int) -> Any:
    """Masks without what a layer adds; its last biases stay."""
    own, dims = f"{side}/blocks/{layer}/", case.model.structure.dims
    inner = [n for n, d in dims.items() if all(slot.path.startswith(own) for slot in d.slots)]
    keep = {n: np.zeros(dims[n].size, bool) for n in inner if not dims[n].frozen}
    return case.model.structure.masks_of(keep)


def calibration_loss(case: Case, params: Any) -> float:
    return float(np.mean([_loss(params, *lesson) for lesson in case.lessons[:4]]))


_loss = jax.jit(loss)


# ---- single weights ------------------------------------------------------------------------------


def wanda(case: Case, pattern: Any, refit: bool = True) -> Pruned:
    dense, stats = case.model.params, case.stats
    masks = pattern(jp.wanda(dense, input_norms=stats.norms), 0.5)
    params = jp.apply_masks(dense, masks)
    if refit:
        params = jp.oneshot.refit(dense, masks, stats, start=params, progress=False)
    return Pruned(params)


def smallest(case: Case, pattern: Any) -> Pruned:
    """The smallest weights, nothing repaired."""
    dense = case.model.params
    return Pruned(jp.apply_masks(dense, pattern(jp.magnitude(dense), 0.5)))


def sparsegpt(case: Case, pattern: Any, refit: bool = False) -> Pruned:
    return Pruned(_sparsegpt(case.model.params, case.stats, pattern, refit)[0])


def _sparsegpt(dense: Any, stats: Any, pattern: Any, refit: bool) -> tuple[Any, Any]:
    """Refit: what SparseGPT left is fit again by least squares, all of a kernel at once."""
    params, masks = jp.oneshot.sparsegpt(dense, stats, 0.5, pattern=pattern, progress=False)
    if refit:
        params = jp.oneshot.refit(dense, masks, stats, start=params, progress=False)
    return params, masks


def sparsegpt_in_order(case: Case, pattern: Any) -> Pruned:
    """Each block is calibrated on what the pruned ones before it give, and refit."""
    prune = functools.partial(_sparsegpt, pattern=pattern, refit=True)
    return Pruned(in_order.pruned(case, prune))


def in_bits(case: Case, bits: int) -> Pruned:
    """All matrices rounded as engines hold them, one scale for each output; sums stay in float."""

    def held(path: Any, w: Any) -> Any:
        word = jp.typing.path_str(path).endswith("embedding")  # its rows are the head's outputs
        return rounded(w, bits, 0 if word else -1) if w.ndim > 1 else w

    return Pruned(jax.tree_util.tree_map_with_path(held, case.model.params))


# ---- rows ----------------------------------------------------------------------------------------

SINGLE = jp.unstructured(where=in_blocks)
EVERY = jp.unstructured(where=lambda path, leaf: path.endswith("kernel"))  # of a block
PER_OUTPUT = jp.unstructured(per_output=True, where=in_blocks)
TWO_OF_FOUR = jp.n_m(2, 4, where=in_blocks)


def _units(score: Any, dims: Sequence[str], sparsity: float, repair: bool = True) -> Any:
    return functools.partial(units, score=score, dims=dims, sparsity=sparsity, repair=repair)


ROWS: dict[str, Callable[[Case], Pruned]] = {
    "encoder FFN -30 %, magnitude, no repair": _units(magnitude, FFN[:1], 0.3, False),
    "encoder FFN -30 %, FLAP": _units(by_flap, FFN[:1], 0.3),
    "encoder FFN -30 %, energy": _units(by_energy, FFN[:1], 0.3),
    "encoder FFN -30 %, Taylor": _units(by_taylor, FFN[:1], 0.3),
    "FFN -30 %, FLAP": _units(by_flap, FFN, 0.3),
    "encoder heads -1/3, energy": _units(by_energy, HEADS[:1], 1 / 3),
    "encoder heads -1/3, Taylor": _units(by_taylor, HEADS[:1], 1 / 3),
    "all heads -1/3, energy": _units(by_energy, HEADS, 1 / 3),
    "all heads -1/3, Taylor": _units(by_taylor, HEADS, 1 / 3),
    "an encoder layer": functools.partial(without_layer, side="encoder"),
    "a decoder layer": functools.partial(without_layer, side="decoder"),
    "width of the encoder -10 %, Taylor": _units(by_taylor, WIDTHS[:1], 0.1),
    "width of the decoder -10 %, Taylor": _units(by_taylor, WIDTHS[1:], 0.1),
    "50 % of weights, magnitude, no repair": functools.partial(smallest, pattern=SINGLE),
    "50 % of weights, Wanda + refit": functools.partial(wanda, pattern=PER_OUTPUT),
    "50 % of weights, SparseGPT": functools.partial(sparsegpt, pattern=SINGLE),
    "50 % of weights, SparseGPT + refit": functools.partial(
        sparsegpt, pattern=SINGLE, refit=True
    ),
    "50 % of weights, SparseGPT + refit, in order": functools.partial(
        sparsegpt_in_order, pattern=EVERY
    ),
    "2:4, Wanda + refit": functools.partial(wanda, pattern=TWO_OF_FOUR),
    "2:4, SparseGPT": functools.partial(sparsegpt, pattern=TWO_OF_FOUR),
    "int8 weights": functools.partial(in_bits, bits=8),
}  # fmt: skip
