"""Speech that a Debian package carries: Asterisk's prompts, one speaker, 8 kHz."""

from __future__ import annotations

import gzip
import re
import wave
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TEXTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
RATE = 16_000
PAUSE = RATE // 2  # samples of silence between prompts
BELOW = 35.0  # dB below an excerpt's loudest chunk: no speech


def read(path: Path) -> np.ndarray:
    """A wav file of 8 kHz and 16 bit as float32 in -1..1 at 16 kHz."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getsampwidth(), file.getnchannels()) != (8000, 2, 1):
            raise ValueError(f"{path.name}: {file.getparams()}; wanted 8 kHz, 16 bit, one channel")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return resample_poly(samples.astype(np.float32) / 32768, 2, 1).astype(np.float32)


def excerpts(count: int, seconds: int, seed: int) -> np.ndarray:
    """Prompts in random order with pauses between them, cut into (count, seconds x rate)."""
    if not SOUNDS.is_dir():
        raise FileNotFoundError("no prompts here: apt-get install asterisk-core-sounds-en-wav")
    paths = sorted(SOUNDS.glob("**/*.wav"))
    wanted, parts = count * seconds * RATE, [np.zeros(0, np.float32)]
    for k in np.random.default_rng(seed).permutation(len(paths)):
        if sum(map(len, parts)) >= wanted:
            break
        parts += [read(paths[k]), np.zeros(PAUSE, np.float32)]
    return np.concatenate(parts)[:wanted].reshape(count, -1)


def loud(audio: np.ndarray, chunk: int) -> np.ndarray:
    """Whether each chunk is less than 35 dB below the excerpt's loudest: (batch, chunks)."""
    power = np.square(audio.reshape(len(audio), -1, chunk)).mean(-1)
    return power > power.max(1, keepdims=True) * 10 ** (-BELOW / 10)


def transcripts() -> dict[str, str]:
    """What is said in each prompt that is a wav file, by its name without the suffix.

    Remarks in brackets are no speech; silence and sounds without words are left out.
    """
    if not TEXTS.is_file() or not SOUNDS.is_dir():
        raise FileNotFoundError("no prompts here: apt-get install asterisk-core-sounds-en-wav")
    found = {}
    with gzip.open(TEXTS, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, colon, said = line.partition(":")
            said = re.sub(r"[(\[<].*?[)\]>]", "", said).strip()
            if colon and said and line[0] != ";" and (SOUNDS / f"{name}.wav").is_file():
                found[name] = said
    return found
