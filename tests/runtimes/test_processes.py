"""Two processes on one machine: arrays that are spread over both are gathered, one writes."""

import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.helpers.processes import environment

PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
folder, port, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxprune as jp
from tests.runtimes import test_processes as here
from jaxprune.artefacts import files, host

mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))

def spread(array, *spec):
    place = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(array.shape, place, lambda i: array[i])

rng = np.random.default_rng(0)
for dtype in ("float32", "bfloat16", "int8", "bool", "complex64", "float8_e4m3fn"):
    array = rng.normal(size=(8, 4)).astype(jnp.dtype(dtype))
    for spec in [("m",), (None, "m"), ()]:
        whole = spread(array, *spec)
        assert not whole.is_fully_addressable
        assert host.to_host(whole).tobytes() == array.tobytes(), (dtype, spec)
words = rng.integers(0, 2**32, size=(4, 2), dtype=np.uint32)
keys = jax.jit(jax.random.wrap_key_data)(spread(words, "m"))
assert (host.to_host(keys) == words).all() and not keys.is_fully_addressable

small = here.compacted()
params = {"up": spread(np.asarray(small.params["up"]), None, "m"),
          "down": spread(np.asarray(small.params["down"]), "m")}
jp.save(dataclasses.replace(small, params=params), folder)
again = jp.load(folder, here.fn, here.PARAMS, here.X)  # also where another process has written
for name, leaf in small.params.items():
    np.testing.assert_array_equal(again.params[name], leaf)
jp.export(dataclasses.replace(small, params=params), folder, here.X)
model = jp.load_exported(folder)
expected = small.fn(small.params, here.X)
np.testing.assert_allclose(model.fn(model.params, here.X), expected, rtol=1e-6)

# An error of the one that writes is an error of all, and none waits for ever.
try:
    files.write(f"{folder}/model.safetensors", "x", {}, {})
except OSError as error:
    expected = "File exists" if number == 0 else "writing .* failed in another process"
    import re
    assert re.search(expected, str(error)), error
else:
    raise AssertionError("nothing was raised")
print("done")
"""

X = np.ones((2, 3), np.float32)
PARAMS = {
    "up": np.arange(24, dtype=np.float32).reshape(3, 8) / 24,
    "down": np.arange(16, dtype=np.float32).reshape(8, 2) / 16,
}


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def compacted():
    masks = jp.infer_structure(fn, PARAMS, X).masks({"up:1": np.arange(8) % 2 == 0})
    return jp.compact(fn, PARAMS, masks, X)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def test_two_processes_save_one_model(tmp_path):
    port = free_port()
    env = {**environment(2), "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model"), port]
    both = [
        subprocess.Popen(
            [*command, str(i)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    try:
        for process in both:
            out, errors = process.communicate(timeout=240)
            assert process.returncode == 0 and "done" in out, errors[-2000:]
    finally:
        for process in both:
            process.kill()
    assert sorted(os.listdir(tmp_path / "model")) == ["exported.safetensors", "model.safetensors"]
    again = jp.load(tmp_path / "model", fn, PARAMS, X)
    np.testing.assert_array_equal(again.params["up"], PARAMS["up"][:, ::2])
