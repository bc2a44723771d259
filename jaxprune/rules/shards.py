"""``shard_map``: one program, which each device runs on its parts of the operands.

An axis that is cut over devices is a product of the devices and of what each of them holds. So
its units go on all devices alike, and the parts stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.ir import axes, compat
from jaxprune.ir.axes import Axis
from jaxprune.ir.tape import Step, Value
from jaxprune.rules.control import build, demand_called, typed
from jaxprune.rules.registry import Flow, Runner, Wire, couple_opaque, register_nested
from jaxprune.rules.zeros import Zeros
from jaxprune.sharding import parts


def _cuts(step: Step, specs: Sequence[Any], values: Sequence[Any]) -> list[list[tuple[Any, int]]]:
    """Per value and axis the mesh axes that it is cut over, and into how many parts."""
    mesh = compat.shard_map_parts(step.eqn).mesh
    return [
        parts(jax.sharding.NamedSharding(mesh, spec), len(v.shape))
        for spec, v in zip(specs, values, strict=True)
    ]


def _device(step: Step, devices: dict[Any, Axis], names: Any, count: int) -> Axis:
    if names not in devices:
        devices[names] = axes.leaf(count)
        step.freeze(devices[names], "spread over devices")
    return devices[names]


def couple_shard_map(step: Step) -> list[list[Axis]]:
    p, devices = compat.shard_map_parts(step.eqn), dict[Any, Axis]()
    variables = compat.open_jaxpr(p.jaxpr)[0].invars
    inputs = []
    for v, var, cuts in zip(step.ins, variables, _cuts(step, p.in_specs, step.ins), strict=True):
        local = list(v.axes)
        for k, (names, count) in enumerate(cuts):
            if count > 1:
                local[k] = axes.leaf(v.shape[k] // count)
                step.unify(v.axes[k], axes.prod([_device(step, devices, names, count), local[k]]))
        inputs.append(Value(var.aval, local))
    try:
        step.subs = [build(step, p.jaxpr, inputs)]
    except Exception as error:  # JAX traces some gradient rules within its own shard_map only
        return couple_opaque(step, f"its program can't be read ({str(error).splitlines()[0]:.80})")
    outs = step.subs[0].outputs
    return [
        [
            a if count == 1 else axes.prod([_device(step, devices, names, count), a])
            for a, (names, count) in zip(v.axes, cuts, strict=True)
        ]
        for v, cuts in zip(outs, _cuts(step, p.out_specs, outs), strict=True)
    ]


def zeros_shard_map(flow: Flow, step: Step, known: list[Zeros]) -> list[Zeros]:
    p = compat.shard_map_parts(step.eqn)
    local = [
        z._replace(axes=tuple(_common(v, n) for v, (_, n) in zip(z.axes, cuts)))
        for z, cuts in zip(known, _cuts(step, p.in_specs, step.ins), strict=True)
    ]
    results, outs = flow.run(step.subs[0], local), step.subs[0].outputs
    return [
        z._replace(axes=tuple(np.tile(v, n) for v, (_, n) in zip(z.axes, cuts)))
        for z, cuts in zip(results, _cuts(step, p.out_specs, outs), strict=True)
    ]


def _common(vector: np.ndarray, count: int) -> np.ndarray:
    """What is zero on every device."""
    return np.logical_and.reduce(vector.reshape(count, -1))


def run_shard_map(
    runner: Runner, step: Step, ins: list[Wire], xs: list[Any], outs: list[Wire]
) -> list[Any]:
    p = compat.shard_map_parts(step.eqn)

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(runner.run(step.subs[0], ins, args, outs))

    each = jax.shard_map(
        body,
        mesh=p.mesh,
        in_specs=tuple(p.in_specs[i] for i, _ in ins),
        out_specs=tuple(p.out_specs[j] for j, _ in outs),
        axis_names=p.manual_axes,
        check_vma=p.check_vma,
    )
    return list(each(*typed(xs, ins, step.ins)))


register_nested(
    "shard_map",
    couple=couple_shard_map, zeros=zeros_shard_map, demand=demand_called, run=run_shard_map,
)  # fmt: skip
