"""Compact models on disk: the plan and the arrays in one file, and nothing that runs on loading.

The plan names dimensions as ``print(structure)`` does. Loading infers the structure of the code
at hand anew, refuses a plan that was made for another model, and decides anew what has to be
evaluated for the units that are gone.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune.artefacts import files, functions, leaves, tensors
from jaxprune.artefacts.checks import Size, conform
from jaxprune.artefacts.host import to_host
from jaxprune.compaction import api as _compact
from jaxprune.compaction import plan
from jaxprune.compaction.demand import Demand
from jaxprune.ir import axes
from jaxprune.ir.axes import Axis
from jaxprune.rules.registry import KEPT
from jaxprune.structure import infer as _infer
from jaxprune.structure.dimensions import Structure
from jaxprune.structure.naming import from_program
from jaxprune.structure.parents import Order

FORMAT, VERSION = "jaxprune compact model", 2
FILE = "model.safetensors"
VECTORS = ("candidates", "kept")  # Each cut dimension has these vectors.
SCHEMA = {
    "format": str,
    "version": Size,
    "made with": {str: str},
    "semantics": {plan.MASKED, plan.KEPT_ONLY},
    "function": functions.FUNCTION,
    "leaves": [leaves.LEAF],
    "dimensions": [{"name": str, "size": Size, "slots": [str], "reasons": [str]}],
    "folded": [{"leaf": Size, "dimensions": [str], "dtype": set(tensors.DTYPES)}],
    "parents": {str: str},
}


def save(small: _compact.Compact, folder: str | Path) -> None:
    """Writes a compact model to ``folder/model.safetensors``, in one step.

    Whoever reads meanwhile gets the old model or the new one, also when the writer is killed or
    the disk is full. The file holds the plan, the arrays by path (any reader of safetensors sees
    them), a digest of itself and one of the function. Of several processes, all must call this;
    the first one writes.

    Args:
      small: what ``jp.compact`` gave; its ``params`` may have been trained since.
      folder: is made when it does not exist; a model that is there is replaced.

    Raises:
      OSError: when the file can't be written; what was there before is still there.
      TypeError: for leaves that can't be written.
      ValueError: for two leaves of one path.

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
    structure, planned, function = small._structure, small._plan, cast(Any, small.fn)
    folded = list(planned.leftovers.items())
    text = {
        "format": FORMAT,
        "version": VERSION,
        "made with": {name: importlib.metadata.version(name) for name in ("jaxprune", "jax")},
        "semantics": planned.semantics,
        "function": functions.describe(function.fn, *function.traced_for),
        "leaves": leaves.describe(structure.paths, structure.shapes, small.params),
        "dimensions": [_row(structure, n, d.reasons) for n, d in planned.decisions.items()],
        "folded": [_folded_row(*item) for item in folded],
        "parents": {name: _name_of(structure, o.parent) for name, o in planned.orders.items()},
    }
    arrays = leaves.arrays_of(structure.paths, small.params) | _arrays_of(planned)
    arrays |= {f"folded/{n}": to_host(array) for n, (_, array) in enumerate(folded)}
    files.write(folder, FILE, text, arrays)


