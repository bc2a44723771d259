"""One split of the prompts: what is calibrated on, what is held out, and what the dense model says.

Everything that a recipe may look at comes of the calibration half's sound alone: the transcripts
there are the dense model's own.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks.models import whisper, whisper_package
from benchmarks.studies.pretrained import energy
from benchmarks.studies.speech import prompts
from benchmarks.studies.speech.repair import in_blocks, repaired
from jaxprune.structure.select import chosen_dims

BATCH = 4  # chunks that are transcribed together where time counts: two minutes of sound
AT_ONCE = 12  # chunks that are transcribed together where words count
SCORED = 12  # calibration chunks whose sound is calibrated on, and that units are scored on
WITHOUT = 4  # calibration chunks that the loss is measured on, once without some units
LIKELY = 32  # of each next token the dense model's likeliest, which others learn from
STEP = 16  # calibration sequences are cut to multiples of it, so that few programs are compiled
LONGEST = 128  # tokens of a transcript that is learnt from, prompt included
PACE = 64  # tokens that are written while a search measures: of a usual chunk

# Names of dimensions in the program that transcribes: the encoder's, then the decoder's.
FFN = ("encoder/blocks/*/mlp/up/kernel:1", "decoder/blocks/*/mlp/up/kernel:1")
HEADS = ("encoder/blocks/*/attention/?/kernel:1.0", "decoder/blocks/*/*/?/kernel:1.0")
SEARCHED = (*FFN, *HEADS)

Fn = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Recognizer:
    """Whisper as it comes, and what all splits share."""

    params: Any
    tokenizer: Any
    greedy: whisper.Greedy

    @classmethod
    def load(cls) -> Recognizer:
        greedy = whisper.Greedy(*whisper_package.rules())
        return cls(whisper_package.load(), whisper_package.tokenizer(), greedy)

    @property
    def fn(self) -> Fn:
        """(params, spectrograms) -> tokens."""
        return self.greedy.transcribe

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        shape = (BATCH, 2 * len(self.params["encoder"]["position"]), whisper.MELS)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def paced(self) -> Fn:
        """As :attr:`fn`, but of so many tokens in any case: what a search times."""
        greedy = self.greedy
        return whisper.Greedy(greedy.never, greedy.not_first, limit=PACE, whole=True).transcribe

    @functools.cached_property
    def jitted(self) -> Fn:
        return jax.jit(self.fn)

    @functools.cached_property
    def structure(self) -> jp.typing.Structure:
        return jp.infer_structure(self.paced, self.params, self.example)


def transcribed(fn: Fn, params: Any, mels: np.ndarray) -> np.ndarray:
    """Tokens (chunks, limit), some chunks at a time; the last time some come twice."""
    found = []
    for begin in range(0, len(mels), AT_ONCE):
        part = np.resize(np.arange(begin, min(begin + AT_ONCE, len(mels))), AT_ONCE)
        found.append(np.asarray(fn(params, mels[part])))
    return np.concatenate(found)[: len(mels)]


class on_disk(functools.cached_property):
    """A property that takes minutes: once per folder, for an interrupted study."""

    def __init__(self, make: Callable[[Any], Any]):
        def kept(case: Case) -> Any:
            path = case.folder / f"{make.__name__}-{case.seed}-{len(case.seen)}.pickle"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_suffix(".part").write_bytes(pickle.dumps(jax.device_get(make(case))))
                path.with_suffix(".part").rename(path)
            return pickle.loads(path.read_bytes())

        super().__init__(kept)


class Case:
    """A recognizer and one split; ``folder`` keeps what takes minutes."""

    def __init__(
        self, model: Recognizer, every: Sequence[prompts.Clip], seed: int, chunks: int, folder: Path
    ):
        self.folder = folder
        calibration, held = (half[:chunks] for half in prompts.halves(every, seed))
        self.model, self.seed, self.held = model, seed, held
        self.mels = spectrograms(held)
        self.seen = spectrograms(calibration)

    def judged(self, fn: Fn, params: Any) -> list[list[Any]]:
        """Of each held-out chunk: errors, words, repetitions, whether there was no end."""
        tokens = transcribed(fn, params, self.mels)
        return [
            list(prompts.heard(chunk.text, whisper.text(self.model.tokenizer, row), row))
            for chunk, row in zip(self.held, tokens, strict=True)
        ]

    @on_disk
    def told(self) -> list[np.ndarray]:
        """What the dense model makes of each calibration chunk: tokens with prompt and end."""
        rows = transcribed(self.model.jitted, self.model.params, self.seen)
        lengths = [int((row != whisper.END).sum()) + 1 for row in rows]
        return [np.r_[whisper.PROMPT, row[:n]][:LONGEST] for row, n in zip(rows, lengths)]

    @on_disk
    def states(self) -> list[np.ndarray]:
        """What the dense encoder makes of each calibration chunk, (1, 1500, 384)."""
        encode = jax.jit(whisper.encode)
        return [np.asarray(encode(self.model.params, mel[None])) for mel in self.seen]

    @on_disk
    def stats(self) -> jp.typing.Stats:
        """Statistics of the inputs of all kernels of blocks, in one pass of the dense model."""
        sound = [(mel[None],) for mel in self.seen[:SCORED]]
        text = [(self.states[k], row[None]) for k, row in self.spoken]
        return jp.calibrate(half, self.model.params, sound + text, where=in_blocks, progress=False)

    @property
    def spoken(self) -> list[tuple[int, np.ndarray]]:
        """Numbers of calibration chunks, and what was made of them, in few lengths."""
        rows = [(k, row[: len(row) // STEP * STEP]) for k, row in enumerate(self.told)]
        return [(k, row) for k, row in rows if len(row)]

    @functools.cached_property
    def lessons(self) -> list[tuple[Any, ...]]:
        """Batches for :func:`loss`, of one shape: one for each calibration chunk."""
        return list(self._lessons())

    def _lessons(self) -> Iterator[tuple[Any, ...]]:
        likely = jax.jit(likeliest)
        for mel, states, row in zip(self.seen, self.states, self.told):
            given = np.full((1, LONGEST), whisper.END, np.int32)
            given[0, : len(row)] = row
            # The prompt is given; what follows its end is no transcript.
            real = (np.arange(LONGEST) >= len(whisper.PROMPT) - 1) & (
                np.arange(LONGEST) < len(row) - 1
            )
            chosen, share = likely(self.model.params, states, given)
            yield mel[None], states, given, np.asarray(real[None], np.float32), chosen, share

    @on_disk
    def taylor(self) -> dict[str, Any]:
        """By how much the loss changes with each unit."""
        dense, some = self.model.params, self.lessons[:SCORED]
        return jp.scores.taylor_units(self.model.structure, dense, loss, some, progress=False)

    @on_disk
    def measured(self) -> dict[str, Any]:
        """By how much the loss rises as units of least energy go and what reads them is refit."""
        structure, dense = self.model.structure, self.model.params
        each = structure.unit_scores(energy(dense, self.stats), jp.reduce.sum)
        order = {name: each[name] for name in chosen_dims(structure, SEARCHED)}
        return jp.scores.loss_units(
            structure, dense, loss, self.lessons[:WITHOUT], order=order, progress=False,
            repair=lambda params, masks: repaired(dense, params, masks, self.stats),
        )  # fmt: skip


def spectrograms(chunks: Sequence[prompts.Chunk]) -> np.ndarray:
    return np.stack([whisper.log_mel(chunk.audio) for chunk in chunks])


def half(params: Any, *batch: Any) -> Any:
    """The encoder on sound, or the decoder on states and tokens."""
    return whisper.encode(params, *batch) if len(batch) == 1 else whisper.logits(params, *batch)


def likeliest(params: Any, states: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of what may follow each token the likeliest ones, and their probabilities."""
    found, chosen = jax.lax.top_k(whisper.logits(params, states, tokens), LIKELY)
    return chosen, jax.nn.softmax(found, -1)


def loss(
    params: Any, mel: jax.Array, states: jax.Array, tokens: jax.Array, real: jax.Array,
    chosen: jax.Array, share: jax.Array,
) -> jax.Array:  # fmt: skip
    """How far the next tokens' probabilities and the encoder's states are from the dense model's.

    Cross-entropy against the dense model's likeliest tokens, on its own transcript, and the share
    of the states' variance that is not matched.
    """
    heard = whisper.encode(params, mel)
    found = whisper.logits(params, heard, tokens)
    entropy = jax.nn.logsumexp(found, -1) - jnp.sum(
        share * jnp.take_along_axis(found, chosen, -1), -1
    )
    apart = jnp.mean(jnp.square(heard - states)) / jnp.var(states)
    return jnp.sum(entropy * real) / jnp.sum(real) + apart
