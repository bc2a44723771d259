"""Names of weights that stay in float: paths of leaves and layers, and what is told of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.runtimes import Options, Runtime, keeping
from jaxprune.runtimes._runtime import frozen_for
from jaxprune.typing import path_str
from tests.helpers import engines

P = {"a": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "ab": jnp.ones((3, 2)), "n": jnp.arange(4)}
PATHS = ["a/b", "a/w", "ab"]
X = jnp.ones((1, 2))


def net(p, x):
    return (x @ p["a"]["w"] + p["a"]["b"]) @ p["ab"]


@given(st.lists(st.sampled_from([*PATHS, "a"]), min_size=1, max_size=4))
def test_leaves_of_the_names_change_and_no_others(names):
    """The oracle looks at each path alone; "a" is all that lies in it, and not "ab"."""
    new = jax.tree_util.tree_leaves_with_path(keeping.changed(P, names))
    for (path, got), old in zip(new, jax.tree.leaves(P)):
        within = "a" in names and path_str(path).startswith("a/")
        assert bool(np.all(np.asarray(got) != old)) == (within or path_str(path) in names)


@pytest.mark.parametrize("name", ["nope", "a/", "b", "n", ""])
def test_a_name_of_no_weight(name):
    match = f"keep_float names '{name}', which is no floating weight .* 'a/b', 'a/w', 'ab'. Pass"
    with pytest.raises(ValueError, match=match):
        keeping.changed(P, ("ab", name))


def test_many_weights_are_cut_short_in_the_message():
    with pytest.raises(ValueError, match=r"there are 'w00', .*'w11' \.\.\.\. Pass such paths"):
        keeping.changed({f"w{i:02}": jnp.ones(2) for i in range(20)}, ("x",))
    with pytest.raises(ValueError, match=r"there are none\. Pass such paths"):
        keeping.changed({"n": jnp.arange(2)}, ("x",))


def runtime(*names):
    return Runtime(engines.ENGINE, Options("dynamic", None, None, names))


def test_a_twin_differs_in_what_is_made_of_the_names():
    """Folded, transposed and concatenated, too: the oracle is the program of other weights."""

    def fn(p, x):
        both = jnp.concatenate([p["a"]["w"].T * p["a"]["b"][:, None], p["ab"]])
        return x @ both.T

    frozen = frozen_for(runtime("ab"), fn, (P, X))
    assert frozen.twin.other is None and frozen.twin.args == frozen.args
    wanted = fn(P | {"ab": keeping.FACTOR * P["ab"]}, X)
    np.testing.assert_allclose(frozen.twin(X), wanted, rtol=1e-6)
    np.testing.assert_allclose(frozen(X), fn(P, X), rtol=1e-6)
    assert frozen_for(runtime(), fn, (P, X)).twin is None


def test_a_compact_model_names_its_own_params():
    small = jp.compact(net, P, jp.infer_structure(net, P, X).masks({}), X)
    twin = frozen_for(runtime("a/w"), small, (X,)).twin
    changed = P | {"a": P["a"] | {"w": keeping.FACTOR * P["a"]["w"]}}
    np.testing.assert_allclose(twin(X), net(changed, X), rtol=1e-6)


def test_a_function_that_holds_no_weights():
    with pytest.raises(ValueError, match=r"leaves ab in float, and this function holds no weights"):
        frozen_for(runtime("ab"), lambda x: x * 2, (X,))


def test_constants_that_differ():
    mine = {"u": np.ones(2), "v": np.zeros(2)}
    assert keeping.differing(mine, mine | {"u": 2 * np.ones(2)}, ("w",)) == {"u"}
    with pytest.raises(ValueError, match="no constant of the file is made of w, z: the function"):
        keeping.differing(mine, dict(mine), ("w", "z"))
    with pytest.raises(ValueError, match="the file holds other constants when w change"):
        keeping.differing(mine, {"u": np.ones(2)}, ("w",))


def test_names_are_options():
    with pytest.raises(ValueError, match=r"keep_float=\('w',\)\) quantises nothing, .* pass quan"):
        jp.runtimes.onnx(keep_float="w")
    one = jp.runtimes.litert(quantize="dynamic", keep_float="w", threads=1)
    assert one.options.keep_float == ("w",) and one.name == "litert int8 dynamic but w threads=1"
    assert jp.runtimes.openvino(
        quantize="static", calibration=[(X,)], keep_float=["v", "w"]
    ).name.endswith("static but v,w")