@calls_fn("jp.load")
def load(
    folder: str | Path,
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    same_function: bool = False,
) -> _compact.Compact:
    """Reads what :func:`save` wrote, for the same function.

    Args:
      folder: where :func:`save` wrote.
      fn: the function that ``jp.compact`` was given. It is traced for the types of arguments that
        ``jp.compact`` had, and compared, constants included.
      params: a tree of the full shapes, arrays or ``jax.ShapeDtypeStruct``; values are not read.
      *args: example arguments, as for ``jp.compact``, of any size that ``fn`` takes.
      same_function: True takes your word that ``fn`` does what the saved function did, and does
        not compare: for code that was rewritten, or constants that are meant to be others.

    Returns:
      A :class:`Compact`. Its certificate checks against ``fn(small.expand(small.params))``. A
      model that another version of JAX saved is loaded with a warning where its function is
      written otherwise.

    Raises:
      FileNotFoundError: when the folder holds no saved model.
      ValueError: for a damaged or edited file; for another function; for a plan of another model:
        leaves, shapes, types or dimensions that differ, or dimensions that can't be cut any more.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn, x = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], jnp.ones((1, 3))
      >>> masks = jp.infer_structure(fn, params, x).masks({"up:1": jnp.arange(8) < 2})
      >>> folder = tempfile.mkdtemp()
      >>> jp.save(jp.compact(fn, params, masks, x), folder)
      >>> small = jp.load(folder, fn, params, x)
      >>> bool(jnp.allclose(small.fn(small.params, x), fn(jp.apply_masks(params, masks), x)))
      True
    """
    path = Path(folder) / FILE
    text, arrays = files.read(folder, FILE, FORMAT, VERSION)
    with files.naming(path):
        conform(text, SCHEMA, "its plan")
    leaves.check(text["leaves"], params, text["function"]["params"])
    (program,) = _infer.infer([(fn, args)], params, text["semantics"])
    structure = from_program(program, params)
    if not same_function:
        order = {row["path"]: i for i, row in enumerate(text["leaves"])}
        functions.check(fn, params, args, text["function"], order)
    with files.naming(path):
        return _Reading(text, arrays, structure).model(fn, program, params, args)


# ------------------------------------------------------------------------------------- the plan


def _arrays_of(planned: plan.Plan) -> dict[str, np.ndarray]:
    """The plan's vectors."""
    arrays = {
        f"{kind}/{name}": getattr(decision, kind)
        for name, decision in planned.decisions.items()
        for kind in VECTORS
    }
    arrays |= {f"order/{n}": np.asarray(o.order, np.int64) for n, o in planned.orders.items()}
    for i, vectors in enumerate(planned.zero_slices):
        arrays |= {f"zeros/{i}/{k}": v for k, v in enumerate(vectors)}
    return arrays


def _row(structure: Structure, name: str, reasons: Sequence[str]) -> dict[str, Any]:
    dim = structure.dims[name]
    slots = [str(slot) for slot in dim.slots]
    return {"name": name, "size": dim.size, "slots": slots, "reasons": list(reasons)}


def _folded_row(key: tuple[int, frozenset[str]], array: Any) -> dict[str, Any]:
    return {"leaf": key[0], "dimensions": sorted(key[1]), "dtype": array.dtype.name}


def _name_of(structure: Structure, axis: Axis) -> str:
    return next(n for n, d in structure.dims.items() if axes.find(d.axis) is axes.find(axis))


