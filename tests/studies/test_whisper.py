"""Whisper: its file, its parts against slow ways, known transcripts, and the study's counting."""

import jax
import numpy as np
import pytest
from scipy import special

import jaxprune as jp
from benchmarks.common import sounds
from benchmarks.models import whisper, whisper_package

WIDTH, HIDDEN, POSITIONS, WORDS = 12, 20, 8, 50400
KNOWN = ("activated", "agent-pass", "conf-muted", "queue-thankyou", "tt-weasels", "vm-goodbye")


# ---- a small network under the file's names ------------------------------------------------------


def arrays(layers=2, heads=2, seed=0, positions=32):
    inner, rng = heads * whisper.HEAD, np.random.default_rng(seed)
    shapes = {
        "encoder/conv1/weight": (WIDTH, whisper.MELS, 3),
        "encoder/conv1/bias": (WIDTH,),
        "encoder/conv2/weight": (WIDTH, WIDTH, 3),
        "encoder/conv2/bias": (WIDTH,),
        "encoder/position_encodings/encodings": (POSITIONS, WIDTH),
        "decoder/position_encodings/encodings": (positions, WIDTH),
        "decoder/embeddings/weight": (WORDS, WIDTH),
    }
    linear = {
        "self_attention": ((3 * inner, WIDTH), (WIDTH, inner)),
        "attention": ((inner, WIDTH), (2 * inner, WIDTH), (WIDTH, inner)),
        "ffn": ((HIDDEN, WIDTH), (WIDTH, HIDDEN)),
    }
    norms = [f"{side}/layer_norm" for side in ("encoder", "decoder")]
    for side, parts in (("encoder", ("self_attention", "ffn")), ("decoder", tuple(linear))):
        for at in (f"{side}/layer_{k}/{part}" for k in range(layers) for part in parts):
            norms.append(f"{at}/layer_norm")
            for k, shape in enumerate(linear[at.rpartition("/")[2]]):
                shapes |= {f"{at}/linear_{k}/weight": shape, f"{at}/linear_{k}/bias": shape[:1]}
    shapes |= {f"{at}/{name}": (WIDTH,) for at in norms for name in ("gamma", "beta")}
    found = {k: rng.normal(size=s) / np.sqrt(np.prod(s[1:]) or 1) for k, s in shapes.items()}
    found["decoder/embeddings/weight"] *= 3
    for name, bias in found.items():  # keys have no bias
        if name.endswith("self_attention/linear_0/bias"):
            bias[inner : 2 * inner] = 0
        if name.endswith("/attention/linear_1/bias"):
            bias[:inner] = 0
    return {name: a.astype(np.float32) for name, a in found.items()}


def params_and_mel():
    mel = np.random.default_rng(1).normal(size=(2, 2 * POSITIONS, whisper.MELS))
    return whisper_package.from_arrays(arrays()), mel.astype(np.float32)


# ---- the slow way: one example, one head, one row at a time, in float64 --------------------------


def dense(a, at, x):
    return x @ a[f"{at}/weight"].T.astype(float) + a[f"{at}/bias"]


def norm(a, at, x):
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return z * a[f"{at}/gamma"] + a[f"{at}/beta"]


def gelu(x):
    return x * special.ndtr(x)


def attention(q, k, v, causal):
    out = np.zeros_like(q)
    for h in range(0, q.shape[1], 64):
        part = slice(h, h + 64)
        for row in range(len(q)):
            keys = k[: row + 1, part] if causal else k[:, part]
            weights = special.softmax(keys @ q[row, part] / 8)
            out[row, part] = weights @ v[: len(keys), part]
    return out


def ffn(a, at, x):
    hidden = gelu(dense(a, f"{at}/linear_0", norm(a, f"{at}/layer_norm", x)))
    return x + dense(a, f"{at}/linear_1", hidden)


def own(a, at, x, causal):
    q, k, v = np.split(dense(a, f"{at}/linear_0", norm(a, f"{at}/layer_norm", x)), 3, -1)
    return x + dense(a, f"{at}/linear_1", attention(q, k, v, causal))


def encoder_oracle(a, mel, layers=2):
    x = mel.astype(float)
    for name, stride in (("conv1", 1), ("conv2", 2)):
        padded = np.pad(x, ((1, 1), (0, 0)))
        rows = [padded[t : t + 3] for t in range(0, len(x), stride)]
        w = a[f"encoder/{name}/weight"].astype(float)
        x = gelu(
            np.stack([np.einsum("oiw,wi->o", w, row) for row in rows]) + a[f"encoder/{name}/bias"]
        )
    x = x + a["encoder/position_encodings/encodings"]
    for k in range(layers):
        at = f"encoder/layer_{k}"
        x = ffn(a, f"{at}/ffn", own(a, f"{at}/self_attention", x, causal=False))
    return norm(a, "encoder/layer_norm", x)


