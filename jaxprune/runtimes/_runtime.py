"""A runtime: one engine with its options. An engine is three functions, in a file of its own.

The file has an underscore, ``_onnx.py``, since ``jp.runtimes.onnx`` is a function. It imports no
package of the engine before one of the three functions is called.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._trees import difference
from jaxprune.compaction.model import Compact
from jaxprune.ir import compat
from jaxprune.runtimes.comparing import tell_difference
from jaxprune.runtimes.freezing import Frozen, Signature, freeze
from jaxprune.runtimes.keeping import changed
from jaxprune.runtimes.state import Stateful
from jaxprune.typing import path_str

Flat = Callable[..., list[np.ndarray]]  # flat NumPy arrays in and out


class Options(NamedTuple):
    """What a runtime was asked for."""

    quantize: str | None = None  # "dynamic" or "static"
    calibration: Sequence[tuple[Any, ...]] | None = None  # tuples of arguments
    threads: int | None = None  # None: as many as the engine takes
    keep_float: tuple[str, ...] = ()  # paths of weights that are not quantised


class NothingQuantized(ValueError):
    """A quantiser that was asked for found nothing to quantise."""


class Engine(NamedTuple):
    """What runs programs; each file here makes one, as ``ENGINE``."""

    name: str
    file: str  # what it writes, "model.onnx"; a file, or a folder
    extra: str  # jaxprune[extra] installs it
    quantize: tuple[str, ...]  # which of "dynamic" and "static" it knows
    write: Callable[[Frozen, Path, Options], None]  # a program -> the file
    read: Callable[[Path, Options], Flat]  # the file -> a function of flat arrays, in order
    versions: Callable[[], dict[str, str]]  # of the packages that write and run it


@dataclass(frozen=True, eq=False)
class Runtime:
    """Compiles functions for one engine: ``runtime(fn, *args)``.

    Attributes:
      engine: None is XLA in this process, ``jax.jit``.
      options: quantisation, its calibration, threads.
    """

    engine: Engine | None
    options: Options = Options()

    @property
    def name(self) -> str:
        """The engine with what was asked for: "onnx int8 dynamic"."""
        bits = f"int8 {self.options.quantize}" if self.options.quantize else ""
        threads = f"threads={self.options.threads}" if self.options.threads else ""
        kept = ",".join(self.options.keep_float)
        engine = self.engine.name if self.engine else "xla"
        return " ".join(filter(None, [engine, bits, kept and f"but {kept}", threads]))

    @property
    def key(self) -> str:
        """The name with the versions: what a time that was taken is kept under."""
        versions = self.engine.versions() if self.engine else {"jax": jax.__version__}
        return f"{self.name} ({', '.join(f'{k} {v}' for k, v in sorted(versions.items()))})"

    def replace(self, options: Options) -> Runtime:
        """The same engine with other options."""
        return Runtime(self.engine, options)

    def __repr__(self) -> str:
        return f"<runtime {self.name}>"

    def __call__(
        self, fn: Compact | Callable[..., Any], *args: Any, shapes: Any = None, check: bool = True
    ) -> Any:
        """Returns ``fn`` compiled for the engine; it takes and gives arrays like ``fn``.

        In float it runs once beside JAX on the example arguments, where those are arrays; results
        that are further off than 1e-4 of the largest one are told in a warning.

        Args:
          fn: a pure function of arrays, or what ``jp.compact`` gave, which is then called without
            its parameters.
          *args: example arguments. The first one becomes part of the program where it is a tree of
            arrays and others follow it, as in ``fn(params, x)``; calls take the same one.
          shapes: symbolic sizes of the other arguments, as for ``jp.freeze``.
          check: False leaves the comparison with JAX out.

        Raises:
          ImportError: for a missing package, with the line that installs it.
          NotImplementedError: for an operation that the engine can't do, with its place.
          ValueError: for a name in ``keep_float`` that is no weight; where compiled functions are
            called with other shapes or another params.
        """
        if self.engine is None:
            return jax.jit(partial(fn.fn, fn.params) if isinstance(fn, Compact) else fn)
        held, rest, bare = parts(fn, args)
        frozen = frozen_for(self, fn, args, shapes)
        with tempfile.TemporaryDirectory() as folder:
            run = compiled(self, frozen, Path(folder), held)
        if check and self.options.quantize is None:
            tell_difference(self.name, lambda *xs: run(*held, *xs), bare, rest)
        return run


def frozen_for(runtime: Runtime, fn: Any, args: tuple[Any, ...], shapes: Any = None) -> Frozen:
    """The program of a function with what it holds, and its twin where weights stay in float.

    Raises:
      ValueError: for a name in ``keep_float`` that is no weight, or a function that holds none.
    """
    held, rest, bare = parts(fn, args)
    frozen, names = freeze(bare, *rest, shapes=shapes), runtime.options.keep_float
    if not names:
        return frozen
    if isinstance(fn, Stateful):
        other = freeze(replace(fn, params=changed(fn.params, names)), *rest, shapes=shapes)
        return frozen._replace(other=other.closed)
    if not (held or isinstance(fn, Compact)):
        raise ValueError(
            f"{runtime} leaves {', '.join(names)} in float, and this function holds no weights: "
            "pass fn(params, *args) with the tree of its params and the arguments after them"
        )
    params, call = (held[0], fn) if held else (fn.params, fn.fn)
    other = freeze(partial(call, changed(params, names)), *rest, shapes=shapes)
    return frozen._replace(other=other.closed)


def compiled(
    runtime: Runtime, frozen: Frozen, folder: Path, held: tuple[Any, ...] = ()
) -> Compiled:
    """A program in an engine, whose file is written into a folder."""
    assert runtime.engine is not None
    path = folder / runtime.engine.file
    runtime.engine.write(frozen, path, runtime.options)
    return Compiled(runtime, frozen.signature, runtime.engine.read(path, runtime.options), held)


def parts(fn: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """The argument that becomes constants, if any; the others; and the function of those."""
    if isinstance(fn, Stateful):
        return (), args, fn
    is_tree = bool(args) and not jax.tree_util.all_leaves(args[:1])
    if isinstance(fn, Compact) or len(args) < 2 or not is_tree:
        return (), args, fn
    return args[:1], args[1:], partial(fn, args[0])


class Compiled:
    """A function in an engine: trees of NumPy or JAX arrays in, of NumPy arrays out.

    Attributes:
      runtime: where it runs.
      signature: what it takes and gives.
    """

    def __init__(
        self, runtime: Runtime, signature: Signature, run: Flat, held: tuple[Any, ...] = ()
    ):
        self.runtime, self.signature, self._run, self._held = runtime, signature, run, held
        self._checked: set[Any] = set()  # types of arguments that fit

    def __call__(self, *args: Any) -> Any:
        args = self._without_held(args)
        leaves, treedef = jax.tree.flatten(args)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            raise TypeError(
                f"this function runs in {self.runtime.name}, outside JAX, and can't be traced: "
                "call it without jit, grad and vmap"
            )
        flat = [np.asarray(x) for x in leaves]
        key = treedef, tuple((x.shape, x.dtype) for x in flat)
        if key not in self._checked:
            check_arguments(self.signature, args)
            self._checked.add(key)
        return jax.tree.unflatten(self.signature.out_tree, self._run(*flat))

    def place(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as a call takes them fastest."""
        rest = self._without_held(args)
        return (*self._held, *jax.tree.map(np.asarray, rest))

    def _without_held(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._held:
            return args
        mine, given = self._held[0], args[0] if args else None
        if given is not mine and not _equal(mine, given):
            raise ValueError(
                f"this function was compiled for {self.runtime.name} with other values of its "
                "first argument, which are part of the program; compile it anew for these: "
                "runtime(fn, params, *args)"
            )
        return args[1:]


def check_arguments(signature: Signature, args: tuple[Any, ...]) -> list[np.ndarray]:
    """Flat NumPy arrays of the types that a program takes.

    Raises:
      ValueError: for other trees, shapes or types.
    """
    told = difference(args, signature.args)
    if told:
        raise ValueError(f"the program was compiled for other arguments: the tree of these {told}")
    specs = jax.tree_util.tree_leaves_with_path(signature.args)
    arrays = [np.asarray(x) for x in jax.tree.leaves(args)]
    numbers: dict[str, int] = {}
    for (path, spec), array in zip(specs, arrays, strict=True):
        if array.dtype != spec.dtype or not _fits(spec.shape, array.shape, numbers):
            got = f"{array.dtype}[{','.join(map(str, array.shape))}]"
            wanted = f"{spec.dtype}[{','.join(map(str, spec.shape))}]"
            told = ", ".join(f"{name} = {n}" for name, n in numbers.items())
            raise ValueError(
                f"argument {path_str(path)} is {got}, and the program takes {wanted}"
                f"{told and f' with {told}'}; pass such an array, or make a size a name: "
                'shapes="b, ..."'
            )
    return arrays


def _fits(wanted: Sequence[Any], got: Sequence[int], numbers: dict[str, int]) -> bool:
    """Whether sizes are as wanted; a name is what it was first."""
    if len(wanted) != len(got):
        return False
    for size, n in zip(wanted, got):
        if str(size).isidentifier():
            numbers.setdefault(str(size), n)
    names = {name for size in wanted for name in compat.names_in(size)}
    if not names <= numbers.keys():  # such as 2*b, where no argument has b alone
        return all(n == size for size, n in zip(wanted, got) if isinstance(size, int))
    return [compat.size_at(size, numbers) for size in wanted] == list(got)


def _equal(mine: Any, given: Any) -> bool:
    if difference(mine, given):
        return False
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(given))
    return all(x is y or np.array_equal(x, y) for x, y in pairs)


