"""All calls that see parameters, each as a row: a placement -> trees that a test compares.

What one device gives is the oracle for what a mesh gives. JAX has to be asked for devices before it
starts, so this is a program: ``python -m tests.runtimes.mesh_calls PATTERN KINDS [PROCESS PORT]``
prints how each row differs on meshes of these kinds, as JSON. ``test_meshes.py`` runs it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import sharding

RNG = np.random.default_rng(0)


def _normal(*shape: int) -> np.ndarray:
    return (0.3 * RNG.normal(size=shape)).astype(np.float32)


PARAMS = {
    "up": _normal(16, 32), "bias": _normal(32), "down": _normal(32, 16), "out": _normal(16, 8),
}  # fmt: skip
SPECS = {
    "up": P(None, "model"), "bias": P("model"), "down": P("model", None), "out": P("data", None),
}  # fmt: skip
X = _normal(64, 16)

HEADS = {name: _normal(16, 64) for name in "qkv"} | {"o": _normal(64, 16)}
HEAD_SPECS = {name: P("data", "model") for name in "qkv"} | {"o": P("model", "data")}
TOKENS = _normal(8, 6, 16)

LAYERS = {"w": _normal(3, 16, 32), "v": _normal(3, 32, 16)}
LAYER_SPECS = {"w": P(None, "data", "model"), "v": P(None, "model", "data")}

CONV = {"stem": _normal(3, 3, 4, 16), "scale": _normal(16), "conv": _normal(3, 3, 16, 8)}
CONV_SPECS = {"stem": P(None, None, None, "model"), "scale": P("model"),
              "conv": P(None, None, "model", None)}  # fmt: skip
IMAGES = _normal(8, 8, 8, 4)


def _dot(x: Any, w: Any, *spec: Any) -> jax.Array:
    """On Explicit axes a product along an axis that is cut says how its result lies."""
    explicit = sharding.explicit_mesh(w) is not None
    return jnp.dot(x, w, out_sharding=P(*spec) if explicit else None)


def mlp(p: Any, x: Any) -> jax.Array:
    h = jax.nn.gelu(_dot(x, p["up"], "data", "model") + p["bias"])
    return _dot(jnp.tanh(_dot(h, p["down"], "data", None)), p["out"], "data", None)


def attention(p: Any, x: Any) -> jax.Array:
    def heads(w: Any) -> jax.Array:
        y = _dot(x, w, None, None, "model")
        return y.reshape(*y.shape[:2], 8, 8)  # (batch, tokens, heads, dim)

    q, k, v = (heads(p[name]) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return _dot(mixed.reshape(*mixed.shape[:2], -1), p["o"], None, None, "data")


def scanned(p: Any, x: Any) -> jax.Array:
    def layer(h: Any, row: Any) -> Any:
        w, v = row
        return h + _dot(jax.nn.relu(_dot(h, w, None, "model")), v, None, None), None

    return jax.lax.scan(layer, x, (p["w"], p["v"]))[0]


def conv(p: Any, x: Any) -> jax.Array:
    def run(x: Any, w: Any, *spec: Any) -> jax.Array:
        numbers, explicit = ("NHWC", "HWIO", "NHWC"), sharding.explicit_mesh(w) is not None
        lies = {"out_sharding": P(*spec)} if explicit else {}
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **lies)

    h = jax.nn.relu(run(x, p["stem"], None, None, None, "model"))
    return run(h * p["scale"], p["conv"], None, None, None, None)


def _local(p: Any, x: Any) -> jax.Array:
    return jax.nn.sigmoid(x @ p["up"] + p["bias"]) @ p["down"]


def _over_model(p: Any, x: Any) -> jax.Array:
    """A norm over a hidden axis that lies on several devices."""
    h = x @ p["up"] + p["bias"]
    mean = jax.lax.psum(jnp.sum(h, -1, keepdims=True), "model") / 32
    spread = jax.lax.psum(jnp.sum((h - mean) ** 2, -1, keepdims=True), "model") / 32
    return jax.lax.psum((h - mean) * jax.lax.rsqrt(spread + 1e-3) @ p["down"], "model")


SHARDED = {name: PARAMS[name] for name in ("up", "bias", "down")}
CUT = {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)}
WHOLE = {name: P() for name in SHARDED}


def shard_mapped(body: Any, specs: Any, place: Any) -> Any:
    """The same function within shard_map; one device is a mesh of one."""
    fn = jax.shard_map(
        body, mesh=place.mesh, in_specs=(specs, P("data", None)), out_specs=P("data", None)
    )
    p, x = place(SHARDED, specs), place(X, P("data", None))
    structure = jp.infer_structure(fn, p, x)
    (units,) = {d.size for d in structure.dims.values() if not d.frozen}
    assert units == 32 // (place.mesh.shape["model"] if specs is CUT else 1)
    kept = np.arange(32) % 8 < 3  # the same on each device, however many there are
    masks = {"up": kept[None], "bias": kept, "down": kept[:, None]}
    small = jp.compact(fn, p, masks, x)
    assert small.certificate.exact and small.params["bias"].shape == (12,)
    _check_layouts(specs, small.params)
    assert small.certificate.check() < 1e-9
    grads = jax.jit(jax.grad(lambda p, x: jnp.sum(small.fn(p, x) ** 2)))(small.params, x)
    return small.params, jax.jit(small.fn)(small.params, x), grads


MODELS = {
    "mlp": (mlp, PARAMS, SPECS, X, P("data", None)),
    "attention": (attention, HEADS, HEAD_SPECS, TOKENS, P()),
    "scanned": (scanned, LAYERS, LAYER_SPECS, X, P()),
    "conv": (conv, CONV, CONV_SPECS, IMAGES, P()),
}

PATTERNS = {
    "uniform": jp.unstructured(),
    "erk": jp.unstructured(jp.erk),
    "global": jp.unstructured(jp.global_threshold),
    "lamp": jp.unstructured(jp.distributions.lamp),
    "per_output": jp.unstructured(per_output=True),
    "n_m": jp.n_m(2, 4),
    "block": jp.block((4, 4)),
    "channel": jp.channel(),
    "threshold": jp.threshold(0.2),
}

SGD = optax.sgd(0.1, momentum=0.9)
METHODS: dict[str, Any] = {  # made when asked for: processes have to meet before any array is
    "prune": lambda: jp.prune(SGD, jp.magnitude, jp.schedules.cubic(0, 0.5, begin=0, end=2)),
    "prune_global": lambda: jp.prune(
        SGD, jp.saliency, 0.5, pattern=jp.unstructured(jp.global_threshold)
    ),
    "keep_params_sparse": lambda: optax.chain(
        SGD, jp.keep_params_sparse(jax.tree.map(lambda w: w > 0, PARAMS))
    ),
    "rigl": lambda: jp.training.rigl(SGD, 0.5, every=1),
    "top_kast": lambda: jp.training.top_kast(SGD, 0.5, backward=0.2),
    "static_n_m": lambda: jp.training.static(SGD, 0.5, pattern=jp.n_m(2, 4)),
}
EAGER = ("prune", "keep_params_sparse")


def patterns(name: str, place: Any) -> Any:
    p = place(PARAMS, SPECS)
    return PATTERNS[name](jp.magnitude(p), 0.5)


def trained(name: str, place: Any, compiled: bool) -> Any:
    """Params and masks after three steps."""
    tx, p, x = METHODS[name](), place(PARAMS, SPECS), place(X, P("data", None))

    def step(p: Any, state: Any, x: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean(mlp(p, x) ** 2))(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    init, step = (jax.jit(tx.init), jax.jit(step)) if compiled else (tx.init, step)
    state = init(p)
    for _ in range(3 if compiled else 1):
        p, state = step(p, state, x)
    return p, optax.tree_utils.tree_get(state, "masks")


def structured(model: str, place: Any) -> Any:
    """Masks of whole units, the scores of units, and masks by these."""
    fn, params, specs, x, spec = MODELS[model]
    p = place(params, specs)
    structure = jp.infer_structure(fn, p, place(x, spec))
    pattern, units = jp.structured(structure), structure.unit_scores(p)
    return pattern(jp.magnitude(p), 0.5), units, pattern(units, 0.5)


KEPT = {"wide": 0.5, "odd": 0.4}  # widths that the mesh divides, and that it does not


def compacted(model: str, width: str, place: Any) -> Any:
    """Small params, outputs, gradients, there and back again, and a state of an optimizer."""
    fn, params, specs, x, spec = MODELS[model]
    p, x = place(params, specs), place(x, spec)
    structure = jp.infer_structure(fn, p, x)
    masks = _units(structure, KEPT[width])
    small = jp.compact(fn, p, masks, x)
    loss = lambda p, x: jnp.sum(small.fn(p, x) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(small.params, x)
    state = small.restrict(optax.adam(0.1).init(p))
    full = small.expand(small.params)
    _check_layouts(specs, small.params, state[0].mu, small.restrict(full), full)
    if sharding.explicit_mesh(p):  # on Auto axes gradients lie where the compiler likes
        _check_layouts(specs, grads)
    assert small.certificate.exact, str(small.certificate)
    _check_told(small, p, specs)
    y = small.fn(small.params, x) if width == "odd" else jax.jit(small.fn)(small.params, x)
    many = jax.vmap(small.fn, (None, 0))(small.params, jnp.stack([x, x])) if model == "mlp" else 0
    return small.params, y, grads, state, full, many


def _units(structure: Any, part: float) -> Any:
    free = [d for d in structure.dims.values() if not d.frozen]
    return structure.masks({d.name: np.arange(d.size) < max(1, part * d.size) for d in free})


def _check_layouts(specs: Any, *trees: Any) -> None:
    """The user's sharding along each axis that the mesh divides, and no other."""
    for tree in trees:
        for path, leaf in tree.items():
            found = sharding.layout(leaf)
            if found is not None:
                wanted = sharding.fitting(jax.NamedSharding(found.mesh, specs[path]), leaf.shape)
                assert found.is_equivalent_to(wanted, leaf.ndim), (path, found.spec, wanted.spec)


