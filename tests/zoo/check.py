"""One model halved at random, and its compact model held against the masked one: one row."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.structure.dimensions import Structure
from tests.models.outside.model import Model

EQUAL = 1e-5  # the largest relative error in float32
ROUNDING = 1e-9  # the same in float64, where float32 leaves it open
# Leaves that must stay positive, and those that moving averages divide by.
STATISTICS = ("var", "var_ema", "variance", "running_var", "count", "nu")

Row = dict[str, Any]


def drawn(params: Any, seed: int) -> Any:
    """Parameters around their initial values, none of them zero; variances stay positive."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [_drawn(jp.typing.path_str(p), x, rng) for p, x in leaves])


def _drawn(path: str, leaf: Any, rng: np.random.Generator) -> Any:
    if not is_float(leaf):
        return leaf
    noise = rng.normal(size=leaf.shape) * 0.1
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        noise = noise + 1j * rng.normal(size=leaf.shape) * 0.1
    new = np.asarray(leaf) + noise
    if any(word in path.lower().replace("/", " ").split() for word in STATISTICS):
        new = np.abs(new) + 0.5
    return jnp.asarray(new, leaf.dtype)


def halved(structure: Structure, seed: int) -> Any:
    """Masks that keep a random half of every prunable dimension."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, dim in structure.dims.items():
        if not dim.frozen:
            keep[name] = np.zeros(dim.size, bool)
            keep[name][rng.permutation(dim.size)[: max(1, dim.size // 2)]] = True
    return structure.masks(keep)


def count(params: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


def frozen_share(structure: Structure) -> dict[str, int]:
    """Reason -> entries of the leaves with an axis that it freezes."""
    blocked: Counter[str] = Counter()
    for dim in structure.dims.values():
        if dim.frozen:
            blocked[dim.frozen] += dim.params
    return dict(blocked.most_common(8))


def untouched(structure: Structure) -> int:
    """Entries of the leaves that no prunable dimension governs."""
    free = {s.path for d in structure.dims.values() if not d.frozen for s in d.slots}
    sizes = {p: int(np.prod(s)) for p, s in zip(structure.paths, structure.shapes, strict=True)}
    return sum(size for path, size in sizes.items() if path not in free)


def is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def relative_error(want: Any, got: Any) -> float:
    """The largest over the leaves of max|got - want| / max|want|; infinite for a stray NaN."""
    pairs = zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True)
    return max((_leaf_error(_numbers(a), _numbers(b)) for a, b in pairs), default=0.0)


def gradient_error(want: Any, got: Any, scale: float = 0.0) -> float:
    """As above, with one scale for all leaves: a leaf's gradient may be zero but for rounding."""
    pairs = list(zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True))
    flat = [[np.ravel(np.asarray(x)) for x in side] for side in zip(*pairs, strict=True)]
    if any(a.shape != b.shape for a, b in zip(*flat, strict=True)):
        return float("inf")
    if not pairs:
        return 0.0
    return _leaf_error(np.concatenate(flat[0]), np.concatenate(flat[1]), scale)


def largest(want: tuple[Any, Any, Any]) -> float:
    """The largest finite entry of the gradients."""
    found = (np.abs(np.asarray(leaf)) for leaf in jax.tree.leaves(want[1:]))
    return max((float(np.max(a[np.isfinite(a)], initial=0.0)) for a in found), default=0.0)