# --------------------------------------------------------------------------- for files of engines


def package(name: str, extra: str) -> Any:
    """The module of an engine's package.

    Raises:
      ImportError: with the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the runtime {extra} needs {name.split('.')[0]}: pip install 'jaxprune[{extra}]' "
            f"({error})"
        ) from error


def versions(*names: str) -> dict[str, str]:
    """The versions of packages that are there; none is imported."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def make(
    engine: Engine,
    quantize: str | None,
    calibration: Any,
    threads: int | None,
    keep_float: str | Sequence[str] = (),
) -> Runtime:
    """A runtime of checked options.

    Raises:
      ValueError: for a way to quantise that the engine doesn't know, "static" without calibration
        data, threads below 1, or weights that stay in float where all do.
    """
    kept = (keep_float,) if isinstance(keep_float, str) else tuple(keep_float)
    who = f"jp.runtimes.{engine.name}"
    if quantize not in (None, *engine.quantize):
        known = ", ".join(map(repr, engine.quantize)) or "None only"
        raise ValueError(f"{who} knows quantize={known}, got {quantize!r}")
    if quantize == "static" and not calibration:
        raise ValueError(
            f'{who}(quantize="static") measures the ranges of activations on data: pass '
            "calibration=[(x,), ...], a list of arguments as the function takes them after params"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"{who} wants threads >= 1, got {threads}")
    if kept and quantize is None:
        raise ValueError(
            f"{who}(keep_float={kept!r}) quantises nothing, so that all weights stay in float: "
            f'pass quantize="{engine.quantize[0]}", too, or leave keep_float out'
        )
    return Runtime(engine, Options(quantize, calibration, threads, kept))
