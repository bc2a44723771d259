"""Evaluates a jaxpr with numpy: tiny programs run in milliseconds, where XLA would compile first.

A random program is run once and thrown away, so that compiling it costs a hundred times what it
computes. What has no row here is bound as it is, through JAX, and counted in ``BOUND``.
``tests.fuzz`` runs a share of its programs under ``jax.jit`` as well and compares.

All floats are evaluated in float64 and all complex numbers in complex128, whatever their types
are: two programs that are equal stay so to the last digits, also where they compute in bfloat16.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special

from jaxprune.ir import compat

Evaluate = Callable[[Any, list[Any]], Any]
TABLE: dict[str, Evaluate] = {}  # primitive -> (equation, operands) -> a result, or a list of them
BOUND: collections.Counter[str] = collections.Counter()  # primitives that JAX had to evaluate


def evaluate(closed: Any, *args: Any) -> list[np.ndarray]:
    """Returns the results of a jaxpr for flat arguments, floats in float64."""
    jaxpr, consts = compat.open_jaxpr(closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, map(widened, consts), strict=True))
    env.update(zip(jaxpr.invars, map(widened, args), strict=True))

    def read(atom: Any) -> Any:
        return widened(atom.val) if hasattr(atom, "val") else env[atom]

    with np.errstate(all="ignore"):
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            _watch(eqn, operands)
            results = _apply(eqn, operands)
            for var, result in zip(eqn.outvars, results, strict=True):
                env[var] = result
    return [np.asarray(read(v)) for v in jaxpr.outvars]


# What turns a NaN into a number: who knows what it would have been.
DECIDES = {
    "argmax", "argmin", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "sort", "top_k",
}  # fmt: skip
_watchers: list[list[str]] = []


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Lists the primitives that decide something by a NaN."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


def _watch(eqn: Any, xs: Sequence[Any]) -> None:
    if _watchers and eqn.primitive.name in DECIDES and any(map(_has_nan, xs)):
        _watchers[-1].append(eqn.primitive.name)


def _has_nan(x: Any) -> bool:
    return bool(
        _is_plain(x) and np.issubdtype(np.asarray(x).dtype, np.inexact) and np.isnan(x).any()
    )


def _apply(eqn: Any, xs: list[Any]) -> list[np.ndarray]:
    rule = TABLE.get(eqn.primitive.name)
    if rule is None:
        BOUND[eqn.primitive.name] += 1
        typed = [_typed(x, v.aval) for x, v in zip(xs, eqn.invars, strict=True)]
        return [widened(x) for x in compat.bind(eqn, typed)]
    results = rule(eqn, [np.asarray(x) if _is_plain(x) else x for x in xs])
    results = results if isinstance(results, list) else [results]
    return [_as(r, v.aval) for r, v in zip(results, eqn.outvars, strict=True)]


def _is_plain(x: Any) -> bool:
    return not (hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended))


def wide(dtype: Any) -> Any:
    """The type in which values of a type are evaluated."""
    if jax.numpy.issubdtype(dtype, np.floating):
        return np.dtype(np.float64)
    return np.dtype(np.complex128) if jax.numpy.issubdtype(dtype, np.complexfloating) else dtype


def widened(x: Any) -> Any:
    """An array in the type of its evaluation; random keys as they are."""
    if not _is_plain(x):
        return x
    array = np.asarray(x)
    return array.astype(wide(array.dtype), copy=False)


def _typed(x: Any, aval: Any) -> Any:
    return jax.numpy.asarray(x, aval.dtype) if _is_plain(x) else x


def _as(result: Any, aval: Any) -> Any:
    """The type that JAX gives, widened; a wrong shape is an error of this file."""
    if not _is_plain(result):
        return result
    array, dtype = np.asarray(result), wide(aval.dtype)
    if np.iscomplexobj(array) and not np.issubdtype(dtype, np.complexfloating):
        array = array.real
    if array.shape != aval.shape:
        raise AssertionError(f"numpy gave shape {array.shape}, JAX says {aval}")
    return array if array.dtype == dtype else array.astype(dtype)


def _row(*names: str) -> Callable[[Evaluate], Evaluate]:
    def enter(rule: Evaluate) -> Evaluate:
        TABLE.update(dict.fromkeys(names, rule))
        return rule

    return enter


# -------------------------------------------------------------------------------- elementwise

_NUMPY = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum,
    "min": np.minimum, "neg": np.negative, "exp": np.exp, "exp2": np.exp2, "log": np.log,
    "log1p": np.log1p, "expm1": np.expm1, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "tanh": np.tanh, "sqrt": np.sqrt, "cbrt": np.cbrt, "square": np.square, "abs": np.abs,
    "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "pow": np.power, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "is_finite": np.isfinite, "erf": special.erf, "erfc": special.erfc,
    "logistic": special.expit, "atan2": np.arctan2, "real": np.real, "imag": np.imag,
    "conj": np.conj, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh,
    "cosh": np.cosh, "erf_inv": special.erfinv, "lgamma": special.gammaln,
    "digamma": special.digamma, "shift_left": np.left_shift, "rsqrt": lambda x: 1 / np.sqrt(x),
    "complex": lambda a, b: a + 1j * b,
}  # fmt: skip
_SAME = (
    "convert_element_type", "copy", "copy_p", "stop_gradient", "name", "reduce_precision",
    "sharding_constraint",
)  # fmt: skip


def _calls(ufunc: Any) -> Evaluate:
    return lambda eqn, xs: ufunc(*xs)


TABLE.update({name: _calls(ufunc) for name, ufunc in _NUMPY.items()})
TABLE.update(dict.fromkeys(_SAME, lambda eqn, xs: xs[0]))
TABLE["optimization_barrier"] = lambda eqn, xs: xs


@_row("integer_pow")
def _integer_pow(eqn: Any, xs: list[Any]) -> Any:
    y = eqn.params["y"]
    return xs[0] ** (y if np.iscomplexobj(xs[0]) else float(y))


@_row("round")
def _round(eqn: Any, xs: list[Any]) -> Any:
    if "EVEN" in str(eqn.params["rounding_method"]):
        return np.round(xs[0])
    return np.copysign(np.floor(np.abs(xs[0]) + 0.5), xs[0])


@_row("fft")
def _fft(eqn: Any, xs: list[Any]) -> Any:
    kind = eqn.params["fft_type"].name.lower()  # fft, ifft, rfft, irfft
    lengths = eqn.params["fft_lengths"]
    axes = tuple(range(xs[0].ndim - len(lengths), xs[0].ndim))
    return getattr(np.fft, kind + "n")(xs[0], lengths, axes)


@_row("div")
def _div(eqn: Any, xs: list[Any]) -> Any:
    if np.issubdtype(xs[0].dtype, np.integer):
        return np.trunc(xs[0] / xs[1])
    return xs[0] / xs[1]


TABLE["rem"] = lambda eqn, xs: np.fmod(*xs)


@_row("select_n")
def _select(eqn: Any, xs: list[Any]) -> Any:
    which, *cases = xs
    return np.choose(which.astype(int), cases)


@_row("clamp")
def _clamp(eqn: Any, xs: list[Any]) -> Any:
    low, x, high = xs
    return np.minimum(np.maximum(x, low), high)


# ------------------------------------------------------------------------------------- layout

TABLE["transpose"] = lambda eqn, xs: xs[0].transpose(eqn.params["permutation"])
TABLE["squeeze"] = lambda eqn, xs: xs[0].squeeze(tuple(eqn.params["dimensions"]))
TABLE["rev"] = lambda eqn, xs: np.flip(xs[0], eqn.params["dimensions"])
TABLE["concatenate"] = lambda eqn, xs: np.concatenate(xs, eqn.params["dimension"])
TABLE["stack"] = lambda eqn, xs: np.stack(xs, eqn.params["axis"])
TABLE["tile"] = lambda eqn, xs: np.tile(xs[0], eqn.params["reps"])


@_row("reshape")
def _reshape(eqn: Any, xs: list[Any]) -> Any:
    order = eqn.params.get("dimensions")
    x = xs[0] if order is None else xs[0].transpose(order)
    return x.reshape(eqn.outvars[0].aval.shape)


@_row("broadcast_in_dim")
def _broadcast(eqn: Any, xs: list[Any]) -> Any:
    shape = eqn.outvars[0].aval.shape
    inner = [1] * len(shape)
    for k, target in enumerate(eqn.params["broadcast_dimensions"]):
        inner[target] = xs[0].shape[k]
    return np.broadcast_to(xs[0].reshape(inner), shape)


@_row("split")
def _split(eqn: Any, xs: list[Any]) -> Any:
    ends = np.cumsum([int(n) for n in eqn.params["sizes"]])[:-1]
    return np.split(xs[0], ends, eqn.params["axis"])


@_row("unstack")
def _unstack(eqn: Any, xs: list[Any]) -> Any:
    return list(np.moveaxis(xs[0], eqn.params["axis"], 0))


@_row("slice")
def _slice(eqn: Any, xs: list[Any]) -> Any:
    p = eqn.params
    strides = p["strides"] or (1,) * xs[0].ndim
    return xs[0][tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _padded(x: np.ndarray, config: Sequence[Sequence[int]], value: Any) -> np.ndarray:
    """Padding as XLA has it: interior first, then edges, which may be negative."""
    for k, (low, high, inside) in enumerate(config):
        n = x.shape[k]
        spread = np.full(x.shape[:k] + (max(n + (n - 1) * inside, 0),) + x.shape[k + 1 :], value)
        spread = spread.astype(x.dtype)
        rows: list[Any] = [slice(None)] * x.ndim
        rows[k] = slice(None, None, inside + 1)
        spread[tuple(rows)] = x
        edges = [(0, 0)] * x.ndim
        edges[k] = (max(low, 0), max(high, 0))
        x = np.pad(spread, edges, constant_values=value)
        rows[k] = slice(max(-low, 0), x.shape[k] - max(-high, 0))
        x = x[tuple(rows)]
    return x


TABLE["pad"] = lambda eqn, xs: _padded(xs[0], eqn.params["padding_config"], xs[1])


@_row("empty", "empty2", "zeros_like")
def _empty(eqn: Any, xs: list[Any]) -> Any:
    return np.zeros(eqn.outvars[0].aval.shape)


@_row("iota")
def _iota(eqn: Any, xs: list[Any]) -> Any:
    shape, k = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    line = np.arange(shape[k]).reshape([-1 if i == k else 1 for i in range(len(shape))])
    return np.broadcast_to(line, shape)


def _starts(shape: Sequence[int], sizes: Sequence[int], given: Sequence[Any]) -> list[int]:
    return [int(np.clip(i, 0, n - s)) for i, n, s in zip(given, shape, sizes, strict=True)]


def _window(starts: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))


@_row("dynamic_slice")
def _dynamic_slice(eqn: Any, xs: list[Any]) -> Any:
    sizes = eqn.params["slice_sizes"]
    return xs[0][_window(_starts(xs[0].shape, sizes, xs[1 : 1 + xs[0].ndim]), sizes)]


@_row("dynamic_update_slice")
def _dynamic_update_slice(eqn: Any, xs: list[Any]) -> Any:
    x, update, *given = xs
    x = x.copy()
    x[_window(_starts(x.shape, update.shape, given[: x.ndim]), update.shape)] = update
    return x


# --------------------------------------------------------------------------------- reductions

_REDUCE: dict[str, Any] = {
    "reduce_sum": np.sum, "reduce_prod": np.prod, "reduce_max": np.max, "reduce_min": np.min,
    "reduce_and": np.all, "reduce_or": np.any,
}  # fmt: skip
_CUMULATE: dict[str, Any] = {
    "cumsum": np.add, "cumprod": np.multiply, "cummax": np.maximum, "cummin": np.minimum,
    "cumlogsumexp": np.logaddexp,
}  # fmt: skip


def _reduces(function: Any) -> Evaluate:
    return lambda eqn, xs: function(xs[0], axis=tuple(eqn.params["axes"]))


def _cumulates(ufunc: Any) -> Evaluate:
    def rule(eqn: Any, xs: list[Any]) -> Any:
        axis = eqn.params["axis"]
        x = np.flip(xs[0], axis) if eqn.params["reverse"] else xs[0]
        total = ufunc.accumulate(x, axis)
        return np.flip(total, axis) if eqn.params["reverse"] else total

    return rule


TABLE.update({name: _reduces(function) for name, function in _REDUCE.items()})
TABLE.update({name: _cumulates(ufunc) for name, ufunc in _CUMULATE.items()})
TABLE["argmax"] = lambda eqn, xs: np.argmax(xs[0], eqn.params["axes"][0])
TABLE["argmin"] = lambda eqn, xs: np.argmin(xs[0], eqn.params["axes"][0])


@_row("sort")
def _sort(eqn: Any, xs: list[Any]) -> Any:
    axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
    order = np.lexsort(xs[:keys][::-1], axis)
    return [np.take_along_axis(x, order, axis) for x in xs]


@_row("top_k")
def _top_k(eqn: Any, xs: list[Any]) -> Any:
    k, axis = eqn.params["k"], eqn.params.get("axis", xs[0].ndim - 1)
    order = np.argsort(-xs[0], axis, kind="stable").take(np.arange(k), axis)
    return [np.take_along_axis(xs[0], order, axis), order]


def _places(shape: Sequence[int], p: Any, padding: Any, fill: Any, x: np.ndarray) -> np.ndarray:
    """Every entry of every window: windows' shape, then the windows' positions."""
    base = p.get("base_dilation") or (1,) * x.ndim
    config = [(low, high, d - 1) for (low, high), d in zip(padding, base, strict=True)]
    x = _padded(x, config, fill)
    steps = p.get("window_dilation") or (1,) * x.ndim
    rows = []
    for at in itertools.product(*map(range, p["window_dimensions"])):
        starts = [i * d for i, d in zip(at, steps, strict=True)]
        cuts = zip(starts, shape, p["window_strides"], strict=True)
        rows.append(x[tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in cuts)])
    return np.stack(rows)


def _windows(function: Any, fill: float) -> Evaluate:
    def rule(eqn: Any, xs: list[Any]) -> Any:
        shape = eqn.outvars[0].aval.shape
        return function(_places(shape, eqn.params, eqn.params["padding"], fill, xs[0]), axis=0)

    return rule


TABLE["reduce_window_sum"] = _windows(np.sum, 0.0)
TABLE["reduce_window_max"] = _windows(np.max, -np.inf)
TABLE["reduce_window_min"] = _windows(np.min, np.inf)

# ------------------------------------------------------------------------------- contractions


@_row("dot_general")
def _dot(eqn: Any, xs: list[Any]) -> Any:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = list(range(xs[0].ndim)), list(range(100, 100 + xs[1].ndim))
    for i, j in [*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)]:
        right[j] = left[i]
    free = [left[i] for i in left if i not in lc and i not in lb]
    other = [right[j] for j in range(xs[1].ndim) if j not in rc and j not in rb]
    names = {n: i for i, n in enumerate(dict.fromkeys(left + right))}
    out = [names[n] for n in [*(left[i] for i in lb), *free, *other]]
    return np.einsum(xs[0], [names[n] for n in left], xs[1], [names[n] for n in right], out)


@_row("conv_general_dilated")
def _conv(eqn: Any, xs: list[Any]) -> Any:
    """One contraction over features per position of the kernel."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs = xs[0].transpose(numbers.lhs_spec), xs[1].transpose(numbers.rhs_spec)
    rank = lhs.ndim - 2
    edges = zip(p["padding"], p["lhs_dilation"], strict=True)
    lhs = _padded(lhs, [(0, 0, 0), (0, 0, 0), *((a, b, d - 1) for (a, b), d in edges)], 0.0)
    shape = [eqn.outvars[0].aval.shape[k] for k in numbers.out_spec]
    out: Any = 0.0
    for at in itertools.product(*map(range, rhs.shape[2:])):
        starts = [i * d for i, d in zip(at, p["rhs_dilation"], strict=True)]
        cuts = zip(starts, shape[2:], p["window_strides"], strict=True)
        rows = tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in cuts)
        taken = lhs[(slice(None), slice(None), *rows)]
        out = out + _grouped(taken, rhs[(slice(None), slice(None), *at)], p, rank)
    return np.asarray(out).transpose(np.argsort(numbers.out_spec))