def _check_told(small: Any, params: Any, specs: Any) -> None:
    """The certificate has a line for each cut axis that is no longer cut over devices."""
    wanted = []
    for path, leaf in small.params.items():
        found = sharding.layout(params[path])
        if found is not None:
            pairs = zip(sharding.parts(found, leaf.ndim), leaf.shape)
            wanted += [f"axis {k} of {path}," for k, ((_, n), size) in enumerate(pairs) if size % n]
    told = small.certificate.replicated
    assert len(told) == len(wanted), (told, wanted)
    assert all(line.startswith(start) for line, start in zip(told, wanted)), (told, wanted)
    assert all(f"no longer cut over devices: {line}" in str(small.certificate) for line in told)


def calibrated(place: Any) -> Any:
    stats = jp.calibrate(mlp, place(PARAMS, SPECS), [place(X, P("data", None))])
    return stats.norms, stats.means, stats.grams


def oneshot(method: str, place: Any) -> Any:
    p = place(PARAMS, SPECS)
    stats = jp.calibrate(mlp, p, [place(X, P("data", None))])
    if method == "refit":
        masks = jp.unstructured()(jp.wanda(p, input_norms=stats.norms), 0.5)
        return jp.oneshot.refit(p, masks, stats, damping=0.1), masks
    return getattr(jp.oneshot, method)(p, stats, 0.5)


