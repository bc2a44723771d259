"""Compact models on disk: a plan as JSON, arrays as safetensors, nothing that runs on loading.

The plan names dimensions as ``print(structure)`` does. Loading infers the structure of the code
at hand anew and refuses a plan that was made for another model.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import axes
from jaxprune.axes import Axis
from jaxprune.compact import compact as _compact
from jaxprune.compact import plan
from jaxprune.structure import infer as _infer
from jaxprune.structure.parents import Order
from jaxprune.structure.structure import Structure, from_program

FORMAT, VERSION = "jaxprune compact model", 1
PLAN, ARRAYS = "plan.json", "arrays.safetensors"
VECTORS = ("candidates", "kept", "carried")  # of each cut dimension


def save(small: _compact.Compact, folder: str | Path) -> None:
    """Writes a compact model: ``plan.json`` and ``arrays.safetensors``.

    Args:
      small: what ``jp.compact`` gave; its ``params`` may have been trained since.
      folder: is made when it does not exist; files of these names are replaced.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> masks = jp.infer_structure(fn, params, x).masks({"up:1": jnp.arange(8) < 2})
      >>> folder = tempfile.mkdtemp()
      >>> jp.save(jp.compact(fn, params, masks, x), folder)
      >>> jp.load(folder, fn, params, x).params["up"].shape
      (3, 2)
    """
    structure, planned = small._structure, small._plan
    decisions = planned.decisions
    arrays = params_to_arrays(structure.paths, small.params)
    for name, d in decisions.items():
        arrays |= {f"{kind}/{name}": getattr(d, kind) for kind in VECTORS}
    arrays |= {f"order/{name}": order.order for name, order in planned.orders.items()}
    folded = list(planned.leftovers.items())
    arrays |= {f"folded/{n}": np.asarray(array) for n, (_, array) in enumerate(folded)}
    for i, vectors in enumerate(planned.zero_slices):
        arrays |= {f"zeros/{i}/{k}": v for k, v in enumerate(vectors)}
    text = {
        "format": FORMAT,
        "version": VERSION,
        "made with": {name: importlib.metadata.version(name) for name in ("jaxprune", "jax")},
        "semantics": planned.semantics,
        "leaves": describe_leaves(structure, small.params),
        "dimensions": [_describe(structure, name, d.reasons) for name, d in decisions.items()],
        "folded": [{"leaf": i, "dimensions": sorted(names)} for (i, names), _ in folded],
        "parents": {name: _name_of(structure, o.parent) for name, o in planned.orders.items()},
    }
    write(folder, PLAN, text, arrays)


def load(folder: str | Path, fn: Callable[..., Any], params: Any, *args: Any) -> _compact.Compact:
    """Reads what :func:`save` wrote, for the same function.

    Args:
      folder: where :func:`save` wrote.
      fn: the function that ``jp.compact`` was given.
      params: a tree of the full shapes, arrays or ``jax.ShapeDtypeStruct``; values are not read.
      *args: example arguments, as for ``jp.compact``.

    Returns:
      A :class:`Compact`. Its certificate checks against ``fn(small.expand(small.params))``.

    Raises:
      FileNotFoundError: when the folder holds no saved model.
      ValueError: for another format, or for a plan of another model: leaves, shapes or dimensions
        that differ, or dimensions that can no longer be cut.
    """
    text, arrays = read(folder, PLAN, FORMAT, VERSION)
    program = _infer.infer_settled(fn, params, args)
    structure = from_program(program, params)
    check_leaves(structure, text["leaves"])
    decisions = {row["name"]: _decision(structure, row, arrays) for row in text["dimensions"]}
    zero_slices = [
        [arrays[f"zeros/{i}/{k}"] for k in range(len(shape))]
        for i, shape in enumerate(structure.shapes)
    ]
    orders = {
        name: _order(structure, name, above, arrays) for name, above in text["parents"].items()
    }
    planned = plan.again(
        program, structure.paths, decisions, zero_slices, text["semantics"], orders
    )
    planned.leftovers = {
        (row["leaf"], frozenset(row["dimensions"])): arrays[f"folded/{n}"]
        for n, row in enumerate(text["folded"])
    }
    for dimension, _, why in planned.demand.refusals:
        raise ValueError(_stale(f"a dimension of {dimension.size} can't be cut any more ({why})"))
    leaves = arrays_to_params(text["leaves"], arrays)
    small = jax.tree.unflatten(structure.treedef, [leaves[path] for path in structure.paths])
    return _compact.assemble(fn, structure, planned, args, params=small)


# ------------------------------------------------------------------------------------- the plan


def describe_leaves(structure: Structure, params: Any) -> list[dict[str, Any]]:
    """Path and full shape of each leaf, and which generator's key it is, if it is one."""
    rows: list[dict[str, Any]] = []
    leaves = jax.tree.leaves(params)
    for path, shape, leaf in zip(structure.paths, structure.shapes, leaves, strict=True):
        key = {"key": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {}
        rows.append({"path": path, "shape": list(shape), **key})
    return rows


def check_leaves(structure: Structure, saved: Sequence[Mapping[str, Any]]) -> None:
    """The saved leaves are those of this model, whatever their order."""
    theirs = {row["path"]: tuple(row["shape"]) for row in saved}
    ours = dict(zip(structure.paths, structure.shapes, strict=True))
    for path in [*theirs, *ours]:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                _stale(f"{path} is saved as {theirs.get(path)} and is {ours.get(path)} in params")
            )


