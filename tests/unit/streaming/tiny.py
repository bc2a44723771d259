"""A tiny transformer, its checkpoint, and the calls that prune it in memory and from disk."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jaxprune as jp

WIDTH, HIDDEN, LAYERS, WORDS = 8, 16, 3, 20
SHAPES = {
    **dict.fromkeys("qkvo", (WIDTH, WIDTH)),
    "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
}  # fmt: skip
NAMES = [
    {name: jp.oneshot.Transposed(f"layers.{k}.{name}.weight") for name in SHAPES}
    for k in range(LAYERS)
]
UNITS = "gate:1"
X = jax.ShapeDtypeStruct((2, 12, WIDTH), jnp.float32)


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def block(p, x):
    h = norm(x)
    q, k, v = (h @ p[name] for name in "qkv")
    x = x + jax.nn.softmax(q @ k.swapaxes(-1, -2) / 3) @ v @ p["o"]
    h = norm(x)
    x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return x + p["bias"] if "bias" in p else x


def embed(p, tokens):
    return p["table"][tokens]


EMBED = (embed, {"table": "embed.weight"})


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    found = {
        f"layers.{k}.{name}.weight": (rng.normal(size=shape) / 3).T.astype(dtype).copy()
        for k in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    return found | {
        "embed.weight": rng.normal(size=(WORDS, WIDTH)).astype(dtype),
        "norm.weight": np.ones(WIDTH, dtype),
    }


TOKENS = list(np.random.default_rng(1).integers(0, WORDS, (3, 2, 12)))


def save(folder, found=None):
    """One file, as Hugging Face writes a small model."""
    folder.mkdir()
    save_file(tensors() if found is None else found, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_sharded(folder, count=3, found=None):
    """Several files and an index; tensors of a block stand in different ones."""
    import json

    found = tensors() if found is None else found
    folder.mkdir()
    names, placed = sorted(found), {}
    for k in range(count):
        file = f"model-{k + 1:05}-of-{count:05}.safetensors"
        save_file({n: found[n] for n in names[k::count]}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(names[k::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def in_memory(prune, dtype=np.float32, **options):
    """What ``sequential`` gives."""
    found = {name: jnp.asarray(x) for name, x in tensors(dtype).items()}
    blocks = [
        {name: found[f"layers.{k}.{name}.weight"].T for name in SHAPES} for k in range(LAYERS)
    ]
    states = [found["embed.weight"][x] for x in TOKENS]
    return jp.oneshot.sequential(block, blocks, states, prune, **options)


def stream(source, target, prune=None, **options):
    options = {"embed": EMBED, "batches": TOKENS, "progress": False} | options
    return jp.oneshot.stream(source, target, block, NAMES, prune=prune, **options)


def content(folder):
    """Name -> bytes of the files of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}