def searched(place: Any) -> Any:
    p, x = place(PARAMS, SPECS), place(X, P("data", None))
    structure = jp.infer_structure(mlp, p, x)
    target = jp.Target(flops=0.5)
    plan = jp.search(mlp, p, structure, jp.magnitude(p), x, target=target, round_to=1)
    return plan.masks


def counted(place: Any) -> Any:
    p = place(PARAMS, SPECS)
    masks = jp.unstructured()(jp.magnitude(p), 0.6)
    table = [(r.path, r.kept, r.size) for r in jp.summary(p, masks).rows]
    applied = jp.apply_masks(p, masks)
    units = jp.apply_masks(p, jp.channel()(jp.magnitude(p), 0.5))
    host = jp.apply_masks(p, jax.tree.map(lambda w: w > 0, PARAMS))
    return jp.density(p, masks), [kept for _, kept, _ in table], applied, units, host


def packed(place: Any) -> Any:
    p = place(PARAMS, SPECS)
    masks = jp.unstructured()(jp.magnitude(p), 0.6)
    return jp.masks.unpack(jp.masks.pack(masks))


ROWS = {
    **{f"pattern {n}": functools.partial(patterns, n) for n in PATTERNS},
    **{f"{n}, eager": functools.partial(trained, n, compiled=False) for n in EAGER},
    **{f"{n}, jit": functools.partial(trained, n, compiled=True) for n in METHODS},
    **{f"structured {n}": functools.partial(structured, n) for n in MODELS},
    **{f"compact {n} wide": functools.partial(compacted, n, "wide") for n in MODELS},
    **{f"compact {n} odd": functools.partial(compacted, n, "odd") for n in ("mlp", "attention")},
    "shard_map over data": functools.partial(shard_mapped, _local, WHOLE),
    "shard_map over model": functools.partial(shard_mapped, _over_model, CUT),
    "calibrate": calibrated,
    **{f"oneshot {n}": functools.partial(oneshot, n) for n in ("sparsegpt", "refit")},
    "search": searched,
    "density, summary, apply_masks": counted,
    "pack": packed,
}  # fmt: skip


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: sharding.host(x) if isinstance(x, jax.Array) else x, tree)