class _Reading:
    """A plan that is put together again, each part checked against the structure at hand."""

    def __init__(
        self, text: Mapping[str, Any], arrays: Mapping[str, np.ndarray], structure: Structure
    ):
        self.text, self.arrays, self.structure = text, dict(arrays), structure

    def model(
        self, fn: Callable[..., Any], program: _infer.Program, params: Any, args: Any
    ) -> _compact.Compact:
        structure = self.structure
        drafts = {row["name"]: self.draft(row) for row in self.text["dimensions"]}
        orders = {name: self.order(name, above) for name, above in self.text["parents"].items()}
        zero_slices = [
            [self.take(f"zeros/{i}/{k}", "bool", (size,)) for k, size in enumerate(shape)]
            for i, shape in self.places()
        ]
        semantics = self.text["semantics"]
        demand = plan.redo(program, structure.paths, drafts, zero_slices, semantics)
        for dimension, _, why in demand.refusals:
            raise ValueError(
                _stale(f"a dimension of {dimension.size} can't be cut any more ({why})")
            )
        for name, draft in drafts.items():
            if not draft.kept.any() and demand.evaluates(axes.find(draft.dim.axis)):
                raise ValueError(f"keeps no unit of {name!r}")
        folded = self.leftovers(program, demand)
        planned = plan.made_of(drafts, demand, zero_slices, semantics, orders, folded)
        small = self.params(planned)
        if self.arrays:
            raise ValueError(f"holds {next(iter(self.arrays))!r}, which its plan doesn't name")
        return _compact.assemble(fn, structure, planned, args, small, params)

    def take(self, name: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """An array of the file, of the type and shape that it must have."""
        if name not in self.arrays:
            raise ValueError(f"lacks {name!r}")
        found = self.arrays.pop(name)
        try:
            found = tensors.unpack(found, dtype)
        except ValueError as error:
            raise ValueError(f"holds {name!r}, which {error}") from None
        if found.shape != tuple(shape):
            raise ValueError(f"holds {name!r} of shape {found.shape}, wanted {tuple(shape)}")
        return found

    def places(self) -> list[tuple[int, tuple[int, ...]]]:
        """Numbers of the leaves in the file and their shapes, in the order of params."""
        numbers = {row["path"]: i for i, row in enumerate(self.text["leaves"])}
        shapes = zip(self.structure.paths, self.structure.shapes, strict=True)
        return [(numbers[path], shape) for path, shape in shapes]

    def draft(self, row: Mapping[str, Any]) -> plan.Draft:
        name = row["name"]
        if name not in self.structure.dims:
            raise ValueError(_stale(f"it has no dimension {name!r}"))
        here = _row(self.structure, name, row["reasons"])
        for key in ("size", "slots"):
            if here[key] != row[key]:
                raise ValueError(
                    _stale(f"dimension {name!r} has {key} {here[key]}, {row[key]} was saved")
                )
        dim = self.structure.dims[name]
        candidates, kept = (self.take(f"{v}/{name}", "bool", (dim.size,)) for v in VECTORS)
        if not (candidates | kept).all():
            raise ValueError(f"removes units of {name!r} that no mask touched")
        if dim.frozen and not kept.all():
            raise ValueError(_stale(f"dimension {name!r} can't be cut any more ({dim.frozen})"))
        return plan.Draft(dim, candidates, kept, ~kept, list(row["reasons"]))

    def order(self, name: str, above: str) -> Order:
        structure = self.structure
        if not {name, above} <= structure.dims.keys() or above not in structure.parents(name):
            raise ValueError(_stale(f"{above!r} is no parent of {name!r}"))
        own, parent = (structure.dims[n] for n in (name, above))
        order = self.take(f"order/{name}", "int64", (parent.size, own.size))
        if (np.sort(order, axis=1) != np.arange(own.size)).any():
            raise ValueError(f"holds 'order/{name}', whose rows are no orders of {own.size} units")
        return Order(axes.find(own.axis), axes.find(parent.axis), order)

    def leftovers(self, program: _infer.Program, demand: Demand) -> plan.Leftovers:
        """The folded slices, all that this program asks for."""
        structure, found = self.structure, dict[Any, Any]()
        places = {number: i for i, (number, _) in enumerate(self.places())}
        for n, row in enumerate(self.text["folded"]):
            if row["leaf"] not in places or not set(row["dimensions"]) <= structure.dims.keys():
                raise ValueError(_stale(f"it has no {row} to fold"))
            i = places[row["leaf"]]
            block = frozenset(axes.find(structure.dims[d].axis) for d in row["dimensions"])
            shape = demand.split.view(block).shape(structure.param_axes[i])
            found[i, frozenset(row["dimensions"])] = self.take(f"folded/{n}", row["dtype"], shape)
        missing = plan.folds(demand, program, structure).keys() - found.keys()
        if missing:
            i, names = min(missing, key=str)
            raise ValueError(
                _stale(f"it needs the removed slices of {structure.paths[i]} ({sorted(names)})")
            )
        return found

    def params(self, planned: plan.Plan) -> Any:
        view, structure, rows = planned.split.view(KEPT), self.structure, self.text["leaves"]
        found = []
        for (number, _), axs in zip(self.places(), structure.param_axes, strict=True):
            row = rows[number]
            shape = leaves.small_shape(row, view.shape(axs))
            array = self.take(f"params/{row['path']}", row["dtype"], shape)
            found.append(leaves.restore(row, array))
        return jax.tree.unflatten(structure.treedef, found)


_stale = leaves.stale