def _grouped(x: np.ndarray, kernel: np.ndarray, p: Any, rank: int) -> np.ndarray:
    """(n, c, ...) with (o, i), in feature groups or in batch groups."""
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    space = x.shape[2:]
    count = max(groups, batches)
    kernel = kernel.reshape(count, -1, kernel.shape[1])
    if batches > 1:
        x = x.reshape(batches, -1, x.shape[1], *space)
        out = np.einsum("gnc...,goc->ngo...", x, kernel)
    else:
        x = x.reshape(x.shape[0], groups, -1, *space)
        out = np.einsum("ngc...,goc->ngo...", x, kernel)
    return out.reshape(out.shape[0], -1, *space)


# --------------------------------------------------------------------------- control flow, calls


def _inner(name: str) -> Evaluate:
    return lambda eqn, xs: evaluate(eqn.params[name], *xs)


for _name in ("jit", "pjit", "remat2", "checkpoint"):
    TABLE[_name] = _inner("jaxpr")
for _name in ("custom_jvp_call", "custom_vjp_call", "closed_call", "core_call"):
    TABLE[_name] = _inner("call_jaxpr")


@_row("cond")
def _cond(eqn: Any, xs: list[Any]) -> Any:
    branches = eqn.params["branches"]
    return evaluate(branches[int(np.clip(xs[0], 0, len(branches) - 1))], *xs[1:])