@functools.cache
def oracle(row: str) -> Any:
    if row.startswith("shard_map"):
        return outcome(row, on_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=ONE)))
    return outcome(row, one_device)


def outcome(row: str, place: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return on_host(ROWS[row](place))


def one_device(tree: Any, specs: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


ONE = (jax.sharding.AxisType.Auto,) * 2


def on_mesh(mesh: Any) -> Any:
    """Lays trees out; each process gives its own parts of what all of them know."""

    def one(x: np.ndarray, spec: Any) -> jax.Array:
        named = jax.NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, named, lambda i: x[i])

    def place(tree: Any, specs: Any) -> Any:
        return jax.tree.map(one, tree, specs)

    place.mesh = mesh  # type: ignore[attr-defined]
    return place


def differences(row: str, mesh: Any, explicit: bool) -> str:
    """'' where a mesh gives what one device gives: masks bitwise, floats to rounding."""
    wanted = oracle(row)
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        got = outcome(row, on_mesh(mesh))
    pairs = zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(got), strict=True)
    different = [jax.tree_util.keystr(path) for (path, a), b in pairs if not _same(a, b)]
    return ", ".join(different)


def _same(a: Any, b: Any) -> bool:
    if np.shape(a) != np.shape(b) or np.result_type(a) != np.result_type(b):
        return False
    if not np.issubdtype(np.result_type(a), np.floating):
        return np.array_equal(a, b)
    scale = float(np.max(np.abs(a), initial=1e-6))
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * scale))


def main(pattern: str, kinds: str, process: str = "", port: str = "") -> None:
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    for kind in kinds.split(","):
        types = (getattr(jax.sharding.AxisType, kind),) * 2
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=types)
        for row in (row for row in ROWS if re.fullmatch(pattern, row)):
            try:
                found = differences(row, mesh, kind == "Explicit")
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            print(json.dumps([kind, row, found]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
