"""Single weights, block by block: each is calibrated on what the pruned ones before it give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

import jaxprune as jp
from benchmarks.models import whisper
from benchmarks.studies.speech.case import Case

Written = tuple[jax.Array, jax.Array]  # hidden states of tokens, and the encoder's


def pruned(case: Case, prune: Callable[[Any, Any], Any]) -> Any:
    """Params whose blocks went through ``prune(p, stats) -> (p, masks)``, the encoder's first."""
    dense = case.model.params
    sound = [_embed(dense, mel[None]) for mel in case.seen]
    encoder = dense["encoder"] | {"blocks": _side(whisper.block, dense["encoder"], sound, prune)}
    new = dense | {"encoder": encoder}
    decoder = dense["decoder"]
    text = [_written(new, row, case.seen[k][None]) for k, row in case.spoken]
    return new | {"decoder": decoder | {"blocks": _side(reading, decoder, text, prune)}}


_embed, _encode = jax.jit(whisper.embed), jax.jit(whisper.encode)


def _side(block: Any, side: Any, batches: list[Any], prune: Any) -> list[Any]:
    found = jp.oneshot.sequential(
        block, side["blocks"], batches, prune, order="use", where=_kernel, progress=False
    )
    return list(found.params)


def _kernel(path: str, leaf: Any) -> bool:
    return path.endswith("kernel")


def reading(p: Any, given: Written) -> Written:
    """A decoder's block on all tokens of a transcript, and the same states for the next one."""
    x, states = given
    read = {name: whisper.heads(p["cross"][name], states) for name in "kv"}
    blank = whisper.empty_cache({"decoder": {"blocks": [p]}}, *x.shape[:2])[0]
    return whisper.decoder_block(p, x, read, blank, 0)[0], states


def _written(params: Any, row: Any, mel: Any) -> Written:
    """What the decoder's first block gets."""
    p = params["decoder"]
    return p["embedding"][row[None]] + p["position"][: len(row)], _encode(params, mel)