@_row("while")
def _while(eqn: Any, xs: list[Any]) -> Any:
    p = eqn.params
    tests, bodies = p["cond_nconsts"], p["body_nconsts"]
    test, body, carry = xs[:tests], xs[tests : tests + bodies], xs[tests + bodies :]
    while np.any(running := evaluate(p["cond_jaxpr"], *test, *carry)[0]):
        after = evaluate(p["body_jaxpr"], *body, *carry)
        carry = [_where_rows(running, new, old) for new, old in zip(after, carry)]
    return carry


def _where_rows(running: Any, new: Any, old: Any) -> Any:
    """A loop under ``jax.vmap`` has a test for each row: one that is done stays as it is."""
    shape = np.shape(running) + (1,) * (np.ndim(new) - np.ndim(running))
    return np.where(np.reshape(running, shape), new, old).astype(np.asarray(new).dtype)


@_row("scan")
def _scan(eqn: Any, xs: list[Any]) -> Any:
    parts = compat.scan_parts(eqn)
    count = parts.num_consts + parts.num_carry
    consts, carry, inputs = xs[: parts.num_consts], xs[parts.num_consts : count], xs[count:]
    order = range(parts.length)
    rows: list[Any] = [None] * parts.length
    for i in reversed(order) if parts.reverse else order:
        out = evaluate(parts.jaxpr, *consts, *carry, *(x[i] for x in inputs))
        carry, rows[i] = out[: parts.num_carry], out[parts.num_carry :]
    if not rows:
        return [*carry, *(np.zeros(v.aval.shape) for v in eqn.outvars[parts.num_carry :])]
    return [*carry, *map(np.stack, zip(*rows, strict=True))]


