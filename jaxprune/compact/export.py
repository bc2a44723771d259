"""Compact models that need no code: the program by ``jax.export``, the parameters beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune.compact import store
from jaxprune.compact.compact import Compact

FORMAT, VERSION = "jaxprune exported program", 1
TEXT, PROGRAM = "export.json", "program.bin"


class Exported(NamedTuple):
    """What :func:`load_exported` gives: ``fn(params, *args)``."""

    fn: Callable[..., Any]
    params: dict[str, jax.Array]  # by path: {"params/Dense_0/kernel": ...}


def export(
    small: Compact,
    folder: str | Path,
    *args: Any,
    shapes: Any = None,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes a compact model that runs without the code that defined it.

    The folder holds ``program.bin`` (StableHLO, kept readable by JAX's own guarantees for six
    months), ``arrays.safetensors`` with the parameters, and ``export.json``.

    Args:
      small: what ``jp.compact`` gave.
      folder: is made when it does not exist; files of these names are replaced.
      *args: what follows the parameters, arrays or ``jax.ShapeDtypeStruct``.
      shapes: symbolic sizes as ``jax.export.symbolic_args_specs`` takes them: ``"b, ..."`` for a
        batch of any size in all arguments, or one such string for each. None: the sizes of args.
      platforms: "cpu", "cuda", "tpu", ...; the default is the present one.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> masks = jp.infer_structure(fn, params, x).masks({"up:1": jnp.arange(8) < 2})
      >>> folder = tempfile.mkdtemp()
      >>> jp.export(jp.compact(fn, params, masks, x), folder, x, shapes="b, ...")
      >>> model = jp.load_exported(folder)
      >>> model.fn(model.params, jnp.ones((5, 3))).shape
      (5, 2)
    """
    structure = small._structure
    specs = args if shapes is None else jax.export.symbolic_args_specs(args, shapes)

    def by_path(params: dict[str, Any], *args: Any) -> Any:
        leaves = [params[path] for path in structure.paths]
        return small.fn(jax.tree.unflatten(structure.treedef, leaves), *args)

    params = dict(zip(structure.paths, jax.tree.leaves(small.params), strict=True))
    program = jax.export.export(jax.jit(by_path), platforms=platforms)(params, *specs)
    written = program.serialize()  # before any file is touched
    text = {
        "format": FORMAT,
        "version": VERSION,
        "platforms": list(program.platforms),
        "leaves": store.describe_leaves(structure, small.params),
        "arguments": [str(aval) for aval in program.in_avals[len(params) :]],
    }
    store.write(folder, TEXT, text, store.params_to_arrays(structure.paths, small.params))
    (Path(folder) / PROGRAM).write_bytes(written)


def load_exported(folder: str | Path) -> Exported:
    """Reads what :func:`export` wrote; ``fn(params, *args)`` works under ``jax.jit``.

    Raises:
      FileNotFoundError: when the folder holds no exported model.
      ValueError: for another format.
    """
    text, arrays = store.read(folder, TEXT, FORMAT, VERSION)
    program = jax.export.deserialize(bytearray((Path(folder) / PROGRAM).read_bytes()))
    return Exported(program.call, store.arrays_to_params(text["leaves"], arrays))
