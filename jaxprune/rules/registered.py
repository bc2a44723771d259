"""Rules of one's own: what a user says about a primitive or a kernel that is not in the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace as changed
from typing import Any

import jax
from jax.extend.core import Primitive

from jaxprune.ir import compat, primitives
from jaxprune.ir.axes import Axis
from jaxprune.ir.primitives import Kind
from jaxprune.ir.tape import Step
from jaxprune.rules import registry
from jaxprune.rules.declared import refuse, refused
from jaxprune.rules.registry import Rule
from jaxprune.rules.zeros import Zeros


def register(
    primitive: Any,
    rule: Rule | None = None,
    *,
    like: str | None = None,
    kernel: str | None = None,
    evaluate: Callable[..., Any] | None = None,
    replace: bool = False,
) -> None:
    """Teaches jaxprune a primitive, so that it is no longer opaque.

    A rule is a promise about the primitive. ``small.certificate.check()`` tests it in numbers.

    Args:
      primitive: a ``jax.extend.core.Primitive``, or its name.
      rule: :func:`elementwise`, :func:`named_axes`, or a hand-written :class:`Rule`.
      like: in place of a rule, the name of a primitive whose rule is taken over; the rule then
        reads the parameters of your primitive under the names that the other one has.
      kernel: for ``"pallas_call"`` the name of the kernel (``pl.pallas_call(..., name=)``, else its
        function's name), for ``"ffi_call"`` the name of the target: these run any kernel.
      evaluate: computes the results at other sizes, ``evaluate(*operands, **params)`` with the
        primitive's parameters; a kernel gets no parameters, as they fix its sizes. An equation
        that it doesn't make at full size stays opaque. By default the primitive is bound to the
        smaller operands with unchanged parameters.
      replace: whether to overrule a rule that is there.

    Raises:
      TypeError: for a primitive, rule, like, kernel or evaluate of another type.
      ValueError: for neither or both of rule and like, for a name that has a rule already, for a
        like that has none, for a pallas_call without kernel, or a kernel without evaluate.

    Example:
      >>> import jaxprune as jp
      >>> jp.rules.register("doc_bias_gelu", jp.rules.elementwise(zero_if="all"), replace=True)
      >>> product = jp.rules.named_axes("...i, io -> ...o", sums="i", linear=True)
      >>> jp.rules.register("doc_matmul", product, replace=True)
      >>> jp.rules.register("doc_tanh", like="tanh", replace=True)
    """
    name = _checked_name(primitive)
    key = _checked_kernel(name, kernel, evaluate)
    if (rule is None) == (like is None):
        raise ValueError(
            f"register({name!r}) wants either a rule, jp.rules.elementwise() for example, or like="
        )
    found = _checked_rule(name, rule) if like is None else _like(name, like, kernel)
    if evaluate is not None:
        found = _evaluated_by(found, evaluate, with_params=kernel is None)
    if key in registry.RULES and not replace:
        raise ValueError(f"{key} has a rule already; to overrule it pass replace=True")
    registry.RULES[key] = _where_it_fits(found)


def _checked_name(primitive: Any) -> str:
    if isinstance(primitive, Primitive):
        return primitive.name
    if not isinstance(primitive, str):
        raise TypeError(
            "register wants a jax.extend.core.Primitive or the name of one, got "
            f"{type(primitive).__name__}"
        )
    if not primitive:
        raise ValueError("register wants the name of a primitive, got an empty string")
    return primitive


def _checked_kernel(name: str, kernel: Any, evaluate: Any) -> str:
    """The key in the table."""
    kernels = primitives.names(Kind.KERNEL)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate wants a function of the operands, got {type(evaluate).__name__}")
    if kernel is None:
        if name in kernels:
            raise ValueError(
                f"{name} runs any kernel; say which one: register({name!r}, ..., kernel='name')"
            )
        return name
    if not isinstance(kernel, str):
        raise TypeError(f"kernel wants the kernel's name, got {type(kernel).__name__}")
    if name not in kernels:
        raise ValueError(f"kernel= is for {sorted(kernels)}; {name} has none")
    if evaluate is None:
        raise ValueError(
            f"the sizes of a kernel are fixed in its {name}; pass evaluate=, the function of the "
            "operands that makes this call"
        )
    return registry.kernel_key(name, kernel)


def _checked_rule(name: str, rule: Any) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(
            f"register({name!r}) wants a rule, jp.rules.elementwise(), jp.rules.named_axes(...) or "
            f"jp.rules.Rule(...), got {type(rule).__name__}"
        )
    return changed(rule, couple=lambda step: _fitting(step, rule.couple(step)))


def _fitting(step: Step, results: Sequence[Sequence[Axis]]) -> Sequence[Sequence[Axis]]:
    given = [tuple(axis.size for axis in axs) for axs in results]
    wanted = [v.aval.shape for v in step.eqn.outvars]
    if given != wanted:
        raise ValueError(
            f"the rule for {step.name} gives axes of sizes {given} for results of shapes {wanted} "
            f"at {step.where}"
        )
    return results


def _evaluated_by(rule: Rule, evaluate: Callable[..., Any], with_params: bool) -> Rule:
    """The rule for those equations that ``evaluate`` makes at their own sizes; no rule for others.

    A derivative or a batched call runs under its kernel's name, too.
    """

    def run(step: Step, xs: Sequence[Any]) -> list[Any]:
        with compat.context(step.eqn):
            out = evaluate(*xs, **(step.params if with_params else {}))
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def couple(step: Step) -> Any:
        why = _differs(step, lambda *xs: run(step, xs))
        return refuse(step, why) if why else rule.couple(step)

    return changed(rule, couple=couple, evaluate=lambda view, step, xs: run(step, xs))


def _differs(step: Step, run: Callable[..., Any]) -> str:
    """How an equation differs from what ``run`` makes of the same operands, '' if it doesn't."""
    operands = [jax.ShapeDtypeStruct(v.shape, v.aval.dtype) for v in step.ins]
    try:
        made = jax.make_jaxpr(run)(*operands)
    except Exception as error:
        return f"evaluate fails for its operands: {error}".splitlines()[0]
    given = [(v.shape, v.dtype) for v in made.out_avals]
    wanted = [(v.aval.shape, v.aval.dtype) for v in step.eqn.outvars]
    if given != wanted:
        return f"evaluate gives {given} in place of {wanted}"
    key = step.name, compat.kernel_name(step.eqn)
    kernels = {text for *of, text in _kernels(made) if tuple(of) == key}
    if kernels and compat.kernel_text(step.eqn) not in kernels:
        return f"evaluate makes another kernel under the name {key[1]!r}"
    return ""


def _kernels(jaxpr: Any) -> Iterator[tuple[str, str, str]]:
    """(primitive, kernel, content) of the kernels in a program."""
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        if primitives.kind(eqn) is Kind.KERNEL:
            yield eqn.primitive.name, compat.kernel_name(eqn), compat.kernel_text(eqn)
        else:
            for sub in compat.sub_jaxprs(eqn):
                yield from _kernels(sub)


# ------------------------------------------------------------------------ where no rule fits


def _where_it_fits(rule: Rule) -> Rule:
    """The rule, but that of an opaque primitive for the equations that it refused to couple."""

    def part(name: str) -> Any:
        own, opaque = getattr(rule, name), getattr(registry.OPAQUE, name)

        def read(*args: Any) -> Any:
            step = next(a for a in args if isinstance(a, (Step, _Seen)))
            return (opaque if getattr(step, "itself", step) in refused else own)(*args)

        return read

    return Rule(rule.couple, part("zeros"), part("mixes"), part("evaluate"))


# ------------------------------------------------------------------------ the rule of another


class _Seen:
    """A step under another primitive's name; what it freezes still names its own."""

    def __init__(self, step: Step, name: str):
        self.step, self.name = step, name
        self.itself = getattr(step, "itself", step)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.step, attribute)