# --------------------------------------------------------------------------- gather and scatter


def _index(sizes: Sequence[int], shape: Sequence[int], row: Any, numbers: Any, batch: Any) -> Any:
    """Where one window starts."""
    start = [0] * len(shape)
    for i, k in zip(row, numbers, strict=True):
        start[k] = int(i)
    for k, i in batch:
        start[k] = i
    return start


@_row("gather")
def _gather(eqn: Any, xs: list[Any]) -> Any:
    x, indices = xs
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    shape, sizes = eqn.outvars[0].aval.shape, p["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = tuple(n for k, n in enumerate(sizes) if k not in gone)
    out = np.empty(indices.shape[:-1] + window, x.dtype)
    for at in np.ndindex(indices.shape[:-1]):
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims)
        batch = [(k, at[j]) for k, j in pairs]
        start = _index(sizes, x.shape, indices[at], numbers.start_index_map, batch)
        clipped = _starts(x.shape, sizes, start)
        fill = clipped != start and "FILL" in str(p["mode"])
        out[at] = p_fill(x, p) if fill else x[_window(clipped, sizes)].reshape(window)
    rest = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    return out.transpose(np.argsort([*rest, *numbers.offset_dims]))


def p_fill(x: np.ndarray, p: Any) -> Any:
    """What an index out of bounds reads: NaN, the smallest integer, the largest without a sign."""
    given = p.get("fill_value")
    if given is not None:
        return given
    if np.issubdtype(x.dtype, np.inexact) or x.dtype == bool:
        return np.nan if x.dtype != bool else True
    bounds = np.iinfo(x.dtype)
    return bounds.min if bounds.min else bounds.max


