"""Pictures: that they show the given numbers, with units, in marks that can be told apart."""

import builtins

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.plot import curves

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
    c = jp.compare({"dense": (jnp.sin, (jnp.ones(4),))}, repeats=2)
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


def test_series_differ_in_color_and_marker():
    styles = [(s["color"], s["marker"]) for s in map(curves._style, range(56))]
    assert len(set(styles)) == 56
    assert len({color for color, _ in styles[:7]}) == len({m for _, m in styles[:7]}) == 7


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
    structure = jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    assert jp.plot.structure(structure, ax=a) is a
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


# ------------------------------------------------------------------------------------ dimensions


def two_layers(p, x):
    h = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
    return (h + jnp.tanh(h @ p["b"]["up"]) @ p["b"]["down"]) @ p["z"]["kernel"]


TWO_LAYERS = {
    "a": {"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))},
    "b": {"down": jnp.ones((8, 4)), "up": jnp.ones((4, 8))},
    "z": {"kernel": jnp.ones((4, 2))},
}


def texts(ax):
    return [t.get_text() for t in ax.texts]


def picture(ax):
    """The texts by their rows, from left to right."""
    ax.figure.canvas.draw()
    rows = {}
    for t in ax.texts:
        x, y = t.get_position()
        rows.setdefault(round(y), []).append((x, t.get_text()))
    return [" ".join(text for _, text in sorted(rows[y]) if text) for y in sorted(rows)]


def lanes(ax):
    """The rows of each lane, top to bottom, by colour."""
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    return {line.get_color(): list(line.get_ydata()) for line in dots}


def boxes(ax):
    return [patch.get_facecolor() for patch in ax.patches if patch.get_height() < 0.9]


def test_a_structure_is_drawn_in_order_of_use_with_labels_and_reasons():
    structure = jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    ax = jp.plot.structure(structure)
    assert ax.get_title() == "2 of 4 dimensions can be pruned, grey is fixed"
    drawn = picture(ax)
    assert [row.split(" ")[:3] for row in drawn[:5]] == [
        ["a", "kernel", r"3$^{\mathregular{a}}$"],
        ["bias", "4"],
        ["b", "up", "4"],
        ["down", "8", "4"],
        ["z", "kernel", "4"],
    ]
    assert drawn[0].endswith("residual width: 4") and drawn[2].endswith("b hidden: 8")
    assert "a  input 0 of the function" in texts(ax) and "b  output of the function" in texts(ax)
    blue, orange = curves.COLORS[:2]
    assert lanes(ax) == {blue: [0, 1, 2, 3, 4], orange: [2, 3]}


def test_a_box_has_the_color_of_its_lane_and_what_is_fixed_is_gray():
    from matplotlib.colors import to_rgba

    structure = jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    blue, orange, grey = map(to_rgba, (*curves.COLORS[:2], "#DADDE0"))
    assert boxes(jp.plot.structure(structure)) == [
        grey, blue, blue, blue, orange, orange, blue, blue, grey,
    ]  # fmt: skip


def test_some_dimensions_only():
    structure = jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    ax = jp.plot.structure(structure, "*hidden")
    assert [row.split(" ")[-1] for row in picture(ax)] == ["8", "4"]
    assert len(lanes(ax)) == 1


def test_lanes_that_do_not_overlap_share_a_column_and_a_kind_its_color():
    def fn(p, x):
        for layer in p:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x.sum()

    layer = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    x = jnp.ones((1, 4))
    ax = jp.plot.structure(jp.infer_structure(fn, [layer] * 3, x), "*hidden")
    columns = {
        (line.get_xdata()[0], line.get_color()) for line in ax.lines if line.get_marker() == "o"
    }
    assert len(columns) == 1
    assert [t for t in texts(ax) if "hidden" in t] == [f"{k} hidden: 8" for k in range(3)]


def test_an_axis_of_several_dimensions_is_as_many_boxes():
    def fn(p, x):
        q, k = jnp.split(x @ p["qk"], 2, axis=-1)
        heads = lambda a: a.reshape(-1, 2, 4)  # noqa: E731
        scores = jnp.einsum("thd,shd->hts", heads(q), heads(k))
        return jnp.exp(scores).sum((0, 2))

    params = {"qk": jnp.ones((3, 16))}
    ax = jp.plot.structure(jp.infer_structure(fn, params, jnp.ones((5, 3))))
    assert picture(ax)[0].startswith(r"qk 3$^{\mathregular{a}}$ 2 · 4 + 2 · 4")
    assert len(lanes(ax)) == 2


def test_a_long_label_keeps_its_end():
    name = "a_module_of_a_name_that_nobody_would_want_to_read"
    fn = lambda p, x: jnp.tanh(x @ p[name]["up"]) @ p[name]["down"]  # noqa: E731
    params = {name: {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}}
    ax = jp.plot.structure(jp.infer_structure(fn, params, jnp.ones((1, 3))))
    (label,) = [t for t in texts(ax) if t.endswith("hidden: 8")]
    assert label.startswith("...") and len(label) < 52


def test_everything_lies_within_the_figure():
    structure = jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3)))
    ax = jp.plot.structure(structure)
    ax.figure.canvas.draw()
    for text in ax.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= ax.figure.bbox.x1, text.get_text()
        assert box.y0 >= 0 and box.y1 <= ax.figure.bbox.y1, text.get_text()


