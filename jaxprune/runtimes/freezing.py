"""One closed, pure program of a function: what any converter to another runtime can trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxprune._calls import calls_fn, check_arrays
from jaxprune.compaction.model import Compact
from jaxprune.runtimes.rewriting import rewritten


class Signature(NamedTuple):
    """What a program takes and gives: trees of types, and how the results were flattened."""

    args: tuple[Any, ...]
    out_tree: Any


class Frozen(NamedTuple):
    """A program without calls, custom derivatives and dead code; parameters are its constants.

    Attributes:
      closed: the program, of flat arrays to flat arrays.
      args: trees of ``jax.ShapeDtypeStruct``, one for each argument; sizes may be names.
      in_tree: how ``args`` were flattened.
      out_tree: how the results were.
      other: the same program with the weights that stay in float changed; None: none does.
    """

    closed: core.ClosedJaxpr
    args: tuple[Any, ...]
    in_tree: Any
    out_tree: Any
    other: core.ClosedJaxpr | None = None

    def __call__(self, *args: Any) -> Any:
        """Runs the program; where sizes are names, at any of these types, retraced by JAX."""
        leaves = self.in_tree.flatten_up_to(args)
        return jax.tree.unflatten(self.out_tree, self.flat(*leaves))

    def flat(self, *leaves: Any) -> list[Any]:
        """The same of flat arrays."""
        run: Callable[..., Any] = core.jaxpr_as_fun(self.closed)
        if self.named and not _named(leaves):
            run = jax.export.export(jax.jit(run))(*jax.tree.leaves(self.args)).call
        return list(run(*leaves))

    @property
    def twin(self) -> Frozen | None:
        """The program of which the constants differ that stay in float."""
        return None if self.other is None else self._replace(closed=self.other, other=None)

    @property
    def signature(self) -> Signature:
        """What it takes and gives, without the program."""
        return Signature(self.args, self.out_tree)

    @property
    def results(self) -> Any:
        """The tree of the types of its results."""
        types = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.closed.jaxpr.outvars
        ]
        return jax.tree.unflatten(self.out_tree, types)

    @property
    def named(self) -> bool:
        """Whether sizes are names."""
        return _named(jax.tree.leaves(self.args))


@calls_fn("jp.freeze")
def freeze(fn: Compact | Callable[..., Any], *args: Any, shapes: Any = None) -> Frozen:
    """Returns the program of a function, which converters to other runtimes can trace.

    Some converters replace functions of JAX and Flax while they trace, so that a function that is
    traced by them is another one. What this returns is traced already: it has no calls, no custom
    derivatives and no dead code, and small constants are computed.

    Args:
      fn: what ``jp.compact`` gave, whose parameters become constants of the program, or a function,
        all of whose arguments stay arguments.
      *args: example arguments, arrays or ``jax.ShapeDtypeStruct``; for a compact model those after
        the parameters.
      shapes: symbolic sizes as ``jax.export.symbolic_args_specs`` takes them: ``"b, ..."`` for a
        batch of any size in all arguments, or one such string for each. None: the sizes of args.

    Returns:
      A :class:`Frozen`, callable like ``fn``.

    Raises:
      TypeError: for an argument that is no array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> frozen = jp.freeze(lambda w, x: jax.nn.relu(x @ w), jnp.ones((3, 2)), jnp.ones((1, 3)))
      >>> [eqn.primitive.name for eqn in frozen.closed.jaxpr.eqns]
      ['dot_general', 'max']
      >>> frozen(jnp.ones((3, 2)), jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    check_arrays((), args)
    specs = args if shapes is None else jax.export.symbolic_args_specs(args, shapes)
    specs = jax.tree.map(_type, tuple(specs))
    call = (lambda *xs: fn.fn(fn.params, *xs)) if isinstance(fn, Compact) else fn
    closed, out = jax.make_jaxpr(call, return_shape=True)(*specs)
    trees = jax.tree.structure(specs), jax.tree.structure(out)
    return Frozen(rewritten(closed, {}), specs, *trees)


def _type(x: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _named(leaves: Sequence[Any]) -> bool:
    return any(jax.export.is_symbolic_dim(n) for x in leaves for n in jax.typeof(x).shape)