def decoder_oracle(a, states, tokens, layers=2):
    x = (
        a["decoder/embeddings/weight"][tokens]
        + a["decoder/position_encodings/encodings"][: len(tokens)]
    )
    for k in range(layers):
        at = f"decoder/layer_{k}"
        x = own(a, f"{at}/self_attention", x, causal=True)
        at_cross = f"{at}/attention"
        q = dense(a, f"{at_cross}/linear_0", norm(a, f"{at_cross}/layer_norm", x))
        key, value = np.split(dense(a, f"{at_cross}/linear_1", states), 2, -1)
        x = x + dense(a, f"{at_cross}/linear_2", attention(q, key, value, causal=False))
        x = ffn(a, f"{at}/ffn", x)
    return norm(a, "decoder/layer_norm", x) @ a["decoder/embeddings/weight"].T.astype(float)


# ---- the file ------------------------------------------------------------------------------------


def test_a_file_gives_back_its_arrays(tmp_path):
    held = {"a/weight": np.arange(6, dtype="f2").reshape(2, 3), "b": np.float32([1.5]),
            "c": np.array(3, "i1"), "d": np.arange(4, dtype="i4")}  # fmt: skip
    (tmp_path / "model.bin").write_bytes(whisper_package.written(held))
    found = whisper_package.read(tmp_path / "model.bin")
    assert list(found) == list(held)
    for name, a in held.items():
        assert found[name].dtype == a.dtype
        np.testing.assert_array_equal(found[name], a)


def test_another_models_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(whisper_package.written({}, "TransformerSpec"))
    with pytest.raises(ValueError, match="holds a 'TransformerSpec'; wanted 'WhisperSpec'"):
        whisper_package.read(tmp_path / "model.bin")


def test_a_bias_of_keys_is_refused():
    odd = arrays()
    odd["encoder/layer_0/self_attention/linear_0/bias"][:] = 1
    with pytest.raises(ValueError, match="encoder/layer_0/self_attention has a bias of keys"):
        whisper_package.from_arrays(odd)


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [POSITIONS // 2, 300])
def test_encoder_and_decoder_are_those_of_the_slow_way(queries, monkeypatch):
    monkeypatch.setattr(whisper, "QUERIES", queries)
    params, mel = params_and_mel()
    states = np.asarray(jax.jit(whisper.encode)(params, mel))
    tokens = np.array([[50257, 50362, 3, 4, 5], [50257, 50362, 9, 8, 7]])
    found = np.asarray(jax.jit(whisper.logits)(params, states, tokens))
    for k in range(2):
        want = encoder_oracle(arrays(), mel[k])
        np.testing.assert_allclose(states[k], want, atol=2e-5)
        written = decoder_oracle(arrays(), want, tokens[k])
        np.testing.assert_allclose(found[k], written, atol=2e-4 * np.abs(written).max())


def test_greedy_decoding_is_the_argmax_of_whole_transcripts():
    params, mel = params_and_mel()
    states = jax.jit(whisper.encode)(params, mel)
    logits = jax.jit(whisper.logits)
    first = np.asarray(logits(params, states, np.tile(whisper.PROMPT, (2, 1))))[:, -1].argmax(-1)
    never, not_first = [int(first[0])], [int(first[1])]
    greedy = whisper.Greedy(never, not_first, limit=6)
    found = np.asarray(jax.jit(greedy)(params, states))
    for k in range(2):
        tokens = list(whisper.PROMPT)
        for step in range(6):
            row = np.array(logits(params, states[k : k + 1], np.array([tokens])))[0, -1]
            row[never + not_first * (step == 0)] = -np.inf
            ended = tokens[-1] == whisper.END
            tokens.append(whisper.END if ended else int(row.argmax()))
        assert found[k].tolist() == tokens[2:]
    whole = whisper.Greedy(never, not_first, limit=6, whole=True)
    np.testing.assert_array_equal(jax.jit(whole)(params, states), found)


def test_a_transcript_ends_and_stays_ended():
    params, mel = params_and_mel()
    # A token that is likeliest after each other: rows of the embedding that agree with all states.
    states = jax.jit(whisper.encode)(params, mel)
    greedy = whisper.Greedy([k for k in range(WORDS) if k != whisper.END], limit=4)
    found = np.asarray(jax.jit(greedy)(params, states))
    assert (found == whisper.END).all()


def test_compacting_the_whole_program_keeps_its_tokens(monkeypatch):
    monkeypatch.setattr(whisper, "QUERIES", POSITIONS // 2)
    params, mel = params_and_mel()
    fn = whisper.Greedy(limit=5).transcribe
    structure = jp.infer_structure(fn, params, mel)
    hidden = [name for name in structure.dims if name.endswith("mlp/up/kernel:1")]
    heads = [n for n, d in structure.dims.items() if d.size == 2 and "blocks" in n]
    assert len(hidden) == 4 and len(heads) >= 6
    keep = {n: np.arange(HIDDEN) % 3 > 0 for n in hidden} | {
        n: np.array([True, False]) for n in heads
    }
    masks = structure.masks(keep)
    small = jp.compact(fn, params, masks, mel)
    assert small.certificate.exact
    np.testing.assert_array_equal(
        jax.jit(small.fn)(small.params, mel), jax.jit(fn)(jp.apply_masks(params, masks), mel)
    )


# ---- sound ---------------------------------------------------------------------------------------


def test_log_mel_is_that_of_the_slow_way():
    rng = np.random.default_rng(0)
    audio = (rng.normal(size=16_000) * np.linspace(0.01, 0.2, 16_000)).astype(np.float32)
    found = whisper.log_mel(audio)
    assert found.shape == (3000, whisper.MELS)
    padded = np.pad(np.pad(audio.astype(float), (0, 29 * 16_000)), 200, mode="reflect")
    n = np.arange(400)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(201), n) / 400)
    window = np.sin(np.pi * n / 400) ** 2
    frames = [0, 1, 57, 99, 2999]
    power = np.stack([np.abs(waves @ (window * padded[160 * t :][:400])) ** 2 for t in frames])
    logs = np.log10(np.maximum(power @ whisper.mel_filters(), 1e-10))
    top = 4 * found.max() - 4
    np.testing.assert_allclose(found[frames], (np.maximum(logs, top - 8) + 4) / 4, atol=1e-4)


