"""What one equation costs in FLOPs: a table, by primitive.

A rule reads the equation's parameters and the shapes of its operands and results, nothing else: it
answers for other widths of the same equation, too. What counts as what:

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

from jaxprune.rules.pointwise import POINTWISE

Shape = Sequence[int]
Rule = Callable[[dict[str, Any], Sequence[Shape], Sequence[Shape]], int]  # parameters, ins, outs


def _names(text: str) -> set[str]:
    return set(text.split())


FREE = _names("""
    axis_index bitcast_convert_type broadcast_in_dim broadcast_to complex concatenate
    convert_element_type copy copy_p create_token device_put dynamic_slice dynamic_update_slice
    empty empty2 gather imag iota layout_constraint name optimization_barrier pad pbroadcast pvary
    random_clone random_fold_in random_seed random_split random_unwrap random_wrap real
    reduce_precision relayout reshape reshard rev scatter sharding_constraint slice split squeeze
    stack stop_gradient tile transpose unstack with_memory_space_constraint zeros_like
""")
ELEMENTWISE = {*POINTWISE} - FREE
REDUCING = _names("""
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max reduce_min
    reduce_or reduce_prod reduce_sum reduce_xor
""")


def _dot(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    (contracting, _), _ = params["dimension_numbers"]
    return 2 * math.prod(outs[0]) * math.prod(ins[0][k] for k in contracting)


def _ragged_dot(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """Each row of the left side meets one group of the right side."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    used = {*contracting, *batch, *numbers.rhs_group_dimensions}
    free = math.prod(n for k, n in enumerate(ins[1]) if k not in used)
    return 2 * math.prod(ins[0]) * free


def _conv(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """The kernel's in-feature axis holds one group's features, so groups need no case of theirs."""
    numbers = params["dimension_numbers"]
    batch, feature, *spatial = numbers.out_spec
    _, in_feature, *window = numbers.rhs_spec
    taps = math.prod(
        _taps(outs[0][o], ins[1][w], stride, low, base, dilation)
        for o, w, stride, (low, _), base, dilation in zip(
            spatial,
            window,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    return 2 * outs[0][batch] * outs[0][feature] * ins[1][in_feature] * taps


def _taps(out: int, window: int, stride: int, low: int, base: int, dilation: int) -> int:
    """Pairs (result, tap) along one axis that don't meet a zero inserted by base dilation."""
    if base == 1:
        return out * window
    at = np.arange(out)[:, None] * stride + np.arange(window) * dilation - low
    return int(np.sum(at % base == 0))


def _per_result(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    return math.prod(outs[0])


def _per_operand(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    return math.prod(ins[0])


def _window(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    return math.prod(outs[0]) * math.prod(params["window_dimensions"])


def _window_gradient(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """Each window of the operand picks one entry, which the source is added to."""
    return math.prod(ins[0]) * math.prod(params["window_dimensions"])


def _sort(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    n = ins[0][params.get("dimension", -1)]
    return math.prod(ins[0]) * math.ceil(math.log2(max(n, 1)))


def _scatter(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    return math.prod(ins[2])


def _fft(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """5 n log2 n, the customary count of the Cooley-Tukey algorithm, complex or real."""
    size = max(math.prod(ins[0]), math.prod(outs[0]))
    return math.ceil(5 * size * math.log2(max(math.prod(params["fft_lengths"]), 1)))


def _pallas(params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    estimate = params["cost_estimate"]
    return int(estimate.flops) if estimate is not None else 0


RULES: dict[str, Rule] = {
    **dict.fromkeys(FREE, lambda params, ins, outs: 0),
    **dict.fromkeys(ELEMENTWISE, _per_result),
    **dict.fromkeys(REDUCING, _per_operand),
    **dict.fromkeys(("sort", "top_k", "approx_top_k"), _sort),
    **dict.fromkeys([f"scatter-{op}" for op in ("add", "sub", "mul", "min", "max")], _scatter),
    **dict.fromkeys([f"reduce_window{op}" for op in ("", "_sum", "_max", "_min")], _window),
    "select_and_scatter_add": _window_gradient,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "fft": _fft,
    "pallas_call": _pallas,
}

# Equations that a compiler merges into their neighbours: they move no memory of their own.
_CUMULATIVE = {name for name in REDUCING if name.startswith("cum")}
FUSED = {
    *FREE, *ELEMENTWISE, *REDUCING, *(name for name in RULES if name.startswith("scatter"))
} - _CUMULATIVE - {"gather"}  # fmt: skip
