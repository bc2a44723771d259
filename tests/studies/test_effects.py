"""The job on known effects: its runs on tiny networks, its rule on made-up numbers."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.common import data, results
from benchmarks.studies.effects import claims as effects_claims
from benchmarks.studies.effects import effects
from benchmarks.studies.effects import training as effects_training
from benchmarks.studies.effects.claims import ABOVE, NOTHING, Claim

plt = pytest.importorskip("matplotlib.pyplot")
TINY = dataclasses.replace(effects_training.QUICK, epochs=2, flow_rounds=20)


@pytest.fixture(scope="module")
def images():
    return effects_training.on_device(data.load("digits"), TINY, 500)  # as --quick: compiled once


@pytest.fixture(scope="module")
def trainer(images):
    return effects_training.Trainer(TINY, images, "perceptron", 0, 0.1)


def densities(masks):
    return [float(np.mean(m)) for m in jax.tree.leaves(masks) if np.ndim(m)]


# -- runs


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``--quick``, run twice: (folder, output of both)."""
    folder, printed = tmp_path_factory.mktemp("results"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["effects", "--quick", "--results", str(folder)])
        patch.setattr(effects, "QUICK", TINY)
        patch.setattr("builtins.print", lambda *line, **_: printed.append(" ".join(map(str, line))))
        effects.main()
        first = len(printed)
        effects.main()
    return results.folder(folder), printed[:first], printed[first:]


def test_the_quick_command_writes_every_run_each_claim_and_a_picture(command):
    folder, _, _ = command
    found = json.loads((folder / "effects-quick.json").read_text())
    accuracy = found["networks"]["perceptron"]["accuracy"]
    assert all(set(runs) == {"0", "1"} for runs in accuracy.values())
    assert {f"gradual, magnitude {s}" for s in (0.9, 0.95, 0.98)} <= set(accuracy)
    assert {"dense 0", "ticket 0.5", "ticket 0.75", "ticket, re-initialised 0.75"} <= set(accuracy)
    told = {row["effect"] for row in found["effects"]}
    assert told == {"schedule", "tickets", "before", "shuffled", "collapse"}
    assert found["rule"] == effects_claims.RULE
    assert (folder / "effects-quick_perceptron.png").stat().st_size > 10_000


def test_what_was_done_is_not_done_again(command):
    _, first, second = command
    trained = [line for line in first if line.startswith("seed ")]
    assert len(trained) == 2 * (3 * 4 + 5)
    assert not [line for line in second if line.startswith("seed ")]
    assert first[-2:] == second[-2:]  # the table and the files


def test_synflow_keeps_layers_alive_where_snip_collapses(images):
    lost = {
        method: effects_training.collapse(method, 0.995, TINY, images, 0)
        for method in ("SNIP", "SynFlow")
    }
    assert lost["SynFlow"]["collapsed"] == 0 < lost["SNIP"]["collapsed"]
    assert min(lost["SynFlow"]["active_per_layer"]) >= 1
    kept = sum(lost["SynFlow"]["kept_per_layer"])
    assert kept == sum(lost["SNIP"]["kept_per_layer"])  # the same total


@pytest.mark.parametrize("method", ["gradual, magnitude", "one-shot, magnitude"])
def test_scheduled_methods_end_at_the_sparsity_on_the_same_layers(trainer, method):
    run = trainer.train(method, 0.9)
    wanted = effects_training.ERK(jp.magnitude(trainer.params()), 0.9)
    masks = run.opt_state.masks
    np.testing.assert_allclose(densities(masks), densities(wanted), atol=0.01)
    assert 0.09 < float(jp.density(run.params, masks)) < 0.11
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(run.params)):
        assert not np.any(np.where(mask, 0, leaf))


def test_fixed_masks_stay_and_their_kept_weights_begin_where_asked(trainer):
    masks = trainer.masks("random, uniform", 0.5)
    run = trainer.train_masked(masks)
    jax.tree.map(np.testing.assert_array_equal, run.opt_state.masks, masks)
    again = trainer.train_masked(masks)  # the first one donated nothing of ours
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)


def test_convolution_as_a_product_is_the_convolution():
    keys = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(keys[1], (3, 3, 2, 5))
    for side in (4, 3):
        x = jax.random.normal(keys[0], (2, side, side, 2))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        want = jax.lax.conv_general_dilated(
            padded, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        got = effects_training.convolution(x, kernel)
        np.testing.assert_allclose(got, want, atol=1e-5)


# -- the rule


@pytest.mark.parametrize(
    ("first", "says", "second", "appears"),
    [
        ([0.90, 0.91, 0.92], ABOVE, [0.80, 0.81, 0.82], True),
        ([0.80, 0.81, 0.82], ABOVE, [0.90, 0.91, 0.92], False),
        ([0.80, 0.90, 1.00], ABOVE, [0.79, 0.89, 0.99], False),  # lost in the spread
        ([0.80, 0.81, 0.82], NOTHING, [0.80, 0.81, 0.82], True),
        ([0.85, 0.86, 0.87], NOTHING, [0.80, 0.81, 0.82], True),  # a shuffle may be better
        ([0.80, 0.81, 0.82], NOTHING, [0.90, 0.91, 0.92], False),
    ],
)
def test_the_rule(first, says, second, appears):
    row = effects_claims.judge(Claim("schedule", "a", says, "b", 0.9), first, second)
    assert row["appears"] is appears
    n = len(first)
    error = np.sqrt(np.var(first, ddof=1) / n + np.var(second, ddof=1) / n)
    np.testing.assert_allclose(row["standard_error"], error)
    np.testing.assert_allclose(row["difference"], np.mean(first) - np.mean(second))


@pytest.mark.parametrize(
    ("snip", "flow", "appears"),
    [([9, 9], [0, 0], True), ([9, 0], [0, 0], False), ([9, 9], [0, 9], False)],
)
def test_collapse_must_happen_in_all_seeds(snip, flow, appears):
    found = {
        f"{method} 0.999": {str(i): {"collapsed": n} for i, n in enumerate(lost)}
        for method, lost in (("SNIP", snip), ("SynFlow", flow))
    }
    (row,) = effects_claims.judged({"networks": {}, "collapse": found, "settings": {"tickets": 2}})
    assert row["appears"] is appears


def test_what_does_not_appear_is_said():
    rows = [
        effects_claims.judge(Claim("dynamic", "rigl", ABOVE, "set", 0.95), a, [0.8, 0.81])
        | {"network": "perceptron"}
        for a in ([0.7, 0.71], [0.9, 0.91])
    ]
    lines = effects_claims.text(rows).splitlines()
    assert [line.split()[-1] for line in lines] == ["NO", "yes"]
    assert "-10.00 ± 0.71 points" in lines[0]
    assert effects_claims.markdown(rows).splitlines()[-1].endswith("| yes |")


def test_committed_results_are_judged_by_the_rule_of_this_code():
    paths = sorted(Path(results.FOLDER).glob("*/effects.json"))
    assert paths
    for path in paths:
        found = results.load(path)
        assert found["rule"] == effects_claims.RULE
        assert found["effects"] == effects_claims.judged(found)
        assert all(len(runs) >= 3 for runs in found["networks"]["perceptron"]["accuracy"].values())
