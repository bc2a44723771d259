"""Whisper (English) in plain JAX: from 30 s of sound to text.

A log-mel spectrogram, two convolutions, an encoder over its 1,500 positions, and a decoder that
reads them while it writes one token after another. Blocks normalise before each sum; GELU is exact.
The weights are those of ``benchmarks.models.whisper_package``: 4 + 4 blocks of width 384, 6 heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Cache = list[dict[str, jax.Array]]

RATE, SECONDS = 16_000, 30
WINDOW, HOP, MELS = 400, 160, 80  # samples, samples, bands
HEAD, EPSILON = 64, 1e-5
PROMPT, END = (50257, 50362), 50256  # start of a transcript, without timestamps; its end
QUERIES = 300  # that the encoder reads for at a time
LIMIT = 220  # tokens of a transcript at most


# ---- sound -> spectrogram ------------------------------------------------------------------------


def log_mel(audio: np.ndarray) -> np.ndarray:
    """The spectrogram (3000, 80) of at most 30 s of sound in -1..1, at 16 kHz, as Whisper has it.

    Powers in 80 bands, as decimal logarithms, at most 8 below the highest, shifted and halved
    twice.
    """
    missing = RATE * SECONDS - len(audio)
    if missing < 0 or np.ndim(audio) != 1:
        raise ValueError(f"sound of shape {np.shape(audio)}; wanted at most {RATE * SECONDS:,}")
    padded = np.pad(np.pad(audio.astype(np.float32), (0, missing)), WINDOW // 2, "reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames * hann)))
    logs = np.log10(np.maximum(power @ mel_filters(), 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """Triangles of equal area (201, 80) on Slaney's scale: linear to 1 kHz, then logarithmic."""
    highest = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    steps = np.linspace(0, highest, MELS + 2)
    at = np.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))  # hertz
    hertz, width = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None], np.diff(at)
    rising, falling = (hertz - at[:-2]) / width[:-1], (at[2:] - hertz) / width[1:]
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (at[2:] - at[:-2])


# ---- layers --------------------------------------------------------------------------------------


def dense(p: Params, x: jax.Array) -> jax.Array:
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def norm(p: Params, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON)
    return x * p["scale"] + p["bias"]


def convolve(p: Params, x: jax.Array, stride: int) -> jax.Array:
    numbers = ("NWC", "WIO", "NWC")
    y = jax.lax.conv_general_dilated(x, p["kernel"], (stride,), [(1, 1)], dimension_numbers=numbers)
    return jax.nn.gelu(y + p["bias"], approximate=False)


def heads(p: Params, x: jax.Array) -> jax.Array:
    """(batch, length, width) -> (batch, heads, length, 64)."""
    return jnp.moveaxis(dense(p, x).reshape(*x.shape[:2], -1, HEAD), 1, 2)


def read(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """What queries read of values, (batch, heads, queries, 64); ``seen``: which keys each may see.

    Heads come first, so that products need no copies; weights are divided after the product with
    the values, which has 64 columns where they have one for each key.
    """
    scores = jnp.einsum("bhqd,bhkd->bhqk", q * HEAD**-0.5, k)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v) / weights.sum(-1, keepdims=True)