ERRORS = {
    "no structure": (
        lambda: jp.plot.structure(PARAMS),
        TypeError,
        r"wants jp.infer_structure\(fn, params, ...\), got dict",
    ),
    "no dimension": (
        lambda: jp.plot.structure(
            jp.infer_structure(two_layers, TWO_LAYERS, jnp.ones((1, 3))), "heads"
        ),
        ValueError,
        "no dimension matches 'heads'",
    ),
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


def test_over_steps_draws_a_line_per_run():
    ax = jp.plot.over_steps({"a": [(10, 0.5), (0, 1.0)], "b": [(0, 0.1)]}, ylabel="density")
    np.testing.assert_allclose(lines(ax)["a"], [[0, 10], [1.0, 0.5]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "density")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]


def test_over_steps_wants_points():
    with pytest.raises(ValueError, match=r"over_steps got no points; wanted .*\[\(step, value\)"):
        jp.plot.over_steps({}, ylabel="density")


def test_accuracy_density_falls_to_the_right_in_percent():
    ax = jp.plot.accuracy_density({"a": [(0.1, 0.9), (0.02, (0.7, 0.8, 0.85))]}, dense=0.95)
    np.testing.assert_allclose(lines(ax)["a"], [[2, 10], [80, 90]])
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [70, 85])
    assert ax.xaxis_inverted() and ax.get_xscale() == "log"
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "10"]
    assert [t.get_text() for t in ax.texts] == ["dense"]


@pytest.mark.parametrize("density", [0.0, 90.0])
def test_accuracy_density_refuses_what_is_no_density(density):
    with pytest.raises(ValueError, match=r"accuracy_density got densities .* in \(0, 1\]: 0.1 for"):
        jp.plot.accuracy_density({"a": [(density, 0.9), (0.5, 0.9)]})


def test_accuracy_density_refuses_percent():
    with pytest.raises(ValueError, match="an accuracy of series 'a' is 90; wanted a fraction"):
        jp.plot.accuracy_density({"a": [(0.1, 90)]})


