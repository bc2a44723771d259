"""The study of speech recognition: how words are counted, and its stages on a tiny network."""

import json

import numpy as np
import pytest

from benchmarks.common import results
from benchmarks.models import whisper, whisper_package
from benchmarks.studies.speech import case, prompts, report, searching, speech
from tests.studies.test_whisper import POSITIONS, arrays, installed

# ---- counting ------------------------------------------------------------------------------------


def clip(name, seconds, text="press one now"):
    return prompts.Clip(name, np.full(round(seconds * whisper.RATE), 0.1, np.float32), text)


def test_prompts_are_packed_with_pauses_and_none_is_lost():
    some = [clip(str(k), seconds, f"text {k}") for k, seconds in enumerate((20, 15, 9, 13, 30))]
    chunks = prompts.packed(some)
    assert [chunk.text for chunk in chunks] == ["text 0 text 2", "text 1 text 3", "text 4"]
    assert [len(chunk.audio) / whisper.RATE for chunk in chunks] == [30, 29, 30]
    assert not chunks[0].audio[20 * whisper.RATE : 21 * whisper.RATE].any()


def test_halves_share_no_prompt():
    some = [clip(str(k), 12, f"number {k}") for k in range(9)]
    first, second = (
        {word for chunk in half for word in chunk.text.split() if word.isdigit()}
        for half in prompts.halves(some, 0)
    )
    assert not first & second and len(first | second) == 9
    assert prompts.halves(some, 1)[0][0].text != prompts.halves(some, 0)[0][0].text


@pytest.mark.parametrize(
    ("text", "times"),
    [("", 0), ("press one", 0), ("no no", 1), ("no no no no", 3), ("a b c a b c a b c", 2),
     ("the pound key and the pound key", 0)],
)  # fmt: skip
def test_repeats(text, times):
    assert prompts.repeats(text.split()) == times


def test_errors_are_counted_after_normalization():
    pytest.importorskip("jiwer"), pytest.importorskip("whisper_normalizer")
    ended = np.array([5, whisper.END])
    assert prompts.heard("Press one, I'm here.", "press 1 I am here", ended)[:2] == (0, 5)
    one = prompts.heard("you are now muted", "you are muted muted muted", np.array([1, 2]))
    assert one == prompts.Heard(errors=2, words=4, repeated=2, unfinished=True)
    assert prompts.heard("you are now muted", "", ended).errors == 4


def test_a_difference_is_the_mean_over_splits_and_pairs_chunks():
    theirs = [[(1, 10), (5, 10), (0, 20)], [(2, 10), (2, 10)]]
    assert prompts.difference(theirs, theirs) == (0, 0, 0)
    ours = [[(3, 10), (7, 10), (4, 20)], [(2, 10), (4, 10)]]  # 20 % and 10 % more
    mean, low, high = prompts.difference(ours, theirs)
    assert mean == pytest.approx(15) and 10 <= low <= 15 <= high <= 20
    assert prompts.rate(ours[0]) == pytest.approx(35)


# ---- stages, on a tiny network -------------------------------------------------------------------


class Words:
    def decode(self, ids):
        return " ".join(f"word{k % 7}" for k in ids)


class Found:
    """A search that ends at once: times of a tiny network's loop are those of its vocabulary."""

    def __init__(self, first, repeats):
        self.dims = first.model.structure.dims

    def plan(self, case, speedup):
        hidden = [name for name in self.dims if name.endswith("mlp/up/kernel:1")]
        heads = [name for name in self.dims if "/cross/" in name and name.endswith(":1.0")]
        units = {name: list(range(10)) for name in hidden} | {name: [1] for name in heads}
        return {"units": units, "asked": speedup, "measured": 1.0, "notes": []}


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("jiwer"), pytest.importorskip("whisper_normalizer")
    rng = np.random.default_rng(0)
    params = whisper_package.from_arrays(arrays(positions=160))
    model = case.Recognizer(params, Words(), whisper.Greedy(limit=8))
    monkeypatch.setattr(case.Recognizer, "load", lambda: model)
    monkeypatch.setattr(
        prompts, "clips", lambda: [clip(str(k), 25, "word1 word2") for k in range(8)]
    )
    monkeypatch.setattr(
        whisper, "log_mel",
        lambda audio: rng.normal(size=(2 * POSITIONS, whisper.MELS)).astype(np.float32),
    )  # fmt: skip
    monkeypatch.setattr(case, "PACE", 4)
    monkeypatch.setattr(case, "STEP", 2)
    monkeypatch.setattr(searching, "Searcher", Found)
    monkeypatch.setattr(
        speech, "QUICK",
        speech.dataclasses.replace(
            speech.QUICK, splits=2, steps=4,
            rows=(
                "encoder FFN -30 %, FLAP", "an encoder layer", "50 % of weights, SparseGPT",
                "50 % of weights, SparseGPT + refit, in order",
            ),
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_all_stages_of_the_study(tiny, tmp_path, monkeypatch):
    where = ["--quick", "--results", str(tmp_path), "--weights", str(tmp_path)]
    speech.main([*where, "--stages", "rows"])
    path = results.folder(tmp_path) / "whisper-quick.json"
    first = json.loads(path.read_text())
    assert set(first["summary"]) == {"dense", *speech.QUICK.rows}
    assert first["summary"]["dense"]["mean"] == 0

    monkeypatch.setattr(speech.Job, "_row", lambda *_: pytest.fail("what is known is done again"))
    speech.main(where)
    whole = json.loads(path.read_text())
    assert whole["networks"]["0"]["dense"] == first["networks"]["0"]["dense"]
    names = {"search 1.3 x", "search 1.3 x, recovered"}
    assert names < set(whole["summary"])
    for split in "01":
        rows = whole["networks"][split]
        assert all(rows[name]["exact"] for name in names)
        assert {stage["name"] for stage in rows["search 1.3 x, recovered"]["stages"]} >= {"tuning"}
    assert set(whole["networks"]["times"]) == set(speech.PARTS)
    assert path.with_suffix(".png").stat().st_size > 5_000
    report.show(whole)


@pytest.mark.slow
def test_the_dense_model_hears_the_prompts(tmp_path):
    """A first chunk of the real data: at most a tenth of its words are wrong."""
    installed()
    for name in ("jiwer", "whisper_normalizer", "tokenizers"):
        pytest.importorskip(name)
    one = case.Case(case.Recognizer.load(), prompts.clips(), 0, 1, tmp_path)
    assert prompts.rate(one.judged(one.model.jitted, one.model.params)) < 10
