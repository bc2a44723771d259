"""How what is left of a model makes up for what went."""

from __future__ import annotations

from typing import Any

import jax

import jaxprune as jp


def repaired(dense: Any, params: Any, masks: Any, stats: jp.typing.Stats) -> Any:
    """What reads units that went is refit, and biases make up for them."""
    params = jp.oneshot.refit(dense, masks, stats, start=params, progress=False)
    return jp.oneshot.compensate(dense, params, masks, stats, biases=biases(dense))


def biases(params: Any) -> dict[str, str]:
    """Each block's kernel -> the bias beside it, where there is one."""
    paths = [jp.typing.path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    pairs = {p: p.removesuffix("kernel") + "bias" for p in paths if in_blocks(p, None)}
    return {kernel: bias for kernel, bias in pairs.items() if bias in paths}


def in_blocks(path: str, leaf: Any) -> bool:
    """Whether this is a kernel of a block: not of the convolutions, and no embedding."""
    return "blocks" in path and path.endswith("kernel")