def _like(name: str, like: Any, kernel: str | None) -> Rule:
    if not isinstance(like, str):
        raise TypeError(f"like wants the name of a primitive, got {type(like).__name__}")
    base = registry.RULES.get(like)
    if base is None:
        near = difflib.get_close_matches(like, registry.RULES, 3, 0.5)
        raise ValueError(f"like={like!r} has no rule to take over; near names: {near}")
    if not isinstance(base, Rule):
        raise ValueError(f"like={like!r} holds programs of its own; its rule can't be taken over")

    def seen(step: Step) -> Any:
        return _Seen(step, like)

    def couple(step: Step) -> Any:
        try:
            return _fitting(step, base.couple(seen(step)))
        except (KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"the rule of {like} does not fit {name} at {step.where} "
                f"({type(error).__name__}: {error})"
            ) from error

    def found(step: Step, known: list[Zeros]) -> list[Zeros]:
        if kernel is not None:  # some rules try the primitive on zeros, which a kernel can't do
            return registry.nothing_known(step, known)
        return base.zeros(seen(step), known)

    return Rule(
        couple=couple,
        zeros=found,
        mixes=lambda step, known: base.mixes(seen(step), known),
        evaluate=lambda view, step, xs: base.evaluate(view, seen(step), xs),
    )
