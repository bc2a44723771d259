"""What an installed wheel must do without its extras: import fast, and prune a network."""

import subprocess
import sys

OPTIONAL = {
    "chex", "equinox", "flatbuffers", "flax", "haiku", "jax2onnx", "matplotlib", "onnx",
    "onnxruntime", "openvino", "rich", "safetensors", "sklearn", "tensorflow", "tensorstore",
    "torch", "torchax",
}  # fmt: skip
TIMED = "import time, sys; b = time.perf_counter(); import {}; print(time.perf_counter() - b)"


def seconds(names, times=5):
    """The least time that importing takes in a fresh process."""
    command = [sys.executable, "-c", TIMED.format(names)]
    return min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
               for _ in range(times))  # fmt: skip


def main():
    base, ours = seconds("jax, optax"), seconds("jax, optax, jaxprune")
    print(f"import jax, optax: {base:.2f} s; and jaxprune: {ours:.2f} s ({ours / base:.2f} x)")
    before = set(sys.modules)
    import jax
    import optax  # noqa: F401

    others = set(sys.modules) - before
    import jaxprune as jp

    touched = {name.partition(".")[0] for name in set(sys.modules) - others} & OPTIONAL
    assert not touched, f"importing jaxprune imports {touched}"
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (8, 32)),
        "down": jax.random.normal(keys[1], (32, 4)),
    }

    def fn(p, x):
        return jax.nn.gelu(x @ p["up"]) @ p["down"]

    x = jax.random.normal(keys[2], (4, 8))
    structure = jp.infer_structure(fn, params, x)
    small = jp.compact(fn, params, jp.structured(structure)(jp.magnitude(params), 0.5), x)
    assert small.params["up"].shape == (8, 16) and small.certificate.check() < 1e-12
    print(jp.__version__, jp.__file__)
    print(small.certificate)


if __name__ == "__main__":
    main()
