"""What one device gives: on meshes with Auto and with Explicit axes, and in two processes."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import sharding
from tests.helpers.processes import environment
from tests.runtimes import mesh_calls

IN_TWO = (  # of each kind of call one that takes little time
    "pattern (global|per_output|n_m)|prune, jit|rigl, jit|structured mlp|"
    "compact mlp (wide|odd)|calibrate|oneshot .*|search|density.*"
)
Told = dict[tuple[str, str], str]  # (kind of mesh, row) -> how it differs


def start(devices: int, *args: str) -> subprocess.Popen[str]:
    env = {**environment(devices), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command, pipe = [sys.executable, "-m", mesh_calls.__name__, *args], subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def told(program: subprocess.Popen[str]) -> Told:
    try:
        out, err = program.communicate(timeout=1800)
    finally:
        program.kill()
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
    assert lines and program.returncode == 0, out + err[-2000:]
    return {(kind, row): found for kind, row, found in lines}


def test_a_mesh_gives_what_one_device_gives() -> None:
    """One test of one program: each call on one device is what both kinds are compared with."""
    found = told(start(8, ".*", "Auto,Explicit"))
    assert found.keys() == set(itertools.product(("Auto", "Explicit"), mesh_calls.ROWS))
    assert {row: how for row, how in found.items() if how} == {}


def test_two_processes_give_what_one_device_gives() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [start(4, IN_TWO, "Auto", process, port) for process in ("0", "1")]
    for found in map(told, both):
        assert len(found) == 13
        assert {row: how for row, how in found.items() if how} == {}


MESH = AbstractMesh((2, 4), ("data", "model"))


def heads(p, x):
    h = (x @ p["w"]).reshape(-1, 8, 6)
    return jax.nn.relu(h).reshape(-1, 48) @ p["o"]


def on(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*spec)))


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ((None, "model"), {"heads": 2, "dim": 1}),  # 4 divides 2 heads of 6
        ((None, "data"), {"heads": 1, "dim": 1}),
        (("model", None), {"heads": 1, "dim": 1}),
        ((None, ("data", "model")), {"heads": 4, "dim": 1}),
    ],
)
def test_round_to_a_mesh_keeps_what_it_divides(spec, steps) -> None:
    params = {"w": on((16, 48), *spec), "o": on((48, 4))}
    structure = jp.infer_structure(heads, params, on((3, 16)))
    scores = jax.tree.map(lambda w: jnp.arange(1.0, 1 + w.size).reshape(w.shape), params)
    names = dict(zip(("heads", "dim"), (n for n, d in structure.dims.items() if not d.frozen)))
    for sparsity in (0.1, 0.4, 0.6, 0.9):
        wanted = {
            k: jp.structured(structure, dims=[n], round_to=steps[k])(scores, sparsity)
            for k, n in names.items()
        }
        for k, n in names.items():
            found = jp.structured(structure, dims=[n], round_to=MESH)(scores, sparsity)
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted[k])))


def test_round_to_a_mesh_for_params_on_none_is_its_size() -> None:
    params = {"u": jnp.ones((4, 32)), "d": jnp.ones((32, 4))}
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["d"]  # noqa: E731
    structure = jp.infer_structure(fn, params, jnp.ones((1, 4)))
    masks = jp.structured(structure, round_to=MESH)(params, 0.4)
    assert int(masks["u"].sum()) == 16


def test_what_fits_a_mesh() -> None:
    named = NamedSharding(MESH, P("data", "model"))
    assert sharding.fitting(named, (6, 12)).spec == P("data", "model")
    assert sharding.fitting(named, (6, 10)).spec == P("data", None)
    assert sharding.fitting(named, (5, 12)).spec == P(None, "model")
    assert sharding.fitting(NamedSharding(MESH, P("data")), (6, 10)).spec == P("data")
    assert sharding.alongside(named, (6, 12), (12,)).spec == P("model")
    assert sharding.alongside(named, (6, 12), (1, 12)).spec == P(None, "model")
    assert sharding.parts(named, 3) == [("data", 2), ("model", 4), (None, 1)]
