"""Sound with known words: prompts put together to chunks of at most 30 s, and errors counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import sounds
from benchmarks.models import whisper

PAUSE = whisper.RATE  # samples between prompts: 1 s
WORDS = 3  # a prompt has at least so many


class Clip(NamedTuple):
    name: str
    audio: np.ndarray  # 16 kHz, -1..1
    text: str


class Chunk(NamedTuple):
    """Prompts after each other, with pauses."""

    audio: np.ndarray
    text: str


def clips() -> list[Clip]:
    """All prompts of three words or more that are no longer than 30 s, in order of name."""
    found = [
        Clip(name, sounds.read(sounds.SOUNDS / f"{name}.wav"), said)
        for name, said in sorted(sounds.transcripts().items())
        if len(said.split()) >= WORDS
    ]
    return [clip for clip in found if len(clip.audio) <= whisper.RATE * whisper.SECONDS]


def packed(some: Sequence[Clip]) -> list[Chunk]:
    """Chunks of at most 30 s: each prompt goes into the first that has room for it."""
    chunks: list[list[Clip]] = []
    rooms: list[int] = []
    for clip in some:
        k = next((k for k, room in enumerate(rooms) if len(clip.audio) <= room), len(chunks))
        if k == len(chunks):
            chunks.append([])
            rooms.append(whisper.RATE * whisper.SECONDS)
        chunks[k].append(clip)
        rooms[k] -= len(clip.audio) + PAUSE
    return [_together(members) for members in chunks]


def _together(members: Sequence[Clip]) -> Chunk:
    silence = np.zeros(PAUSE, np.float32)
    audio = [part for clip in members for part in (clip.audio, silence)][:-1]
    return Chunk(np.concatenate(audio), " ".join(clip.text for clip in members))


def halves(every: Sequence[Clip], seed: int) -> tuple[list[Chunk], list[Chunk]]:
    """Chunks to calibrate on and chunks that are held out, split by prompt."""
    order = np.random.default_rng(seed).permutation(len(every))
    parts = np.array_split(order, 2)
    first, second = ([every[k] for k in part] for part in parts)
    return packed(first), packed(second)


# ---- errors --------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """What came of one chunk."""

    errors: int  # words put in, left out, or taken for others
    words: int  # of the reference
    repeated: int  # times that a phrase comes again at once, at most
    unfinished: bool  # no end within the limit


@functools.cache
def normalizer() -> Callable[[str], str]:
    """Whisper's own: no case, no punctuation, one spelling, numbers as digits."""
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def heard(said: str, text: str, tokens: np.ndarray) -> Heard:
    """Counts the errors of a transcript after normalisation."""
    import jiwer

    want, got = normalizer()(said), normalizer()(text)
    words = len(want.split())
    if not got:
        return Heard(words, words, 0, False)
    found = jiwer.process_words(want, got)
    errors = found.substitutions + found.deletions + found.insertions
    unfinished = bool(tokens[-1] != whisper.END)
    return Heard(errors, words, repeats(got.split()) - repeats(want.split()), unfinished)


def repeats(words: Sequence[str], longest: int = 8) -> int:
    """How often a phrase of at most 8 words follows itself at once, at most: 0 for never."""
    most = 0
    for size in range(1, longest + 1):
        run = 0
        for k in range(size, len(words)):
            run = run + 1 if words[k] == words[k - size] else 0
            most = max(most, run // size)
    return most


def rate(rows: Sequence[Any]) -> float:
    """Errors in percent of all words, of rows of (errors, words, ...)."""
    errors, words = np.sum([row[:2] for row in rows], 0)
    return float(100 * errors / words)


def difference(
    ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]], draws: int = 10_000
) -> tuple[float, float, float]:
    """Points of word error rate above another model, and the 95 % interval of a paired bootstrap.

    Chunks are drawn again within each split; what is told is the mean over splits. The splits share
    prompts, so the interval is of the chunks, not of new speakers or texts.

    Args:
      ours, theirs: for each split the rows of its chunks, as :class:`Heard` begins.
    """
    rng, means, drawn = np.random.default_rng(0), [], []
    for a, b in zip(ours, theirs, strict=True):
        words = np.array([row[1] for row in a])
        more = np.array([row[0] for row in a]) - np.array([row[0] for row in b])
        picks = rng.integers(len(words), size=(draws, len(words)))
        means.append(100 * more.sum() / words.sum())
        drawn.append(100 * more[picks].sum(1) / words[picks].sum(1))
    low, high = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    return float(np.mean(means)), float(low), float(high)
