"""Pictures: that they show the given numbers, with units, in marks that can be told apart."""

import builtins

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import plot

plt = pytest.importorskip("matplotlib.pyplot")

SERIES = {"L2": [(3.0, 0.8), ((1.4, 1.5, 1.7), 0.9)], "Taylor": [(1.2, 0.91), (2.0, 0.85)]}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def lines(ax):
    """label -> (xs, ys) of the drawn series."""
    return {h.get_label(): h.lines[0].get_data() for h in ax.containers}


def test_accuracy_in_percent_over_speedup():
    ax = jp.plot.accuracy_speedup(SERIES, dense=0.92)
    assert ax.get_xlabel() == "measured speed-up over dense [x]"
    assert ax.get_ylabel() == "test accuracy [%]"
    x, y = lines(ax)["L2"]
    np.testing.assert_allclose((x, y), ([1.5, 3.0], [90, 80]))  # sorted along the line
    assert [t.get_text() for t in ax.texts] == ["dense"]


def test_quartiles_are_bars_and_numbers_are_not():
    ax = jp.plot.accuracy_speedup(SERIES)
    with_bars, without = ax.containers
    (bars,) = with_bars.lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [1.4, 1.7])
    assert without.lines[2] == ()


def test_takes_the_ratios_of_compare():
    c = jp.compare({"dense": (jnp.sin, (jnp.ones(4),))}, rounds=2)
    ax = jp.plot.measured_theoretical({"dense": [(1.0, c.ratios["dense"])]})
    np.testing.assert_allclose(lines(ax)["dense"], [[1.0], [1.0]])


def test_measured_against_theoretical_marks_what_flops_promise():
    ax = jp.plot.measured_theoretical({"aligned": [(4.0, 2.0), (2.0, 0.5)]})
    promise = next(line for line in ax.lines if line.get_label() == "as FLOPs promise")
    np.testing.assert_array_equal(*promise.get_data())  # the diagonal
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "FLOPs of dense / FLOPs [x]" in ax.get_xlabel() and "[x]" in ax.get_ylabel()
    ax.figure.canvas.draw()
    labels = {t.get_text() for t in ax.get_yticklabels()}
    assert {"0.5", "1", "2"} <= labels


def test_series_differ_in_colour_and_marker():
    styles = [(s["color"], s["marker"]) for s in map(plot._style, range(56))]
    assert len(set(styles)) == 56
    assert len({colour for colour, _ in styles[:7]}) == len({m for _, m in styles[:7]}) == 7


@pytest.mark.parametrize(("count", "outside"), [(3, False), (9, True)])
def test_many_series_get_their_legend_beside_the_axes(count, outside):
    series = {f"series {k}": [(1.0 + k, 0.9)] for k in range(count)}
    ax = jp.plot.accuracy_speedup(series)
    ax.figure.canvas.draw()
    box, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert (box.x0 >= axes.x1) == outside
    assert box.x1 <= ax.figure.bbox.x1


PARAMS = {"b": jnp.ones(4), "v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
MASKS = {
    "b": jnp.asarray(True),
    "v": jnp.eye(4, dtype=bool),
    "w": jnp.arange(16).reshape(4, 4) < 8,
}


def test_densities_of_pruned_leaves_in_the_order_of_the_tree():
    ax = jp.plot.densities(jp.summary(PARAMS, MASKS))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["v", "w"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.25, 0.5])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    assert "density" in ax.get_xlabel() and ax.get_legend() is None


def test_densities_of_several_masks_stand_side_by_side():
    ax = jp.plot.densities({"a": jp.summary(PARAMS, MASKS), "dense": jp.summary(PARAMS)})
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [1, 1])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "dense"]
    assert (ax.lines[0].get_ydata() != ax.lines[1].get_ydata()).all()


def test_densities_of_a_dense_network_show_all_leaves():
    assert len(jp.plot.densities(jp.summary(PARAMS)).get_yticklabels()) == 3


def test_a_mask_is_drawn_kept_dark():
    kernel = jnp.zeros((3, 3, 2, 4), bool).at[0, 0, 0, 1].set(True)
    ax = jp.plot.mask(kernel)
    image = ax.images[0]
    assert image.get_array().shape == (18, 4)
    assert image.get_array()[0, 1] == 1 and image.get_array().sum() == 1
    dark, light = (np.sum(image.cmap(image.norm(v))[:3]) for v in (1.0, 0.0))
    assert dark < light - 0.5
    assert ax.get_ylabel() == "other axes: 3 x 3 x 2" and "0.014" in ax.get_title()


def test_a_large_mask_is_averaged():
    """A chequerboard finer than the pixels comes out grey, not as an arbitrary half of it."""
    board = np.indices((1500, 1500)).sum(0) % 2 == 0
    ax = jp.plot.mask(board)
    ax.figure.canvas.draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., 0]
    box = ax.get_window_extent()
    height = pixels.shape[0]
    inside = pixels[
        height - int(box.y1) + 9 : height - int(box.y0) - 9, int(box.x0) + 9 : int(box.x1) - 9
    ]
    assert inside.std() < 10


def test_draws_on_the_given_axes():
    _, (a, b, c, d) = plt.subplots(4)
    assert jp.plot.accuracy_speedup(SERIES, ax=a) is a
    assert jp.plot.measured_theoretical(SERIES, ax=b) is b
    assert jp.plot.densities(jp.summary(PARAMS, MASKS), ax=c) is c
    assert jp.plot.mask(MASKS["v"], ax=d) is d
    assert len(plt.get_fignums()) == 1


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "jaxprune\[plot\]"'):
        jp.plot.mask(MASKS["v"])


ERRORS = {
    "no series": (
        lambda: jp.plot.accuracy_speedup({}),
        ValueError,
        "accuracy_speedup got no points",
    ),
    "empty series": (
        lambda: jp.plot.measured_theoretical({"a": []}),
        ValueError,
        "measured_theoretical got no points",
    ),
    "percent": (
        lambda: jp.plot.accuracy_speedup({"a": [(1.0, 91.0)]}),
        ValueError,
        r"accuracy of series 'a' is 91; wanted a fraction in \[0, 1\]",
    ),
    "negative": (
        lambda: jp.plot.measured_theoretical({"a": [(2.0, 0.0)]}),
        ValueError,
        "wants ratios above 0, got 0",
    ),
    "masks": (
        lambda: jp.plot.densities(MASKS),
        TypeError,
        r"wants jp.summary\(params, masks\), or a dict of them, got dict",
    ),
    "different": (
        lambda: jp.plot.densities({"a": jp.summary(PARAMS), "b": jp.summary({"x": jnp.ones(2)})}),
        ValueError,
        "summaries of different parameters",
    ),
    "floats": (lambda: jp.plot.mask(jnp.ones(3)), TypeError, r"wants booleans.*float32\(3,\)"),
    "scalar": (lambda: jp.plot.mask(jnp.asarray(True)), ValueError, r"at least one entry.*\(\)"),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_clear_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