def test_sensitivity_draws_the_steepest_curves():
    found = jp.budget.Sensitivity(
        (0.5, 0.9), {"a": (0.9, 0.8), "b": (0.7, 0.2), "c": (0.9, 0.9)}, 0.95
    )
    ax = jp.plot.sensitivity(found, limit=2)
    assert list(lines(ax)) == ["b", "a"]
    np.testing.assert_allclose(lines(ax)["b"], ([0, 50, 90], [0.95, 0.7, 0.2]))
    assert "2 steepest of 3" in ax.get_title()
    with pytest.raises(ValueError, match="sensitivity"):
        jp.plot.sensitivity(jp.budget.Sensitivity((0.5,), {}, 0.9))


# -- widths that a search keeps


@pytest.fixture(scope="module")
def plans():
    params = {f"layer_{i}": {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))} for i in range(2)}

    def fn(p, x):
        for layer in p.values():
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x

    x = jnp.ones((1, 4))
    structure = jp.infer_structure(fn, params, x)
    return {
        f"params {part}": jp.search(
            fn, params, structure, params, x, target=jp.Target(params=part), round_to=1
        )
        for part in (0.5, 0.75)
    }


def test_widths_show_the_kept_share_of_every_dimension(plans):
    ax = jp.plot.widths(plans)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 2 and all(label.endswith(": 8") for label in labels)
    for line, plan in zip(ax.get_lines(), plans.values(), strict=True):
        kept = [100 * vector.mean() for vector in plan.keep.values()]
        np.testing.assert_allclose(line.get_xdata(), kept)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(plans)


def test_widths_of_chosen_dimensions(plans):
    plan = plans["params 0.5"]
    ax = jp.plot.widths(plan, dims=plan.widths[1][0])
    assert len(ax.get_yticklabels()) == 1 and ax.get_legend() is None
    with pytest.raises(
        ValueError, match=r"no dimension's label matches 'nothing'; see print\(plan\)"
    ):
        jp.plot.widths(plan, dims="nothing")


def test_widths_want_plans_of_one_network(plans):
    with pytest.raises(
        TypeError, match=r"plot.widths wants jp.search\(...\), or a dict .* got list"
    ):
        jp.plot.widths([1])
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    x = jnp.ones((1, 3))
    other = jp.search(
        fn, params, jp.infer_structure(fn, params, x), params, x, target=jp.Target(params=0.5)
    )
    with pytest.raises(ValueError, match="plans of different dimensions; draw them apart"):
        jp.plot.widths({"a": plans["params 0.5"], "b": other})


# -- what is no picture


@pytest.fixture(scope="module")
def structure(plans):
    return next(iter(plans.values()))._structure


def test_several_patterns_of_dimensions_are_drawn(plans, structure):
    every = [d.name for d in structure.dims.values()]
    together, apart = jp.plot.structure(structure, every), jp.plot.structure(structure, "*")
    assert together.get_title() == apart.get_title()
    plan = plans["params 0.5"]
    labels = [label for label, *_ in plan.widths]
    assert len(jp.plot.widths(plan, dims=labels).get_yticklabels()) == len(labels)


NO_SERIES = r"accuracy_speedup wants \{name: \[\(speed-up, accuracy\), ...\]\}, got "
BAD = {
    "one dimension of several is unknown": (
        lambda s: jp.plot.structure(s, dims=["*", "heads"]),
        ValueError,
        "no dimension matches 'heads'",
    ),
    "no dimensions": (
        lambda s: jp.plot.structure(s, dims=[]),
        ValueError,
        "dims is empty; wanted names or labels",
    ),
    "curves alone": (
        lambda s: jp.plot.sensitivity({"up": (0.9, 0.4)}),
        TypeError,
        r"plot.sensitivity wants what jp.sensitivity\(params, structure, .*\) returned, got dict",
    ),
    "points without a name": (
        lambda s: jp.plot.accuracy_speedup([(1.4, 0.9)]),
        TypeError,
        NO_SERIES + "list",
    ),
    "a front in place of its points": (
        lambda s: jp.plot.accuracy_speedup({"a": jp.budget.ParetoFront(())}),
        TypeError,
        NO_SERIES + "ParetoFront",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(structure, call, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        call(structure)
