"""Silero VAD (16 kHz) in plain JAX, from the safetensors file of the package ``silero-vad``.

Is there speech in each 32 ms? Magnitudes of a short-time Fourier transform (a convolution with a
fixed kernel), four convolutions over the four frames of a chunk, an LSTM over the chunks, one
output. Kernels are (width, in, out) and (in, out). The package's ONNX files hold the same network
with other values.

Needs ``pip install safetensors`` and ``pip install --no-deps silero-vad==6.2.3``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RATE, CHUNK, CONTEXT = 16_000, 512, 64  # samples: per second, per chunk, seen of the one before
HOP, REFLECTED = 128, 64
CONVOLUTIONS = {"conv1": 1, "conv2": 2, "conv3": 2, "conv4": 1}  # name -> stride


def folder() -> Path:
    """Where the files lie; raises ModuleNotFoundError where the package is not installed."""
    spec = importlib.util.find_spec("silero_vad")  # imports nothing of it: it wants torch
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the weights come with a package: pip install --no-deps silero-vad==6.2.3"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def load() -> dict[str, Any]:
    """Returns float32 parameters."""
    from safetensors.numpy import load_file

    return from_arrays(load_file(folder() / "silero_vad_16k.safetensors"))


def from_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tree that :func:`apply` takes, from arrays under the names that the file gives them."""
    params: dict[str, Any] = {
        name: {
            "kernel": arrays[f"{name}.weight"].transpose(2, 1, 0),
            "bias": arrays[f"{name}.bias"],
        }
        for name in CONVOLUTIONS
    }
    params["stft"] = arrays["stft_conv.weight"].transpose(2, 1, 0)  # (256, 1, 2 x frequencies)
    params["lstm"] = {
        "kernel": arrays["lstm_cell.weight_ih"].T,  # (in, 4 x hidden)
        "recurrent_kernel": arrays["lstm_cell.weight_hh"].T,
        "bias": arrays["lstm_cell.bias_ih"] + arrays["lstm_cell.bias_hh"],
    }
    params["final"] = {
        "kernel": arrays["final_conv.weight"][..., 0].T,
        "bias": arrays["final_conv.bias"],
    }
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,), [(padding, padding)], dimension_numbers=numbers
    )


def windows(audio: jax.Array) -> jax.Array:
    """(batch, samples) -> (batch, chunks, 640): end of the chunk before, chunk, mirror."""
    chunks = audio.reshape(audio.shape[0], -1, CHUNK)
    before = jnp.pad(chunks[:, :-1, -CONTEXT:], ((0, 0), (1, 0), (0, 0)))
    return jnp.concatenate([before, chunks, chunks[..., -REFLECTED - 1 : -1][..., ::-1]], -1)


def features(params: dict[str, Any], audio: jax.Array) -> jax.Array:
    """What the LSTM reads of each chunk, (batch, chunks, 128)."""
    x = windows(audio)
    batch, chunks, _ = x.shape
    spectrum = convolve(x.reshape(batch * chunks, -1, 1), params["stft"], HOP, 0)
    real, imaginary = jnp.split(spectrum, 2, -1)
    x = jnp.sqrt(jnp.square(real) + jnp.square(imaginary))
    for name, stride in CONVOLUTIONS.items():
        p = params[name]
        x = jax.nn.relu(convolve(x, p["kernel"], stride, 1) + p["bias"])
    return x.reshape(batch, chunks, -1)


def lstm(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """Hidden states (batch, chunks, hidden), from a state of zeros."""
    recurrent = p["recurrent_kernel"]

    def step(state: tuple[jax.Array, jax.Array], given: jax.Array) -> Any:
        h, c = state
        i, f, g, o = jnp.split(given + h @ recurrent, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    given = jnp.moveaxis(x @ p["kernel"] + p["bias"], 1, 0)
    zero = jnp.zeros((x.shape[0], recurrent.shape[0]))
    return jnp.moveaxis(jax.lax.scan(step, (zero, zero), given)[1], 0, 1)


def apply(params: dict[str, Any], audio: jax.Array) -> jax.Array:
    """Logits (batch, chunks) of audio (batch, samples), in -1..1, in whole chunks of 512 samples.

    Speech where a logit is positive; the package gives its sigmoid.
    """
    hidden = jax.nn.relu(lstm(params["lstm"], features(params, audio)))
    final = params["final"]
    return (hidden @ final["kernel"] + final["bias"])[..., 0]
