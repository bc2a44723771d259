"""What dimensions are called, how the table reads, and several uses of the same parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.structure.labels import numbered
from tests.models.zoo import states

E, H, K, D, F, V, T = 16, 4, 2, 6, 20, 33, 5
TOKENS = jax.ShapeDtypeStruct((2, T), jnp.int32)


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def gpt_params(layers=2):
    attn = {"qkv": spec(E, (H + 2 * K) * D), "out": spec(H * D, E)}
    mlp = {"gate": spec(E, F), "up": spec(E, F), "down": spec(F, E)}
    layer = {"attn": attn, "mlp": mlp, "norm1": spec(E), "norm2": spec(E)}
    return {"embed": spec(V, E), "layers": [layer] * layers, "norm": spec(E)}


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rope(x):
    angle = jnp.arange(x.shape[1])[:, None, None] * 0.1 ** jnp.arange(D // 2)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
    )


def attend(p, x):
    q, k, v = jnp.split(x @ p["qkv"], [H * D, (H + K) * D], -1)
    split = lambda y, n: y.reshape(*y.shape[:2], n, D)  # noqa: E731
    q, k, v = rope(split(q, H)), rope(split(k, K)), split(v, K)
    q = q.reshape(*q.shape[:2], K, H // K, D)
    weights = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k), -1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(*x.shape[:2], H * D) @ p["out"]


def gpt(params, tokens):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = x + attend(p["attn"], rms(x, p["norm1"]))
        y, mlp = rms(x, p["norm2"]), p["mlp"]
        x = x + (jax.nn.silu(y @ mlp["gate"]) * (y @ mlp["up"])) @ mlp["down"]
    return rms(x, params["norm"]) @ params["embed"].T


def labels(structure):
    """label -> size, of one dimension of that label."""
    return {d.label: d.size for d in structure.dims.values()}


def test_a_gpt_is_called_as_a_person_would():
    assert labels(jp.infer_structure(gpt, gpt_params(1), TOKENS)) == {
        "residual width": E,
        "vocabulary": V,
        "layers/0/mlp hidden": F,
        "layers/0/attn heads": K,
        "layers/0/attn queries per head": H // K,
        "layers/0/attn/qkv head size (pairs)": D // 2,
        "layers/0/attn value size": D,
    }


class Block(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=True)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.strides)(x)))
        y = norm()(nn.Conv(self.features, (3, 3))(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        for features, strides in ((4, 1), (4, 1), (8, 2), (8, 1)):
            x = Block(features, strides)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def of_flax(module, x, **kwargs):
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    return jp.infer_structure(module.apply, params, x, **kwargs)


IMAGE = spec(1, 8, 8, 3)


def test_a_resnet_is_called_as_a_person_would():
    assert labels(of_flax(ResNet(), IMAGE)) == {
        "residual channels of Conv_0, Block_0, Block_1": 4,
        "residual channels of Block_2, Block_3": 8,
        "inputs of Conv_0": 3,
        "outputs of Dense_0": 10,
        "windows of Conv_0": 3,
        **{f"channels of Block_{k}/Conv_0": 4 + 4 * (k > 1) for k in range(4)},
        **{f"windows of Block_{k}/Conv_{c}": 3 for k in range(4) for c in range(2)},
    }


class Mixed(nn.Module):
    """A little of everything else."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), feature_group_count=1)(x)
        x = nn.relu(nn.GroupNorm(4)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.tanh(nn.Dense(7)(x))
        return nn.Dense(5)(x)


def test_group_norm_and_flatten():
    found = labels(of_flax(Mixed(), IMAGE))
    assert found == {
        "groups of Conv_0": 4,
        "channels per group of Conv_0": 2,
        "image positions in Dense_0": 4,
        "hidden": 7,
        "inputs of Conv_0": 3,
        "outputs of Dense_1": 5,
        "windows of Conv_0": 3,
    }


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x) + self.param("pos", nn.initializers.zeros, (T, 8))
        query = self.param("query", nn.initializers.zeros, (1, 3, 8))
        x = x + nn.MultiHeadDotProductAttention(2, name="self")(nn.LayerNorm()(x))
        query = jnp.tile(query, (x.shape[0], 1, 1))
        return nn.Dense(5)(nn.MultiHeadDotProductAttention(2, name="pool")(query, x))