def _describe(structure: Structure, name: str, reasons: Sequence[str]) -> dict[str, Any]:
    dim = structure.dims[name]
    slots = [str(slot) for slot in dim.slots]
    return {"name": name, "size": dim.size, "slots": slots, "reasons": list(reasons)}


def _decision(
    structure: Structure, row: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> plan.Decision:
    name = row["name"]
    if name not in structure.dims:
        raise ValueError(_stale(f"it has no dimension {name!r}"))
    here = _describe(structure, name, row["reasons"])
    for key in ("size", "slots"):
        if here[key] != row[key]:
            raise ValueError(
                _stale(f"dimension {name!r} has {key} {here[key]}, {row[key]} was saved")
            )
    dim = structure.dims[name]
    if dim.frozen and not arrays[f"kept/{name}"].all():
        raise ValueError(_stale(f"dimension {name!r} can't be cut any more ({dim.frozen})"))
    candidates, kept, carried = (arrays[f"{kind}/{name}"] for kind in VECTORS)
    return plan.Decision(dim, candidates, kept, carried, list(row["reasons"]))


def _name_of(structure: Structure, axis: Axis) -> str:
    return next(n for n, d in structure.dims.items() if axes.find(d.axis) is axes.find(axis))


def _order(structure: Structure, name: str, above: str, arrays: Mapping[str, np.ndarray]) -> Order:
    if above not in structure.parents(name):
        raise ValueError(_stale(f"{above!r} is no parent of {name!r}"))
    own, parent = (axes.find(structure.dims[n].axis) for n in (name, above))
    return Order(own, parent, arrays[f"order/{name}"])


def _stale(what: str) -> str:
    return f"the saved plan is of another model: {what}; call jp.compact again"


# ------------------------------------------------------------------------------------ the arrays


def params_to_arrays(paths: Sequence[str], params: Any) -> dict[str, np.ndarray]:
    """Leaves by path; of random keys the words."""
    leaves = zip(paths, jax.tree.leaves(params), strict=True)
    return {f"params/{path}": np.asarray(_words(leaf)) for path, leaf in leaves}


def _words(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def arrays_to_params(
    saved: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
    """path -> leaf."""
    found = {row["path"]: jnp.asarray(arrays[f"params/{row['path']}"]) for row in saved}
    keys = {row["path"]: row["key"] for row in saved if "key" in row}
    return found | {p: jax.random.wrap_key_data(found[p], impl=impl) for p, impl in keys.items()}


def write(folder: str | Path, name: str, text: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Both files, arrays first: a plan is only there when its arrays are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {key: np.array(array, order="C") for key, array in arrays.items()}
    _safetensors().save_file(whole, folder / ARRAYS)
    (folder / name).write_text(json.dumps(text, indent=1) + "\n")


def read(folder: str | Path, name: str, wanted: str, version: int) -> tuple[Any, Any]:
    """The text and the arrays, after a look at what they are."""
    path = Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"no saved model at {folder}: {name} is missing")
    text = json.loads(path.read_text())
    found = text.get("format"), text.get("version")
    if found != (wanted, version):
        raise ValueError(f"{path} is {found}, wanted {(wanted, version)}")
    return text, _safetensors().load_file(Path(folder) / ARRAYS)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("saving needs safetensors: pip install 'jaxprune[save]'") from error
    return safetensors.numpy
