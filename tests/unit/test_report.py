"""The table per leaf: counts against jp.density and jp.cost, what it looks like, its errors."""

import builtins
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from tests.helpers.arrays import drawn


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


X = jnp.ones((2, 8, 8, 4))
NET = Net()
VARIABLES = drawn(jax.eval_shape(NET.init, jax.random.key(0), X))
MASKS = jax.jit(lambda params: jp.unstructured()(jp.magnitude(params), 0.75))(VARIABLES)


def rows(summary):
    return {row.path: row for row in summary.rows}


def test_rows_count_entries_and_bytes():
    s = jp.summary(VARIABLES, MASKS)
    kernel = rows(s)["params/Conv_0/kernel"]
    assert (kernel.shape, kernel.dtype, kernel.size) == ((3, 3, 4, 8), "float32", 288)
    assert (kernel.kept, kernel.bytes, kernel.density) == (72, 4 * 288, 0.25)
    assert len(s.rows) == len(jax.tree.leaves(VARIABLES))
    kernels = [r for r in s.rows if r.path.endswith("kernel")]
    density = sum(r.kept for r in kernels) / sum(r.size for r in kernels)
    np.testing.assert_allclose(density, jp.density(VARIABLES, MASKS), rtol=1e-6)
    assert s.total.size == sum(x.size for x in jax.tree.leaves(VARIABLES))
    assert s.density == s.total.kept / s.total.size
    assert s.flops is None and s.others is None


def test_broadcast_masks_count_their_whole_slices():
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((4, 6)), "empty": jnp.ones((0, 3))}
    masks = {
        "w": jnp.array([[True], [False], [False], [False]]),
        "v": jnp.asarray(True),
        "empty": jnp.ones((0, 3), bool),
    }
    found = {path: row.kept for path, row in rows(jp.summary(params, masks)).items()}
    assert found == {"w": 6, "v": 24, "empty": 0}


def test_any_leaf_has_a_row():
    leaves = {"half": jnp.ones(3, jnp.bfloat16), "key": jax.random.key(0), "number": 3.0,
              "shape": jax.ShapeDtypeStruct((5, 2), jnp.float32)}  # fmt: skip
    found = rows(jp.summary(leaves))
    assert (found["half"].bytes, found["half"].dtype) == (6, "bfloat16")
    assert (found["shape"].size, found["shape"].bytes, found["shape"].kept) == (10, 40, 10)
    assert found["key"].size == found["number"].size == 1


def test_flops_belong_to_the_leaves_that_contractions_read():
    s = jp.summary(VARIABLES, MASKS, fn=NET.apply, args=(X,))
    conv, dense = 2 * (2 * 8 * 8 * 8) * 36, 2 * 2 * 8 * 10
    found = {path: row.flops for path, row in rows(s).items()}
    assert found["params/Conv_0/kernel"] == (conv, conv // 4)
    assert found["params/Dense_0/kernel"] == (dense, dense // 4)
    whole = jp.cost(NET.apply, VARIABLES, X).flops
    assert s.others == whole - conv - dense - sum(
        pair.before for path, pair in found.items() if not path.endswith("kernel")
    )
    assert s.flops == (whole, whole - (conv + dense) * 3 // 4)


def test_stacked_layers_are_one_leaf():
    params = jnp.ones((3, 4, 4))
    masks = jnp.arange(48).reshape(3, 4, 4) % 4 == 0

    def fn(w, x):
        return lax.scan(lambda h, k: (h @ k, None), x, w)[0]

    (row,) = jp.summary(params, masks, fn=fn, args=(jnp.ones((2, 4)),)).rows
    assert row.flops == (3 * 2 * 2 * 16, 3 * 2 * 2 * 16 // 4)


def test_two_leaves_in_one_product_thin_it_twice():
    params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}
    half = {"a": jnp.arange(8).reshape(2, 4) < 4, "b": jnp.arange(8).reshape(4, 2) < 4}
    s = jp.summary(params, half, fn=lambda p, x: p["a"] @ p["b"] + x, args=(jnp.ones(()),))
    assert [r.flops for r in s.rows] == [(32, 8), (32, 8)]
    assert s.flops == (32 + 4, 8 + 4) and s.others == 4


def test_without_masks_all_is_kept():
    s = jp.summary(VARIABLES, fn=NET.apply, args=(X,))
    assert s.density == 1 and s.flops.before == s.flops.after


def test_print_shows_every_leaf_and_the_total():
    text = str(jp.summary(VARIABLES, MASKS, fn=NET.apply, args=(X,)))
    for row in jp.summary(VARIABLES).rows:
        assert row.path in text
    assert "theoretical" in text and "Masks alone save no time" in " ".join(text.split())
    (kernel,) = (line for line in text.splitlines() if "params/Conv_0/kernel" in line)
    assert kernel.split()[1:] == [
        "float32[3,3,4,8]",
        "0.250",
        "72",
        "288",
        "1,152",
        "73.7",
        "k",
        "18.4",
        "k",
    ]
    assert "everything else" in text and "total" in text
    assert max(map(len, text.splitlines())) <= 160


def test_given_flops_and_notes_are_shown():
    assert "FLOPs 1,000 -> 500 (2.00 x fewer)" in str(jp.summary(VARIABLES, flops=(1000, 500)))

    def fn(w, x):
        return jnp.linalg.cholesky(w) @ x

    assert "note: cholesky" in str(jp.summary(jnp.eye(2), fn=fn, args=(jnp.ones(2),)))


def test_notebooks_get_html_and_narrow_screens_lose_nothing():
    s = jp.summary(VARIABLES, MASKS, fn=NET.apply, args=(X,))
    html = s._repr_html_()
    assert html.startswith("<div><table") and "params/Conv_0/kernel</td>" in html
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    console.print(s)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "1,152" in console.file.getvalue()
    folded = "".join(line[1:].split("  ")[0] for line in lines)  # the first column's parts
    assert "params/Conv_0/kernel" in folded


def test_without_rich_the_numbers_stay(monkeypatch):
    real = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    s = jp.summary(VARIABLES, MASKS)
    assert s.rows
    with pytest.raises(ImportError, match="pip install rich; the numbers are in .rows"):
        str(s)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: jp.summary({}), ValueError, "summary got an empty tree"),
        (lambda: jp.summary(VARIABLES, {"a": True}), ValueError, "masks"),
        (
            lambda: jp.summary({"w": jnp.ones((2, 3))}, {"w": jnp.ones(2, bool)}),
            ValueError,
            "the mask of w",
        ),
        (lambda: jp.summary(VARIABLES, fn=NET.apply), ValueError, "got fn without args"),
        (lambda: jp.summary(VARIABLES, args=(X,)), ValueError, "got args without fn"),
        (lambda: jp.summary(VARIABLES, fn=NET.apply, args=X), TypeError, r"tuple, args=\(x,\)"),
        (
            lambda: jp.summary(VARIABLES, fn=NET.apply, args=(X,), flops=(2, 1)),
            ValueError,
            "both fn and flops",
        ),
        (lambda: jp.summary(VARIABLES, fn=3, args=(X,)), TypeError, "wants a function.*int 3"),
    ],
)
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