def read_all(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As :func:`read`, 300 queries of one example at a time: their weights fit into a cache."""

    def some(given: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = given  # (heads, length, 64)
        parts = jnp.moveaxis(q.reshape(len(q), -1, QUERIES, HEAD), 1, 0)
        found = jax.lax.map(lambda part: read(part[None], k[None], v[None])[0], parts)
        return jnp.moveaxis(found, 0, 1).reshape(q.shape)

    return read(q, k, v) if q.shape[2] % QUERIES else jax.lax.map(some, (q, k, v))


def joined(p: Params, x: jax.Array) -> jax.Array:
    """(batch, heads, length, 64) -> (batch, length, width), by the last kernel of an attention."""
    return dense(p["o"], jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], -1))


def mlp(p: Params, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(dense(p["up"], norm(p["norm"], x)), approximate=False)
    return dense(p["down"], hidden)


# ---- encoder -------------------------------------------------------------------------------------


def block(p: Params, x: jax.Array) -> jax.Array:
    """One layer of the encoder on hidden states (batch, positions, 384)."""
    y = norm(p["attention"]["norm"], x)
    q, k, v = (heads(p["attention"][name], y) for name in "qkv")
    x = x + joined(p["attention"], read_all(q, k, v))
    return x + mlp(p["mlp"], x)


def embed(params: Params, mel: jax.Array) -> jax.Array:
    """What the first layer of the encoder gets of spectrograms (batch, 3000, 80)."""
    p = params["encoder"]
    return convolve(p["conv2"], convolve(p["conv1"], mel, 1), 2) + p["position"]


def encode(params: Params, mel: jax.Array) -> jax.Array:
    """States (batch, 1500, 384) of spectrograms (batch, 3000, 80)."""
    x = embed(params, mel)
    for p in params["encoder"]["blocks"]:
        x = block(p, x)
    return norm(params["encoder"]["norm"], x)


# ---- decoder -------------------------------------------------------------------------------------


def read_states(params: Params, states: jax.Array) -> Cache:
    """The keys and values of the states, for each block: they serve all tokens."""
    crosses = [p["cross"] for p in params["decoder"]["blocks"]]
    return [{name: heads(p[name], states) for name in "kv"} for p in crosses]


def empty_cache(params: Params, batch: int, length: int) -> Cache:
    """Keys and values of each block before the first token."""

    def zeros(p: Params) -> jax.Array:
        return jnp.zeros((batch, p["kernel"].shape[1] // HEAD, length, HEAD))

    blocks = [p["attention"] for p in params["decoder"]["blocks"]]
    return [{name: zeros(p[name]) for name in "kv"} for p in blocks]


def decode(
    params: Params, states: Cache, cache: Cache, tokens: jax.Array, start: jax.Array | int
) -> tuple[jax.Array, Cache]:
    """Logits (batch, vocabulary) after tokens (batch, some) from a position on, and the cache."""
    x, cache = written_states(params, states, cache, tokens, start)
    return x[:, -1] @ params["decoder"]["embedding"].T, cache


def decoder_block(
    p: Params, x: jax.Array, given: dict[str, jax.Array], held: dict[str, jax.Array], start: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer on hidden states (batch, some, 384), which reads states' and earlier keys."""
    y = norm(p["attention"]["norm"], x)
    new = {name: heads(p["attention"][name], y) for name in "kv"}
    held = {n: jax.lax.dynamic_update_slice_in_dim(held[n], new[n], start, 2) for n in "kv"}
    seen = jnp.arange(held["k"].shape[2]) <= start + jnp.arange(x.shape[1])[:, None]
    q = heads(p["attention"]["q"], y)
    x = x + joined(p["attention"], read(q, held["k"], held["v"], seen))
    q = heads(p["cross"]["q"], norm(p["cross"]["norm"], x))
    x = x + joined(p["cross"], read(q, given["k"], given["v"]))
    return x + mlp(p["mlp"], x), held


def written_states(
    params: Params, states: Cache, cache: Cache, tokens: jax.Array, start: jax.Array | int
) -> tuple[jax.Array, Cache]:
    """Normalised hidden states (batch, some, 384) of tokens, and the cache with them."""
    p, count, full = params["decoder"], tokens.shape[1], []
    x = p["embedding"][tokens] + jax.lax.dynamic_slice_in_dim(p["position"], start, count)
    for one, given, held in zip(p["blocks"], states, cache, strict=True):
        x, held = decoder_block(one, x, given, held, start)
        full.append(held)
    return norm(p["norm"], x), full


def logits(params: Params, states: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits (batch, length, vocabulary) of what follows each token of a known transcript."""
    cache = empty_cache(params, *tokens.shape)
    x, _ = written_states(params, read_states(params, states), cache, tokens, 0)
    return x @ params["decoder"]["embedding"].T


# ---- transcripts ---------------------------------------------------------------------------------


class Greedy:
    """``greedy(params, states) -> tokens`` (batch, limit): the likeliest token, again and again.

    ``never`` and ``not_first`` are tokens that are not chosen, at all and first. After its end a
    transcript is filled with ends. ``whole``: decodes ``limit`` tokens in any case, which takes a
    time that does not depend on what is heard.
    """

    def __init__(
        self, never: Any = (), not_first: Any = (), *, limit: int = LIMIT, whole: bool = False
    ):
        self.never, self.not_first = np.asarray(never, int), np.asarray(not_first, int)
        self.limit, self.whole = limit, whole

    def __call__(self, params: Params, states: jax.Array) -> jax.Array:
        batch = states.shape[0]
        given, prompt = read_states(params, states), jnp.tile(jnp.asarray(PROMPT), (batch, 1))
        cache = empty_cache(params, batch, len(PROMPT) + self.limit)
        found, cache = decode(params, given, cache, prompt, 0)
        first = self._best(found, np.union1d(self.never, self.not_first))
        out = jnp.full((batch, self.limit), END).at[:, 0].set(first)

        def more(state: Any) -> Any:
            count, out, cache = state
            last = jax.lax.dynamic_slice_in_dim(out, count - 1, 1, 1)
            found, cache = decode(params, given, cache, last, len(PROMPT) + count - 1)
            token = jnp.where(last[:, 0] == END, END, self._best(found, self.never))
            out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], count, 1)
            return count + 1, out, cache

        def going(state: Any) -> Any:
            count, out, _ = state
            last = jax.lax.dynamic_slice_in_dim(out, count - 1, 1, 1)
            return (count < self.limit) & jnp.any(last != END)

        begin = (jnp.asarray(1), out, cache)
        if self.whole:
            return jax.lax.fori_loop(1, self.limit, lambda _, state: more(state), begin)[1]
        return jax.lax.while_loop(going, more, begin)[1]

    def _best(self, found: jax.Array, banned: np.ndarray) -> jax.Array:
        allowed = np.ones(found.shape[1], bool)
        allowed[banned] = False
        return jnp.argmax(jnp.where(jnp.asarray(allowed), found, -jnp.inf), -1)

    def transcribe(self, params: Params, mel: jax.Array) -> jax.Array:
        """Tokens (batch, limit) of spectrograms (batch, 3000, 80)."""
        return self(params, encode(params, mel))


def text(tokenizer: Any, tokens: np.ndarray) -> str:
    """The transcript of one row of tokens."""
    return tokenizer.decode([int(t) for t in tokens if t < END]).strip()