def _numbers(leaf: Any) -> np.ndarray:
    """An array of numpy; of a random key, its bits."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _leaf_error(a: np.ndarray, b: np.ndarray, scale: float = 0.0) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return float(not np.array_equal(a, b))
    a, b = (x.astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (a, b))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    difference = float(np.max(np.abs(a - b)[finite], initial=0.0))
    return difference / (float(np.max(np.abs(a[finite]), initial=scale)) or 1.0)


def weighted(outputs: Any, seed: int = 1) -> jax.Array:
    """A random weighted sum of all outputs: the loss whose gradient is compared."""
    rng, total = np.random.default_rng(seed), jnp.zeros(())
    for leaf in jax.tree.leaves(outputs):
        if is_float(leaf):
            weight = jnp.asarray(rng.normal(size=leaf.shape), jnp.finfo(leaf.dtype).dtype)
            total += jnp.sum(jnp.real(leaf) * weight) + jnp.sum(jnp.imag(leaf) * weight)
    return total


def split(tree: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The floating leaves of a tree, and what puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)

    def rebuild(moving: Any, fill: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        rest = iter(moving)
        full = [next(rest) if is_float(leaf) else fill(leaf) for leaf in leaves]
        return jax.tree.unflatten(treedef, full)

    return [leaf for leaf in leaves if is_float(leaf)], rebuild


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(fn: Any, weigh: Any, params: Any, args: Any) -> tuple[Any, Any, Any]:
    """The outputs; of their weighted sum, the gradients by floating parameters and inputs."""
    (moving, params_of), (inputs, args_of) = split(params), split(args)

    def loss(moving: Any, inputs: Any) -> tuple[jax.Array, Any]:
        outputs = fn(params_of(moving), *args_of(inputs))
        return weigh(outputs), outputs

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (by_params, by_inputs), outputs = gradient(moving, inputs)
    by_all = params_of(by_params, lambda leaf: jnp.zeros(jnp.shape(leaf)))
    return outputs, by_all, by_inputs


def compared(masked: Model, smaller: Model, small: jp.typing.Compact) -> dict[str, float | None]:
    """The errors of the compact model against the masked one.

    Entries that the masks remove have no counterpart in the compact model: ``restrict`` drops
    them. A model that JAX itself can't differentiate has errors of its value only.
    """

    def restricted(outputs: Any) -> jax.Array:
        return weighted(small.restrict_outputs(outputs))

    try:
        want = gradients(masked.fn, restricted, masked.params, masked.args)
    except (ValueError, TypeError):  # of the model: a while loop, an integer output only
        want, got = (jax.jit(m.fn)(m.params, *m.args) for m in (masked, smaller))
        error = relative_error(small.restrict_outputs(want), got)
        return {"value": error, "gradient": None, "input_gradient": None}
    got = gradients(smaller.fn, weighted, smaller.params, smaller.args)
    return {
        "value": relative_error(small.restrict_outputs(want[0]), got[0]),
        "gradient": gradient_error(small.restrict(want[1]), got[1]),
        # Beside the largest gradient of all: that of an input may be zero but for rounding.
        "input_gradient": gradient_error(want[2], got[2], largest(want)),
    }


def widened(model: Model) -> Model:
    """The model with its floating leaves in twice their precision."""
    wide = {"float32": jnp.float64, "complex64": jnp.complex128}

    def leaf(x: Any) -> Any:
        return jnp.asarray(x, wide[str(x.dtype)]) if str(x.dtype) in wide else x

    return Model(model.fn, *jax.tree.map(leaf, (model.params, model.args)))


def compared_float64(masked: Model, smaller: Model, small: jp.typing.Compact) -> Any:
    """The same in float64; None for models that fix float32 inside and refuse it."""
    jax.clear_caches()  # JAX would take a 32-bit program for 64-bit indices
    with contextlib.suppress(Exception), jax.enable_x64(True):
        return compared(widened(masked), widened(smaller), small)
    return None


def measured(model: Model, seed: int, float64: bool) -> Row:
    """One row: how much was removed, whether it is certified, and how far from the masked model."""
    params = drawn(model.params, seed)
    start = time.perf_counter()
    structure = jp.infer_structure(model.fn, params, *model.args)
    inferred = time.perf_counter()
    masks = halved(structure, seed)
    begin = time.perf_counter()
    small = jp.compact(model.fn, params, masks, *model.args)
    row: Row = {
        "params": count(params),
        "params_removed": 1 - count(small.params) / count(params),
        "masked": 1 - float(jp.density(params, masks)),
        "untouched": untouched(structure) / count(params),
        "dims": sum(not d.frozen for d in structure.dims.values()),
        "frozen": frozen_share(structure),
        "infer_seconds": inferred - start,
        "compact_seconds": time.perf_counter() - begin,
        "certified": small.certificate.exact,
        "kept": kept(small),
    }
    return row | verdict(model, jp.apply_masks(params, masks), small, float64)


def kept(small: jp.typing.Compact) -> dict[str, list[Any]]:
    """Dimensions that keep masked units: size, how many, why."""
    entries = [e for e in small.certificate.entries if e.removed != e.masked]
    return {e.name: [e.size, e.masked - e.removed, e.reason] for e in entries}


def verdict(model: Model, masked: Any, small: jp.typing.Compact, float64: bool) -> Row:
    """The errors, and what they say; in float64 too, on request or where float32 leaves it open."""
    whole = Model(model.fn, masked, model.args)
    smaller = Model(small.fn, small.params, model.args)
    single, double = compared(whole, smaller, small), None
    equal = within(single, EQUAL)
    if float64 or not equal:
        double = compared_float64(whole, smaller, small)
    equal = equal or (double is not None and within(double, ROUNDING))
    status = ("equal" if small.certificate.exact else "refused") if equal else "wrong"
    if not equal and not is_defined(whole):
        status = "undefined"  # the masked model itself has no number there
    return {"status": status, "error": single, "error_float64": double}


def within(errors: dict[str, float | None], limit: float) -> bool:
    return all(error is None or error <= limit for error in errors.values())


def is_defined(model: Model) -> bool:
    """Whether all outputs and gradients of a model are numbers."""
    found = [jax.jit(model.fn)(model.params, *model.args)]
    with contextlib.suppress(ValueError, TypeError):
        found.append(gradients(model.fn, weighted, model.params, model.args))
    leaves = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)


def row_of(build: Callable[[], Model], seed: int, float64: bool = False) -> Row:
    """A measured row; what fails is named with the end of its traceback."""
    start = time.perf_counter()
    try:
        model = build()
        jax.eval_shape(model.fn, model.params, *model.args)
    except Exception as reason:  # a package that is missing or does not fit this JAX
        return {"status": "skipped", "why": f"{type(reason).__name__}: {reason}"[:300]}
    try:
        return measured(model, seed, float64) | {"seconds": time.perf_counter() - start}
    except Exception as reason:
        tail = "".join(traceback.format_exception(reason)[-6:])
        return {"status": "crashed", "why": f"{type(reason).__name__}: {reason}"[:500], "at": tail}