def test_bands_have_equal_areas_and_slaneys_corners():
    filters = whisper.mel_filters()
    hertz = np.arange(201) * 40.0
    assert filters.shape == (201, 80) and (filters >= 0).all()
    peaks = hertz[filters.argmax(0)]
    assert (np.diff(peaks) >= 0).all() and peaks[-1] > 7000
    wide = filters[:, 60:].sum(0) * 40  # of many bins: the sum is near the integral
    np.testing.assert_allclose(wide, 1, atol=0.03)


def test_too_much_sound_is_refused():
    with pytest.raises(ValueError, match=r"sound of shape \(480001,\); wanted at most 480,000"):
        whisper.log_mel(np.zeros(480_001, np.float32))


# ---- facts ---------------------------------------------------------------------------------------


def installed():
    try:
        whisper_package.folder(), sounds.transcripts()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def recognizer():
    installed()
    pytest.importorskip("tokenizers")
    greedy = whisper.Greedy(*whisper_package.rules(), limit=40)
    return whisper_package.load(), whisper_package.tokenizer(), jax.jit(greedy.transcribe)


def heard(recognizer, audio):
    params, tokenizer, fn = recognizer
    return whisper.text(tokenizer, np.asarray(fn(params, whisper.log_mel(audio)[None]))[0])


def words(text):
    return "".join(c for c in text.lower() if c.isalnum() or c == " ").split()


@pytest.mark.slow
def test_prompts_are_transcribed(recognizer):
    texts = sounds.transcripts()
    known = [name for name in KNOWN if name in texts]
    assert len(known) >= 4
    for name in known:
        got = heard(recognizer, sounds.read(sounds.SOUNDS / f"{name}.wav"))
        assert words(got) == words(texts[name]), name


@pytest.mark.slow
def test_texts_are_those_of_an_independent_runtime(recognizer):
    """faster-whisper on the same files, word for word; in an environment that has both."""
    runtime = pytest.importorskip("faster_whisper", reason="pip install faster-whisper==1.2.1")
    model = runtime.WhisperModel(str(whisper_package.folder()), compute_type="float32")
    names = sorted(name for name, said in sounds.transcripts().items() if len(said.split()) >= 3)
    for name in names[::29]:
        audio = sounds.read(sounds.SOUNDS / f"{name}.wav")
        padded = np.pad(audio, (0, whisper.RATE * whisper.SECONDS - len(audio)))
        parts, _ = model.transcribe(
            padded, language="en", beam_size=1, temperature=0.0, without_timestamps=True,
            condition_on_previous_text=False, compression_ratio_threshold=None,
            log_prob_threshold=None, no_speech_threshold=None, vad_filter=False,
        )  # fmt: skip
        assert heard(recognizer, audio) == " ".join(part.text.strip() for part in parts), name