def test_decoding_one_token_has_queries_that_share_a_head():
    fn, params, args = states.decode_with_cache()
    found = labels(jp.infer_structure(fn, params, *args))
    assert found["weights queries per head"] == 2


def test_heads_of_kernels_with_axes_of_their_own_and_learned_queries():
    found = labels(of_flax(Encoder(), spec(1, T, 3)))
    assert {k: v for k, v in found.items() if "self" in k or "pool" in k} == {
        "self heads": 2, "self head size": 4, "self value size": 4,
        "pool heads": 2, "pool head size": 4, "pool value size": 4, "inputs of pool/query": 8,
    }  # fmt: skip
    assert found["residual width"] == 8


def test_mlps_and_experts():
    x = spec(3, 4)
    mlp = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    assert labels(jp.infer_structure(mlp, {"up": spec(4, 8), "down": spec(8, 2)}, x)) == {
        "hidden": 8, "inputs of up": 4, "outputs of down": 2,
    }  # fmt: skip

    def moe(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, p["up"]))
        return jnp.einsum("be,beh,eho->bo", gates, hidden, p["down"])

    params = {"router": spec(4, 6), "up": spec(6, 4, 8), "down": spec(6, 8, 2)}
    found = labels(jp.infer_structure(moe, params, x))
    assert found["experts"] == 6 and found["hidden"] == 8


def test_labels_are_no_part_of_equality():
    a, b = (jp.infer_structure(gpt, gpt_params(), TOKENS).dims["embed:1"] for _ in range(2))
    assert a == b and a.label == "residual width"
    assert "label" not in repr(a) or a.label in repr(a)


# ----------------------------------------------------------------------------------- the table


def test_the_table_groups_siblings_and_counts_parameters():
    text = str(jp.infer_structure(gpt, gpt_params(3), TOKENS))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("16 of 17 dimensions can be pruned; they govern 100 % of ")
    assert f"layers/0-2/mlp hidden {F} x3 {3 * E * F} layers/0-2/mlp/gate:1" in lines
    (fixed,) = [line for line in lines if line.startswith(f"vocabulary {V}")]
    assert "gather at test_labels.py:" in fixed and "(gpt): indexed (+1 more)" in fixed
    assert len(lines) < 15


def test_siblings_of_other_sizes_stand_in_rows_of_their_own():
    lines = [" ".join(line.split()) for line in str(of_flax(ResNet(), IMAGE)).splitlines()]
    assert any(line.startswith("channels of Block_0-1/Conv_0 4 x2") for line in lines)
    assert any(line.startswith("channels of Block_2-3/Conv_0 8 x2 <=") for line in lines)


def test_what_blocks_stands_before_what_is_fixed():
    def fn(p, x):
        q = jax.pure_callback(lambda a: a[:, :3], spec(3, 3), x @ p["a"])
        return jnp.tanh(q @ p["b"]) @ p["c"]

    params = {"a": spec(4, 12), "b": spec(3, 8), "c": spec(8, 2)}
    text = str(jp.infer_structure(fn, params, spec(3, 4)))
    blocked, fixed = text.index("blocked"), text.index("\nfixed")
    assert (
        text.index("can be pruned") < blocked < text.index("pure_callback at test_labels") < fixed
    )
    assert "blocked: what it would take to prune these (72 parameters)" in text


def test_layouts_that_do_not_nest_are_blocked():
    def fn(p, x):
        y = x @ p["a"]
        return (y.reshape(-1, 2, 3) * p["g"]).reshape(-1, 3, 2).sum(1) + y.reshape(-1, 3, 2).sum(1)

    text = str(jp.infer_structure(fn, {"a": spec(4, 6), "g": spec(2, 3)}, spec(5, 4)))
    assert "blocked" in text and "layouts that do not nest" in text