def _keep_new(old: Any, new: Any) -> Any:
    return new


_SCATTER: dict[str, Callable[[Any, Any], Any]] = {
    "scatter": _keep_new, "scatter-add": np.add, "scatter_add": np.add, "scatter-mul": np.multiply,
    "scatter_mul": np.multiply, "scatter-min": np.minimum, "scatter_min": np.minimum,
    "scatter-max": np.maximum, "scatter_max": np.maximum, "scatter-sub": np.subtract,
    "scatter_sub": np.subtract,
}  # fmt: skip


@_row(*_SCATTER)
def _scatter(eqn: Any, xs: list[Any]) -> Any:
    x, indices, updates = xs
    combine = _SCATTER[eqn.primitive.name]
    numbers, x = eqn.params["dimension_numbers"], x.copy()
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = numbers.update_window_dims
    rest = [k for k in range(updates.ndim) if k not in windows]
    updates = updates.transpose([*rest, *windows])
    inner = iter(updates.shape[len(rest) :])
    sizes = [1 if k in gone else next(inner) for k in range(x.ndim)]
    clips = "CLIP" in str(eqn.params["mode"])
    for at in np.ndindex(indices.shape[:-1]):
        pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
        batch = [(k, at[j]) for k, j in pairs]
        start = _index(sizes, x.shape, indices[at], numbers.scatter_dims_to_operand_dims, batch)
        inside = _starts(x.shape, sizes, start)
        if clips or inside == start:
            window = _window(inside, sizes)
            x[window] = combine(x[window], updates[at].reshape(sizes))
    return x
