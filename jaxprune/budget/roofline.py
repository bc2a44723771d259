"""Devices that are not here: time from published peaks, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxprune.budget.target import positive
from jaxprune.costs.operations import Operation, Sizes


@dataclass(frozen=True)
class Device:
    """Published figures of a device.

    Attributes:
      name: as in ``jp.budget.DEVICES``.
      flops: peak FLOP/s of dense contractions, by type. A type that isn't given has the peak of
        "float32", or where that isn't given either the least of all: a lower bound on its speed.
      bandwidth: bytes/s of its memory.
      tile: widths are rounded up to a multiple of it, for that is what is computed.
      source: where the figures are from.

    Raises:
      TypeError: for a figure that isn't a number.
      ValueError: for flops that aren't figures by type, or figures that aren't positive.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    tile: int
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.flops, Mapping) or not self.flops:
            raise ValueError(
                f"jp.budget.Device({self.name!r}, flops={self.flops!r}): wanted a peak in FLOP/s "
                "by type, such as flops={'float32': 1e13}"
            )
        for dtype, peak in self.flops.items():
            positive(f"jp.budget.Device({self.name!r}, flops={{{dtype!r}: {peak!r}}})", peak)
        positive(f"jp.budget.Device({self.name!r}, bandwidth={self.bandwidth!r})", self.bandwidth)
        positive(f"jp.budget.Device({self.name!r}, tile={self.tile!r})", self.tile, least=1)

    def peak(self, dtype: str) -> float:
        """FLOP/s of a type, given or not."""
        others = self.flops.get("float32", min(self.flops.values()))
        return self.flops.get(dtype, others)

    def seconds(self, op: Operation, sizes: Sizes) -> Any:
        """max(FLOPs / peak, bytes / bandwidth), with tiles filled up: a lower bound."""
        dtype = (
            np.result_type(*(v.aval.dtype.name for v in op.step.outs)).name if op.step.outs else ""
        )
        padded = {d: -(-np.asarray(n) // self.tile) * self.tile for d, n in sizes.items()}
        padded = {
            d: np.where(np.asarray(d.size) < self.tile, sizes[d], n) for d, n in padded.items()
        }
        return np.maximum(op.flops(padded) / self.peak(dtype), op.bytes(sizes) / self.bandwidth)


T = 1e12
_NVIDIA = "NVIDIA's data sheet, dense tensor core rates without sparsity; f32 as TF32 where JAX's "
_GOOGLE = "Google Cloud's TPU system architecture pages; JAX multiplies f32 in bf16 by default"

DEVICES = {
    d.name: d
    for d in (
        Device(
            "a100",
            {"float32": 156 * T, "bfloat16": 312 * T, "float16": 312 * T},
            2.039e12,
            64,
            _NVIDIA + "default allows it: A100 80GB SXM",
        ),
        Device(
            "h100",
            {"float32": 494 * T, "bfloat16": 989 * T, "float16": 989 * T},
            3.35e12,
            64,
            _NVIDIA + "default allows it: H100 SXM",
        ),
        Device(
            "l4",
            {"float32": 60 * T, "bfloat16": 121 * T, "float16": 121 * T},
            0.3e12,
            64,
            _NVIDIA + "default allows it: L4",
        ),
        Device(
            "tpu v5e", {"float32": 197 * T, "bfloat16": 197 * T}, 0.819e12, 128, _GOOGLE + ": v5e"
        ),
        Device(
            "tpu v5p", {"float32": 459 * T, "bfloat16": 459 * T}, 2.765e12, 128, _GOOGLE + ": v5p"
        ),
        Device(
            "tpu v6e", {"float32": 918 * T, "bfloat16": 918 * T}, 1.638e12, 256, _GOOGLE + ": v6e"
        ),
        Device(
            "laptop cpu",
            {"float32": 0.77 * T, "float64": 0.38 * T},
            50e9,
            8,
            "arithmetic, no one model: 8 cores x 3 GHz x 2 FMA units x 8 f32 lanes x 2; two "
            "channels of DDR4-3200",
        ),
    )
}


def device(name: str) -> Device:
    """The device of a name.

    Raises:
      ValueError: for a name that is not among ``DEVICES``.

    Example:
      >>> import jaxprune as jp
      >>> jp.budget.device("H100").bandwidth
      3350000000000.0
    """
    if name.lower() not in DEVICES:
        raise ValueError(
            f"no figures are known of the device {name!r}; there are {sorted(DEVICES)}; give "
            "jp.budget.Device(name, flops={'float32': ...}, bandwidth=..., tile=..., source=...), "
            "or leave device out to measure this one"
        )
    return DEVICES[name.lower()]
