"""What is known of one pruned network: size, cost, equality with its masked model, time."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from benchmarks.common.train import Fn

PyTree = Any


def bytes_on_disk(variables: PyTree) -> int:
    """Returns the size of the variables as one uncompressed npz file."""
    file = io.BytesIO()
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    arrays: dict[str, Any] = {jp.typing.path_str(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(file, **arrays)
    return file.tell()


def kept_params(variables: PyTree) -> int:
    """Returns the number of weights that are not zero; batch statistics are no weights."""
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(variables["params"]))


def size_and_cost(fn: Fn, variables: PyTree, image: np.ndarray) -> dict[str, int]:
    """Returns what the network weighs and what one image costs."""
    cost = jp.cost(fn, variables, image)
    return {
        "params_kept": kept_params(variables),
        "bytes_on_disk": bytes_on_disk(variables),
        "flops_per_image": cost.flops,
    }


def equality(
    fn: Fn, masked: PyTree, small: jp.typing.Compact, small_fn: Fn, images: np.ndarray
) -> dict[str, Any]:
    """Returns how far the compact model is from its masked model, and what its certificate says.

    ``max_relative_error`` is the largest difference of two logits over the largest logit, on real
    test images in float32; ``error_float64`` is the same on random inputs in float64.
    """
    with jax.default_matmul_precision("highest"):  # accelerators round inputs unless told not to
        want, got = np.asarray(fn(masked, images)), np.asarray(small_fn(small.params, images))
    return {
        "max_relative_error": float(np.abs(got - want).max() / np.abs(want).max()),
        "error_float64": small.certificate.check(),
        "exact": small.certificate.exact,
        "units_masked": sum(entry.masked for entry in small.certificate.entries),
        "units_removed": sum(entry.removed for entry in small.certificate.entries),
        "certificate": str(small.certificate).splitlines(),
    }


def times(
    networks: Mapping[str, tuple[Fn, PyTree]], images: np.ndarray, batch: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Times all networks in one interleaved run against the first, which is the dense one.

    Returns:
      Name -> the timing with every round, images per second, and the speed-up over dense, each as
      JSON holds it.
    """
    entries = {name: (fn, (params, images[:batch])) for name, (fn, params) in networks.items()}
    compared = jp.compare(entries, repeats=rounds)
    return {
        name: timing.to_json()
        | {
            "batch": batch,
            "images_per_second": batch / timing.median,
            "speedup": compared.ratios[name]._asdict(),
        }
        for name, timing in compared.timings.items()
    }
