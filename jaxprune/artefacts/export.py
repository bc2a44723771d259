"""Models that need no code: a program by ``jax.export`` and its parameters, or an engine's file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._calls import calls_fn
from jaxprune.artefacts import files, folders, leaves, tensors
from jaxprune.artefacts.checks import Size, conform
from jaxprune.compaction.api import Compact
from jaxprune.structure.infer import paths_of

if TYPE_CHECKING:
    from jaxprune.runtimes.artefact import Artefact

FORMAT, VERSION = "jaxprune exported program", 2
FILE = "exported.safetensors"
SCHEMA = {
    "format": str,
    "version": Size,
    "made with": {"jax": str},
    "platforms": [str],
    "leaves": [leaves.LEAF],
    "arguments": [str],
}


class Exported(NamedTuple):
    """What :func:`load_exported` gives: ``fn(params, *args)``."""

    fn: Callable[..., Any]
    params: dict[str, jax.Array]  # by path: {"params/Dense_0/kernel": ...}


@calls_fn("jp.export")
def export(
    small: Compact | Callable[..., Any],
    folder: str | Path,
    *args: Any,
    shapes: Any = None,
    platforms: Sequence[str] | None = None,
    runtime: Any = None,
    state: str | Sequence[str] | None = None,
) -> Artefact:
    """Writes a model that runs without the code that defined it, for one device or engine.

    For XLA ``folder/exported.safetensors`` holds the program (StableHLO, kept readable by JAX's own
    guarantees for six months) and the parameters. It is written as :func:`jaxprune.save` writes:
    in one step, with a digest.

    For another runtime the folder holds the engine's file, ``model.onnx``, and
    ``certificate.json``: what was removed and why that equals the masked model; digests of the
    parameters, the masks and the file; how far results in the engine were from the masked model's
    on random inputs; versions and device. Both are complete and on the disk before they get their
    names, the certificate last. Who reads between finds a file that is not the certificate's, and
    gets an error.

    Args:
      small: what ``jp.compact`` gave; or a function, whose parameters come first in ``args`` as a
        tree, before its inputs. Without both, a lone array or no input, all ``args`` are inputs.
      folder: is made when it does not exist; a program that is there is replaced.
      *args: what follows the parameters, arrays or ``jax.ShapeDtypeStruct``.
      shapes: symbolic sizes as ``jax.export.symbolic_args_specs`` takes them: ``"b, ..."`` for a
        batch of any size in all arguments, or one such string for each. None: the sizes of args.
      platforms: "cpu", "cuda", "tpu", ...; the default is the present one. For XLA only.
      runtime: what it is written for, ``jp.runtimes.onnx()``; None is XLA.
      state: keys of params whose values each call hands back anew, ``"cache"``, for an engine: its
        file takes them as its first argument, ``{"cache": ...}``; other params are its constants.

    Returns:
      An artefact with ``check(n)``, ``benchmark()``, ``certificate`` and ``size`` in bytes.

    Raises:
      ImportError: without flatbuffers, which JAX writes programs with, or the engine's packages.
      NotImplementedError: for an operation that the engine can't do, with its place.
      ValueError: when the engine gives other results; for params that a call updates and that are
        no state; for platforms of an engine, or state for XLA, whose program takes all params.
      OSError: when the file can't be written; what was there before is still there.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> x = jnp.ones((1, 3))
      >>> masks = jp.infer_structure(fn, params, x).masks({"up:1": jnp.arange(8) < 2})
      >>> folder = tempfile.mkdtemp()
      >>> artefact = jp.export(jp.compact(fn, params, masks, x), folder, x, shapes="b, ...")
      >>> artefact.check(2) < 1e-6
      True
      >>> model = jp.load_exported(folder)
      >>> model.fn(model.params, jnp.ones((5, 3))).shape
      (5, 2)
    """
    from jaxprune import runtimes
    from jaxprune.runtimes import artefact

    if runtime is not None and runtime.engine is not None:
        if platforms is not None:
            raise ValueError(f"platforms are for XLA, and runtime is {runtime}: leave one out")
        return artefact.write(small, folder, args, shapes, runtime, state)
    if state is not None:
        raise ValueError(
            f"state={state!r} is for the file of an engine; a program for XLA takes all params at "
            "each call: leave it out, or pass runtime="
        )
    _write(small, folder, args, shapes, platforms)
    (Path(folder) / folders.CERTIFICATE).unlink(missing_ok=True)
    call = _when_called(folder)
    return artefact.Artefact(folder, runtimes.xla(), call, (small, args))


def _when_called(folder: str | Path) -> Callable[..., Any]:
    """The function of a folder, which is read when it is first called."""

    @functools.cache
    def model() -> Exported:
        with jax.ensure_compile_time_eval():  # The first call may be traced.
            return load_exported(folder)

    return lambda *args: model().fn(model().params, *args)


def _write(small: Any, folder: str | Path, args: Any, shapes: Any, platforms: Any) -> None:
    fn, full, params, rest = _taken(small, args)
    paths, treedef = paths_of(params), jax.tree.structure(params)
    specs = rest if shapes is None else jax.export.symbolic_args_specs(rest, shapes)

    def by_path(params: dict[str, Any], *args: Any) -> Any:
        return fn(jax.tree.unflatten(treedef, [params[path] for path in paths]), *args)

    taken = jax.tree.map(_array, params)
    arrays = leaves.arrays_of(paths, taken)
    held = dict(zip(paths, jax.tree.leaves(taken), strict=True))
    exporting = jax.export.export(jax.jit(by_path), platforms=platforms)
    program = exporting(jax.tree.map(_anywhere, held), *jax.tree.map(_anywhere, specs))
    text = {
        "format": FORMAT,
        "version": VERSION,
        "made with": {"jax": jax.__version__},
        "platforms": list(program.platforms),
        "leaves": leaves.describe(paths, full, taken),
        "arguments": [str(aval) for aval in program.in_avals[len(held) :]],
    }
    files.write(folder, FILE, text, arrays | {"program": _serialized(program)})


def _taken(small: Any, args: Any) -> tuple[Any, Any, Any, Any]:
    """The function, the full shapes of its params, the params and the other arguments."""
    from jaxprune.runtimes._runtime import parts

    if isinstance(small, Compact):
        return small.fn, small._structure.shapes, small.params, args
    held, rest, bare = parts(small, args)
    if not held:
        return (lambda _, *xs: bare(*xs)), [], {}, rest
    return small, [np.shape(x) for x in jax.tree.leaves(held)], *held, rest


def load_exported(folder: str | Path) -> Exported:
    """Reads what :func:`export` wrote, for whatever runtime: ``fn(params, *args)``.

    For XLA it works under ``jax.jit``. For an engine params are an empty dict, since they are in
    its file, and the results are NumPy arrays. They are empty, too, where ``export`` was given
    inputs alone: ``fn({}, *inputs)``.

    Raises:
      FileNotFoundError: when the folder holds no exported model.
      ImportError: without the engine's packages.
      ValueError: for a damaged or edited file, or a program that this version of JAX can't read;
        ``fn`` raises it for trees that the program does not take.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> fn, x = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], jnp.ones((1, 3))
      >>> masks = jp.infer_structure(fn, params, x).masks({"up:1": jnp.arange(8) < 2})
      >>> folder = tempfile.mkdtemp()
      >>> _ = jp.export(jp.compact(fn, params, masks, x), folder, x)
      >>> model = jp.load_exported(folder)
      >>> model.fn(model.params, x).shape
      (1, 2)
    """
    if (Path(folder) / folders.CERTIFICATE).exists():
        from jaxprune.runtimes import artefact

        return Exported(artefact.load(folder), {})
    text, arrays = files.read(folder, FILE, FORMAT, VERSION)
    with files.naming(Path(folder) / FILE):
        conform(text, SCHEMA, "its plan")
        program = _deserialized(arrays.pop("program", None), text["made with"]["jax"])
        params = dict(_params(program, text["leaves"], arrays))
        return Exported(functools.partial(_call, program, text["arguments"]), params)


def _call(program: Any, inputs: Sequence[str], params: Any, *args: Any) -> Any:
    """The program's results, or an error that says what it takes."""
    if jax.tree.structure(((params, *args), {})) != program.in_tree:
        (wanted, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        raise ValueError(
            f"the exported program takes params {sorted(wanted)} and inputs [{', '.join(inputs)}] "
            f"in trees as it was exported with, not {jax.tree.structure((params, *args))}: call "
            "fn(model.params, *inputs); params that were exported as a lone array are an input"
        )
    return program.call(params, *args)


def _array(leaf: Any) -> jax.Array:
    """A leaf as the program takes it."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _anywhere(leaf: Any) -> jax.ShapeDtypeStruct:
    """The type of an array, wherever it lies: the program is for one device."""
    aval = jax.typeof(leaf)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _serialized(program: Any) -> np.ndarray:
    try:
        return np.frombuffer(program.serialize(), np.uint8)
    except ImportError as error:
        raise ImportError("exporting needs flatbuffers: pip install 'jaxprune[save]'") from error


def _deserialized(found: np.ndarray | None, version: str) -> Any:
    if found is None or found.dtype != np.uint8:
        raise ValueError("holds no 'program' of bytes")
    try:
        return jax.export.deserialize(bytearray(found.tobytes()))
    except ImportError as error:
        raise ImportError("programs need flatbuffers: pip install 'jaxprune[save]'") from error
    except Exception as error:
        raise ValueError(
            f"holds a program of jax {version} that jax {jax.__version__} can't read ({error})"
        ) from error


def _params(program: Any, rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any]) -> Any:
    """Path -> leaf, for exactly what the program takes."""
    (wanted, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    names = [f"params/{row['path']}" for row in rows]
    if sorted(names) != sorted(arrays) or sorted(wanted) != sorted(r["path"] for r in rows):
        raise ValueError(f"holds {sorted(arrays)}, its program takes {sorted(wanted)}")
    for row, name in zip(rows, names, strict=True):
        try:
            leaf = leaves.restore(row, tensors.unpack(arrays[name], row["dtype"]))
        except ValueError as error:
            raise ValueError(f"holds {name!r}, which {error}") from None
        its = wanted[row["path"]]
        if (leaf.shape, leaf.dtype) != (its.shape, its.dtype):
            raise ValueError(f"holds {name!r} as {jax.typeof(leaf)}, its program takes {its}")
        yield row["path"], leaf
