"""Loaders by name: the tensors that Hugging Face writes are the blocks that stream."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from benchmarks.models import checkpoints, smollm2
from benchmarks.studies.oneshot import large, streaming

WIDTH, HIDDEN, WORDS = 12, 24, 30
INNER, GROUPS = 4 * smollm2.HEAD, 2 * smollm2.HEAD


def llama(layers=2):
    rng = np.random.default_rng(0)
    shapes = {
        "q": (WIDTH, INNER), "k": (WIDTH, GROUPS), "v": (WIDTH, GROUPS), "o": (INNER, WIDTH),
        "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH),
        "attention_norm": (WIDTH,), "mlp_norm": (WIDTH,),
    }  # fmt: skip
    draw = lambda s: jnp.asarray(rng.normal(size=s) / 4, jnp.float32)  # noqa: E731
    return {
        "embedding": draw((WORDS, WIDTH)), "norm": draw((WIDTH,)),
        "blocks": [{n: draw(s) for n, s in shapes.items()} for _ in range(layers)],
    }  # fmt: skip


def test_a_llama_is_written_and_read_by_name(tmp_path):
    params = llama()
    checkpoints.save_llama(params, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = jp.oneshot.Checkpoint(tmp_path)
    found = checkpoint.load(checkpoints.LLAMA_OTHERS)
    found |= {"blocks": [checkpoint.load(each) for each in checkpoints.llama_names(2)]}
    jax.tree.map(np.testing.assert_array_equal, found, params)
    x = checkpoints.llama_embed(params, jnp.arange(10).reshape(2, 5))
    block = checkpoints.llama_block(smollm2.HEAD, smollm2.THETA, smollm2.EPSILON)
    want = smollm2.block(params["blocks"][0], x)
    np.testing.assert_allclose(block(params["blocks"][0], x), want, rtol=1e-5, atol=1e-5)


def test_units_of_all_blocks_by_one_plan(tmp_path, monkeypatch):
    checkpoints.save_llama(llama(), tmp_path)
    names = checkpoints.llama_names(2)
    masks = streaming.planned(tmp_path, names, [np.arange(10).reshape(2, 5)])
    kept = sum(int(m["gate"].sum()) for m in masks)
    assert kept == 2 * HIDDEN * 3 / 4


def test_a_gpt_block_normalises_and_attends():
    rng, heads, size = np.random.default_rng(0), 2, 4
    d = heads * size
    shapes = {"qkv": (d, 3 * d), "o": (d, d), "up": (d, 16), "down": (16, d)}
    p = {f"{n}_weight": rng.normal(size=s) / 3 for n, s in shapes.items()}
    p |= {f"{n}_bias": rng.normal(size=s[1]) for n, s in shapes.items()}
    for n in ("attention_norm", "mlp_norm"):
        p |= {f"{n}_weight": np.ones(d), f"{n}_bias": np.zeros(d)}
    assert p.keys() == checkpoints.gpt_names(1)[0].keys()
    x = checkpoints.gpt_embed(
        {"tokens": rng.normal(size=(9, d)), "positions": rng.normal(size=(6, d))},
        jnp.arange(8).reshape(2, 4),
    )
    got = checkpoints.gpt_block(size)(jax.tree.map(jnp.float32, p), x)
    np.testing.assert_allclose(got[0], gpt_oracle(p, np.asarray(x[0], float), heads), atol=2e-3)


def gpt_oracle(p, x, heads):
    """One text, head by head."""

    def norm(x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)

    qkv = norm(x) @ p["qkv_weight"] + p["qkv_bias"]
    q, k, v = (np.split(a, heads, 1) for a in np.split(qkv, 3, 1))
    mixed = []
    for h in range(heads):
        a = q[h] @ k[h].T / np.sqrt(q[h].shape[1])
        a = np.exp(np.where(np.tril(np.ones_like(a)) > 0, a, -np.inf))
        mixed.append(a / a.sum(1, keepdims=True) @ v[h])
    x = x + np.concatenate(mixed, 1) @ p["o_weight"] + p["o_bias"]
    h = norm(x) @ p["up_weight"] + p["up_bias"]
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + h @ p["down_weight"] + p["down_bias"]


def test_a_large_checkpoint_is_cut_and_equals_the_masked_one(tmp_path):
    sizes = {"width": 256, "hidden": 32, "heads": 2, "layers": 2, "words": 40}
    large.make(tmp_path / "source", sizes)
    for method in ("magnitude", "activations"):
        found = large.row(tmp_path / "source", tmp_path / method, 2, 40, method)
        assert found["relative_error_of_two_blocks"] < 1e-5
        assert found["widths"]["gate"] == (256, 24)