def test_details_show_every_slot_and_reason():
    structure = jp.infer_structure(gpt, gpt_params(), TOKENS)
    text = structure.details("layers/*/mlp hidden")
    assert f"layers/1/mlp/gate:1  (layers/1/mlp hidden): {F} units" in text
    assert "  layers/0/mlp/down:0" in text.splitlines() and "vocabulary" not in text
    assert structure.details("embed:0").count("  frozen: ") == 2
    assert structure.details("nothing*") == "no dimension matches 'nothing*'"
    assert len(structure.details().splitlines()) > 2 * len(structure.dims)


# ---------------------------------------------------------------------------- choosing by label


@pytest.mark.slow
def test_structured_takes_labels_and_tables():
    params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(s.shape[0]), s.shape),
                          gpt_params())  # fmt: skip
    structure = jp.infer_structure(gpt, params, TOKENS)
    scores = jp.magnitude(params)

    def kept(**options):
        keep = structure.keep(jp.structured(structure, **options)(scores, 0.5))
        return {d.label: int(keep[d.name].sum()) for d in structure.dims.values() if not d.frozen}

    only = kept(dims="*mlp hidden")
    assert only["layers/1/mlp hidden"] == F // 2 and only["residual width"] == E
    table = {"layers/0/* hidden": 0.25, "*hidden": 0.75, "embed:1": lambda s: s / 2, "*": 0.0}
    wanted = {"layers/0/mlp hidden": 15, "layers/1/mlp hidden": 5, "residual width": 12}
    for distribution in (table, jp.distributions.by_path(table)):
        found = kept(distribution=distribution)
        assert {label: found[label] for label in wanted} == wanted
        assert found["layers/0/attn heads"] == K
    rest = kept(distribution={"*hidden": 0.25})
    assert rest["layers/1/mlp hidden"] == 15 and rest["residual width"] == 8


def test_a_table_whose_pattern_is_never_first():
    structure = jp.infer_structure(gpt, gpt_params(), TOKENS)
    with pytest.raises(ValueError, match="'layers/0.*' is the first match of none of the chosen"):
        jp.structured(structure, distribution={"*": 0.5, "layers/0*": 0.25})
    with pytest.raises(ValueError, match="matches no prunable dimension; prunable are: .*width"):
        jp.structured(structure, dims="neurons")


# ----------------------------------------------------------------- several uses of one parameter


