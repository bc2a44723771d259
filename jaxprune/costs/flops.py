"""What one equation costs in FLOPs: the formulas that the table of primitives names.

A formula reads the equation's parameters and the shapes of its operands and results, nothing else:
it answers for other widths of the same equation, too. What counts as what:

* A contraction or convolution: 2 FLOPs per multiplication and addition. A convolution counts the
  taps that fall on padding, as published counts do, and not those on zeros that dilation inserts
  (a transposed convolution costs what the forward one does).
* Elementwise: 1 per result element, exp like add, integers like floats. Reductions, cumulative
  sums: 1 per operand element. Pooling: 1 per window element. Sorting: n log2 n per sorted row.
* Moving, reshaping, casting, gathering: 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprune.ir import primitives, views
from jaxprune.ir.primitives import Flops
from jaxprune.ir.tape import Step

Shape = Sequence[Any]
Shapes = Sequence[Shape]
Formula = Callable[[Step, Shapes, Shapes], Any]  # of a step at these operands' and results' shapes


def _none(step: Step, ins: Shapes, outs: Shapes) -> int:
    return 0


def _contraction(step: Step, ins: Shapes, outs: Shapes) -> Any:
    contracted = views.contraction(step).lhs_contract
    return 2 * math.prod(outs[0]) * math.prod(ins[0][k] for k in contracted)


def _ragged(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """Each row of the left side meets one group of the right side."""
    ragged = views.ragged(step)
    free = [k for k in ragged.dims.free(1, len(ins[1])) if k not in ragged.rhs_group]
    return 2 * math.prod(ins[0]) * math.prod(ins[1][k] for k in free)


def _convolution(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """The kernel's in-feature axis holds one group's features, so groups need no case of theirs."""
    conv = views.convolution(step)
    batch, feature, *spatial = conv.out
    _, in_feature, *window = conv.rhs
    places = zip(spatial, window, *views.taps(step), strict=True)
    taps = math.prod(
        _taps(outs[0][o], ins[1][w], stride, low, base, dilation)
        for o, w, stride, (low, _), base, dilation in places
    )
    return 2 * outs[0][batch] * outs[0][feature] * ins[1][in_feature] * taps


def _taps(out: int, window: int, stride: int, low: int, base: int, dilation: int) -> int:
    """Pairs (result, tap) along one axis that don't meet a zero inserted by base dilation."""
    if base == 1:
        return out * window
    at = np.arange(out)[:, None] * stride + np.arange(window) * dilation - low
    return int(np.sum(at % base == 0))


def _per_result(step: Step, ins: Shapes, outs: Shapes) -> Any:
    return math.prod(outs[0])


def _per_operand(step: Step, ins: Shapes, outs: Shapes) -> Any:
    return math.prod(ins[0])


def _per_update(step: Step, ins: Shapes, outs: Shapes) -> Any:
    return math.prod(ins[2])


def _window(step: Step, ins: Shapes, outs: Shapes) -> Any:
    return math.prod(outs[0]) * math.prod(views.window(step))


def _window_gradient(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """Each window of the operand picks one entry, which the source is added to."""
    return math.prod(ins[0]) * math.prod(views.window(step))


def _sort(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """n log2 n; n may be several counts of what is chosen from."""
    rounds = np.ceil(np.log2(np.maximum(ins[0][views.sorted_axis(step, len(ins[0]))], 1)))
    return math.prod(ins[0]) * rounds.astype(int)


def _fft(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """5 n log2 n, the customary count of the Cooley-Tukey algorithm, complex or real."""
    size = np.maximum(math.prod(ins[0]), math.prod(outs[0]))
    return np.ceil(5 * size * math.log2(max(math.prod(views.fft_lengths(step)), 1)))


def _estimate(step: Step, ins: Shapes, outs: Shapes) -> int:
    return views.estimated_flops(step) or 0


FORMULAS: dict[Flops, Formula] = {
    Flops.UNKNOWN: _none,
    Flops.NONE: _none,
    Flops.RESULT: _per_result,
    Flops.OPERAND: _per_operand,
    Flops.UPDATE: _per_update,
    Flops.SORT: _sort,
    Flops.WINDOW: _window,
    Flops.WINDOW_GRADIENT: _window_gradient,
    Flops.CONTRACTION: _contraction,
    Flops.RAGGED: _ragged,
    Flops.CONVOLUTION: _convolution,
    Flops.FFT: _fft,
    Flops.ESTIMATE: _estimate,
}


def flops(step: Step, ins: Shapes, outs: Shapes) -> Any:
    """The FLOPs of one run of a step, at these shapes of its operands and results."""
    return FORMULAS[primitives.of(step).flops](step, ins, outs)


def is_known(step: Step) -> bool:
    """Whether the FLOPs of a step are known, rather than counted as none."""
    how = primitives.of(step).flops
    unsaid = how is Flops.ESTIMATE and views.estimated_flops(step) is None
    return how is not Flops.UNKNOWN and not unsaid
