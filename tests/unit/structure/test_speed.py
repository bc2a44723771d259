"""Finding the structure takes time linear in the equations and no memory for parameters.

Time is measured in calls of functions, which are the same on every machine.
"""

import cProfile
import gc
import importlib.metadata
import pstats
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from benchmarks.studies.structure import networks as structure_speed_models
from benchmarks.studies.structure import structure as structure_speed
from jaxprune.structure import infer


def calls_after_tracing(layers):
    fn, *args = structure_speed_models.of_transformer(layers)
    jp.infer_structure(fn, *args)  # fills JAX's caches
    profile = cProfile.Profile()
    profile.runcall(jp.infer_structure, fn, *args)
    return pstats.Stats(profile).total_calls


@pytest.mark.slow
def test_calls_grow_linearly_with_the_layers():
    few, more, most = map(calls_after_tracing, (4, 8, 16))
    assert (most - more) / (more - few) == pytest.approx(2, rel=0.02)
    # For 1,800 equations, 144 of which are asked again. Looking up source lines would add 60,000.
    assert most < 260_000


def test_parameters_that_no_memory_holds():
    wide = jax.ShapeDtypeStruct((10**6, 10**7), jnp.float32)  # 40 terabytes
    before = len(jax.live_arrays())
    structure = jp.infer_structure(
        lambda p, x: jnp.tanh(x @ p["up"]) @ p["up"].T, {"up": wide}, jnp.zeros((1, 10**6))
    )
    assert structure.dims["up:1"].size == 10**7 and structure.dims["up:1"].frozen is None
    assert len(jax.live_arrays()) == before


def test_garbage_is_collected_again_afterwards():

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), infer.collecting_later():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()


# ------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_689_512), ("vit_small", 22_050_664)])
def test_networks_have_as_many_parameters_as_in_pytorch(name, count):
    _, variables, _ = structure_speed_models.of_flax(structure_speed_models.NETWORKS[name]())
    leaves = jax.tree.leaves(variables["params"])
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count


FAKE = """
import json, sys
print(json.dumps({"torch": "0"}), flush=True)
for line in sys.stdin:
    times = {"tracing": 1.0, "after_tracing": 3.0, "whole": 4.0}
    print(json.dumps(times | {"groups": 2, "parameters": len(line)}), flush=True)
"""


@pytest.mark.slow
def test_the_job_writes_both_sides(tmp_path, monkeypatch, capsys):
    side = tmp_path / "side.py"
    side.write_text(FAKE)
    monkeypatch.setattr(structure_speed, "TORCH_SIDE", side)
    small = structure_speed_models.of_transformer(1)
    monkeypatch.setattr(structure_speed, "NETWORKS", {"small": lambda: None})
    monkeypatch.setattr(structure_speed, "of_flax", lambda module: small)
    options = ["--rounds", "2", "--layers", "1", "--torch-python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["structure_speed", *options, "--results", str(tmp_path)])
    structure_speed.main()
    found = structure_speed.results.load(next(tmp_path.glob("*/structure_speed.json")))
    assert found["versions"]["jax"] == importlib.metadata.version("jax")
    row = found["beside_torch_pruning"]["networks"]["small"]
    for mine, ratio in zip(
        row["infer_structure"]["whole"]["samples"], row["theirs_over_ours"]["whole"]["samples"]
    ):
        assert ratio == pytest.approx(4 / mine)
    assert found["layers"]["1"]["equations"] > 100
    assert "small, after tracing" in capsys.readouterr().out