class Branches(nn.Module):
    """Train: an auxiliary head and BatchNorm by batch; eval: neither."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        aux = nn.Dense(8, name="aux")(x) if train or self.is_initializing() else None
        out = nn.Dense(2, name="head")(x)
        return out if aux is None else out + nn.Dense(2, name="aux_out")(jnp.tanh(aux))


@pytest.mark.slow
def test_what_only_one_use_reads_is_offered_when_both_are_told():
    net, x = Branches(), jnp.ones((4, 3))
    variables = net.init(jax.random.key(0), x, True)
    test = lambda v, x: net.apply(v, x, False)  # noqa: E731
    train = lambda v, x: net.apply(v, x, True, mutable=["batch_stats"])  # noqa: E731
    one = jp.infer_structure(test, variables, x)
    assert one.dims["params/aux/kernel:1"].frozen == "nothing in this trace reads it"
    both = jp.infer_structure(test, variables, x, also=[(train, (x,))])
    assert both.dims["params/aux/kernel:1"].frozen is None
    assert both.dims["params/aux/kernel:1"].label == "aux hidden"
    slots = {s.path for s in both.dims["params/Dense_0/kernel:1"].slots}
    assert {"params/aux/kernel", "batch_stats/BatchNorm_0/mean", "params/head/kernel"} <= slots


def test_dimensions_hold_for_all_uses():
    """One use ties two leaves, another reshapes one of them, a third returns it."""
    params = {"a": spec(3, 8), "b": spec(3, 8), "c": spec(8, 2)}
    separate = lambda p, x: (jnp.tanh(x @ p["a"]) @ p["c"], jnp.tanh(x @ p["b"]).sum())  # noqa: E731
    tied = lambda p, x: ((x @ p["a"]) * (x @ p["b"])).sum()  # noqa: E731
    grouped = lambda p, x: (x @ p["b"]).reshape(-1, 4, 2).max(1).sum()  # noqa: E731
    x = spec(5, 3)
    assert jp.infer_structure(separate, params, x).dims["a:1"].frozen is None
    structure = jp.infer_structure(separate, params, x, also=[(tied, (x,)), (grouped, (x,))])
    assert {str(s) for s in structure.dims["a:1.0"].slots} == {"a:1.0", "b:1.0", "c:0.0"}
    returned = jp.infer_structure(separate, params, x, also=[(lambda p, x: x @ p["b"], (x,))])
    assert returned.dims["a:1"].frozen is None and "output" in returned.dims["b:1"].frozen


def test_masks_of_several_uses_compact_each_of_them():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 8)), "b": rng.normal(size=(3, 8)), "c": np.ones((8, 2))}
    one = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]  # noqa: E731
    two = lambda p, x: jnp.tanh(x @ p["a"] * (x @ p["b"])) @ p["c"]  # noqa: E731
    x = rng.normal(size=(5, 3))
    structure = jp.infer_structure(one, params, x, also=[(two, (x,))])
    masks = structure.masks({"a:1": np.arange(8) % 2 == 0})
    for fn in (one, two):
        small = jp.compact(fn, params, masks, x)
        assert small.params["c"].shape == (4, 2)
        np.testing.assert_allclose(
            small.fn(small.params, x), fn(jp.apply_masks(params, masks), x), rtol=1e-5
        )


@pytest.mark.parametrize("entry", [gpt, (gpt, TOKENS), (gpt,)])
def test_also_wants_pairs(entry):
    with pytest.raises(TypeError, match=r"also wants pairs \(fn, args\) with args a tuple"):
        jp.infer_structure(gpt, gpt_params(), TOKENS, also=[entry])


@pytest.mark.parametrize("repeat", [True, False])
def test_heads_and_queries_that_share_one_are_told_apart(repeat):
    """Keys are repeated for each query of their group, as Hugging Face does, or broadcast."""

    def attend(p, x):
        q, k, v = ((x @ p[name]).reshape(*x.shape[:2], -1, 4) for name in ("q", "k", "v"))
        k, v = (
            (jnp.repeat(a, 3, axis=2) if repeat else a[:, :, :, None].repeat(3, 3)) for a in (k, v)
        )
        k, v = (a.reshape(*q.shape) for a in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1) @ p["o"]

    sizes = {"q": (5, 24), "k": (5, 8), "v": (5, 8), "o": (24, 5)}
    params = {"attn": {name: jnp.ones(size) for name, size in sizes.items()}}
    structure = jp.infer_structure(lambda p, x: attend(p["attn"], x), params, jnp.ones((1, 3, 5)))
    found = {d.label: (d.size, len(d.slots)) for d in structure.dims.values() if not d.frozen}
    assert found["attn heads"] == (2, 4) and found["attn queries per head"] == (3, 2)


def test_pieces_of_one_axis_are_counted():
    params = {"up": jnp.ones((3, 6)), "left": jnp.ones((2, 4)), "right": jnp.ones((4, 4))}

    def fn(p, x):
        left, right = jnp.split(jnp.tanh(x @ p["up"]), [2], axis=-1)
        return left @ p["left"] + right @ p["right"]

    structure = jp.infer_structure(fn, params, jnp.ones((1, 3)))
    found = [(d.label, d.size) for d in structure.dims.values() if not d.frozen]
    assert len(dict(found)) == 2
    assert numbered(["a", "b", "a", "a"], [True, True, True, False]) == [
        "a (1 of 2)", "b", "a (2 of 2)", "a",
    ]  # fmt: skip
