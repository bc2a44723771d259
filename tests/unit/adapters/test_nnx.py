"""Every NNX layer that stores sizes: shrunk, it equals the compact function, or is refused."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
import jaxprune as jp  # noqa: E402
from jaxprune.adapters import nnx as adapter  # noqa: E402
from tests.models.outside.model import floats, tokens  # noqa: E402
from tests.unit.adapters.shrinking import assert_same, halved  # noqa: E402

ROWS, SERIES, IMAGES, LINES = floats(4, 6), floats(2, 5, 6), floats(2, 6, 6, 4), floats(2, 8, 4)
CASES: dict[str, tuple[type, Any, Any, str]] = {}  # name -> layer, network, input, semantics


def case(layer: type, x: Any, semantics: str = "masked", name: str = "") -> Any:
    def add(build: Any) -> Any:
        CASES[name or layer.__name__] = layer, build, x, semantics
        return build

    return add


def between(*middle: Any, width: int = 8, inputs: int = 6) -> Any:
    """A linear layer before and behind: all that is inside may be cut."""
    rngs, last = nnx.Rngs(1), getattr(middle[-1], "out_features", width)
    return nnx.Sequential(
        nnx.Linear(inputs, width, rngs=rngs), *middle, nnx.relu, nnx.Linear(last, 3, rngs=rngs)
    )


case(nnx.Linear, ROWS)(lambda r: between(nnx.relu, nnx.Linear(8, 10, rngs=r)))
case(nnx.LoRALinear, ROWS)(lambda r: between(nnx.relu, nnx.LoRALinear(8, 10, lora_rank=4, rngs=r)))
case(nnx.LoRA, ROWS)(lambda r: between(nnx.relu, nnx.LoRA(8, 4, 10, rngs=r)))
case(nnx.PReLU, ROWS)(lambda r: between(nnx.PReLU()))
case(nnx.BatchNorm, ROWS)(lambda r: between(nnx.BatchNorm(8, use_running_average=True, rngs=r)))
case(nnx.LayerNorm, ROWS, "kept")(lambda r: between(nnx.LayerNorm(8, rngs=r)))
case(nnx.LayerNorm, ROWS, "kept", "LayerNorm, bare")(
    lambda r: between(nnx.LayerNorm(8, use_bias=False, use_scale=False, rngs=r))
)
case(nnx.RMSNorm, ROWS, "kept")(lambda r: between(nnx.RMSNorm(8, rngs=r)))
case(nnx.GroupNorm, ROWS, "kept")(lambda r: between(nnx.GroupNorm(8, 2, rngs=r)))
case(nnx.InstanceNorm, SERIES)(lambda r: between(nnx.InstanceNorm(8, rngs=r)))
case(nnx.WeightNorm, ROWS)(lambda r: between(nnx.WeightNorm(nnx.Linear(8, 8, rngs=r), rngs=r)))


@case(nnx.LinearGeneral, ROWS)
def general(rngs: Any) -> Any:
    heads = nnx.LinearGeneral(8, (4, 6), rngs=rngs)
    merge = nnx.LinearGeneral((4, 6), 8, axis=(-2, -1), rngs=rngs)
    return between(heads, nnx.relu, merge, nnx.Linear(8, 8, rngs=rngs))


@case(nnx.LinearGeneral, SERIES, name="LinearGeneral, batch axes")
def batched(rngs: Any) -> Any:
    each = nnx.LinearGeneral(8, 8, batch_axis={0: 2}, rngs=rngs)
    return between(nnx.relu, each, nnx.Linear(8, 8, rngs=rngs))


@case(nnx.Einsum, ROWS)
def einsum(rngs: Any) -> Any:
    return between(nnx.relu, nnx.Einsum("...d,dh->...h", (8, 8), (8,), rngs=rngs))


@case(nnx.Conv, LINES)
def convolution(rngs: Any) -> Any:
    grouped = nnx.Conv(8, 8, (3,), feature_group_count=2, rngs=rngs)
    depthwise = nnx.Conv(8, 16, (3,), feature_group_count=8, rngs=rngs)
    masked = nnx.Conv(16, 8, (3,), mask=jnp.ones((3, 16, 8)).at[0].set(0.0), rngs=rngs)
    return between(grouped, nnx.relu, depthwise, nnx.relu, masked, inputs=4)


@case(nnx.ConvTranspose, LINES)
def transposed(rngs: Any) -> Any:
    one = nnx.ConvTranspose(8, 6, (2,), strides=(2,), rngs=rngs)
    two = nnx.ConvTranspose(6, 8, (3,), transpose_kernel=True, rngs=rngs)
    return between(nnx.relu, one, nnx.relu, two, inputs=4)


@case(nnx.Embed, tokens(2, 5))
def embedding(rngs: Any) -> Any:
    return nnx.Sequential(nnx.Embed(40, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))


@case(nnx.SpectralNorm, ROWS)
def spectral(rngs: Any) -> Any:
    return between(nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), update_stats=False, rngs=rngs))


class Attending(nnx.Module):
    def __init__(self, rngs: Any, **options: Any):
        options = {"qkv_features": 32, "decode": False, "rngs": rngs, **options}
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, **options)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.attention(self.first(x)))


case(nnx.MultiHeadAttention, SERIES)(lambda r: Attending(r))
case(nnx.MultiHeadAttention, SERIES, "kept", "MultiHeadAttention, normalized")(
    lambda r: Attending(r, normalize_qk=True)
)
case(nnx.MultiHeadAttention, SERIES, "masked", "MultiHeadAttention, grouped")(
    lambda r: Attending(r, num_kv_heads=2)
)


class Recurrent(nnx.Module):
    def __init__(self, cell: type, rngs: Any, both: bool = False):
        rnn = nnx.RNN(cell(6, 8, rngs=rngs), rngs=rngs)
        back = nnx.RNN(cell(6, 8, rngs=rngs), rngs=rngs)
        self.rnn: Any = nnx.Bidirectional(rnn, back, rngs=rngs) if both else rnn
        self.last = nnx.Linear(16 if both else 8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.rnn(x))


case(nnx.LSTMCell, SERIES)(lambda r: Recurrent(nnx.LSTMCell, r))
case(nnx.OptimizedLSTMCell, SERIES)(lambda r: Recurrent(nnx.OptimizedLSTMCell, r))
case(nnx.GRUCell, SERIES)(lambda r: Recurrent(nnx.GRUCell, r))
case(nnx.SimpleCell, SERIES)(lambda r: Recurrent(nnx.SimpleCell, r))
case(nnx.Bidirectional, SERIES)(lambda r: Recurrent(nnx.SimpleCell, r, both=True))


def layers() -> list[type]:
    """All layers of flax.nnx."""
    found = (x for x in vars(nnx).values() if inspect.isclass(x) and issubclass(x, nnx.Module))
    return [layer for layer in found if layer is not nnx.Module]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.__name__)
def test_every_layer_has_rows_and_a_case_or_is_known_to_hold_no_sizes(layer):
    rows = adapter.TABLE.rows(layer)
    assert rows is not None, f"{layer} is new: give it rows, or an entry in WITHOUT_SIZES"
    assert (layer in adapter.WITHOUT_SIZES) == (not rows.sizes)
    assert not rows.sizes or any(layer is tested for tested, *_ in CASES.values())


def split(module: Any) -> tuple[Any, Any]:
    graphdef, state = nnx.split(module)
    return lambda state, *args: nnx.merge(graphdef, state)(*args), state


def sizes(module: Any) -> dict[str, Any]:
    """Everything that layers store as numbers."""
    return {
        f"{path}.{name}": value
        for path, layer in nnx.iter_modules(module)
        for name, value in vars(layer).items()
        if isinstance(value, int | tuple) and not isinstance(value, bool)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_shrunk_layer_equals_the_compact_function(name):
    _, build, x, semantics = CASES[name]
    module = build(nnx.Rngs(0))
    before = sizes(module)
    small = halved(*split(module), x, semantics=semantics)
    new = adapter.shrink(module, small)
    assert type(new) is type(module) and sizes(module) == before
    assert name == "PReLU" or sizes(new) != before
    assert_same(*split(new), small, x)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nnx.LayerNorm, nnx.RMSNorm])
def test_a_norm_over_masked_units_is_refused_with_the_choice(layer):
    module = between(layer(8, rngs=nnx.Rngs(0)))
    small = halved(*split(module), ROWS)
    wanted = (
        rf"of 'layers hidden' \(layers/0/kernel/value:1\) 4 of 8 units are left, in "
        rf"layers/1 \({layer.__name__}\).*full count 8.*dims=.*semantics=\"kept\""
    )
    with pytest.raises(ValueError, match=wanted):
        adapter.shrink(module, small)


@pytest.mark.slow
def test_carried_units_are_refused_with_the_choice():
    module = between(nnx.LayerNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0)))
    small = halved(*split(module), ROWS)
    with pytest.raises(ValueError, match=r"LayerNorm.*4 removed units are carried.*semantics="):
        adapter.shrink(module, small)


def test_constants_of_removed_units_are_refused_with_the_choice():
    """Units whose weights and biases are masked, but nothing that reads them: each is cos(0)."""
    first, last = nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    module = nnx.Sequential(first, jnp.cos, last)
    pure, state = split(module)
    keep = jnp.arange(8) < 4
    masks = jax.tree.map(lambda leaf: keep if leaf.shape[-1:] == (8,) else jnp.ones(1, bool), state)
    small = jp.compact(pure, state, masks, ROWS)
    with pytest.raises(
        ValueError, match=r"layers/0 \(Linear\).*4 removed units are carried.*semantics="
    ):
        adapter.shrink(module, small)


@pytest.mark.slow
def test_where_no_dimension_is_to_blame_the_reasons_are_given():
    class Picky(nnx.Module):
        def __init__(self, rngs: Any):
            self.one, self.two = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
            self.last = nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            if self.two.kernel.shape == (4, 5):
                raise RuntimeError("too small")
            return self.last(nnx.relu(self.two(self.one(x))))

    module = Picky(nnx.Rngs(0))
    small = halved(*split(module), ROWS)
    with pytest.raises(ValueError, match="no plain module equals small.fn: it raises RuntimeError"):
        adapter.shrink(module, small)


@pytest.mark.slow
def test_sizes_in_the_code_are_refused_by_the_name_of_the_dimension():
    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.down(self.up(x).reshape(-1, 8))

    module = Net(nnx.Rngs(0))
    small = halved(*split(module), ROWS)
    with pytest.raises(ValueError, match=r"\(up/kernel/value:1\) 4 of 8 units.*register\(Layer"):
        adapter.shrink(module, small)


def test_another_call_is_asked_for():
    module = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    pure, state = split(module)
    small = halved(lambda s, x: (pure(s, x), x), state, ROWS)
    with pytest.raises(ValueError, match=r"called as module\(\*args\).*call=lambda module"):
        adapter.shrink(module, small)
    new = adapter.shrink(module, small, call=lambda m, x: (m(x), x))
    assert new.layers[0].out_features == new.layers[1].in_features == 4


@pytest.mark.slow
def test_a_module_in_another_mode_is_named():
    module = between(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    small = halved(*split(nnx.view(module, use_running_average=True)), ROWS)
    with pytest.raises(ValueError, match=r"isn't what the compacted function computes, even at"):
        adapter.shrink(module, small)


def test_a_function_without_numbers_is_not_compared():
    module = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    pure, state = split(module)
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    small = halved(lambda s, x: pure(s, jnp.log(x)), state, shape)
    with pytest.raises(ArithmeticError, match="small.fn gives NaN at random arguments"):
        adapter.shrink(module, small, call=lambda m, x: m(jnp.log(x)))
    small = halved(lambda s, x: pure(s, jnp.log(x)), state, jnp.abs(ROWS) + 1)
    adapter.shrink(module, small, call=lambda m, x: m(jnp.log(x)))


def test_params_of_another_module_are_refused():
    one = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    small = halved(*split(one), ROWS)
    with pytest.raises(ValueError, match=r"small.params hold layers/0/.*which Linear has not"):
        adapter.shrink(one.layers[0], small)


class Shared(nnx.Module):
    def __init__(self, rngs: Any):
        self.up, self.same = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.again, self.down = self.same, nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.again(nnx.relu(self.same(self.up(x)))))


@pytest.mark.slow
def test_a_module_used_twice_stays_one():
    module = Shared(nnx.Rngs(0))
    small = halved(*split(module), ROWS)
    new = adapter.shrink(module, small)
    assert new.same is new.again and new.same.in_features == 4
    assert_same(*split(new), small, ROWS)


def test_a_shared_module_with_two_cuts_is_refused():
    module = Shared(nnx.Rngs(0))
    small = halved(lambda m, x: m(x), module, ROWS, spared=("residual", "up"))
    with pytest.raises(ValueError, match=r"same/.* is shared: the module holds it twice"):
        adapter.shrink(module, small)


def test_a_module_or_what_split_gives_may_be_the_params():
    module = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    new = adapter.shrink(module, halved(lambda m, x: m(x), module, ROWS))
    assert new.layers[0].kernel.shape == (6, 4)
    again = adapter.shrink(module, halved(lambda p, x: nnx.merge(*p)(x), nnx.split(module), ROWS))
    np.testing.assert_array_equal(again(ROWS), new(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("dropping", [False, True])
def test_training_mode_with_statistics_and_without_dropout(dropping):
    """Dropout of fewer units draws other numbers, so that there is nothing to compare."""
    dropout = nnx.Dropout(0.5, deterministic=not dropping, rngs=nnx.Rngs(2))
    module = between(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), dropout)
    graphdef, state = nnx.split(module)

    def call(m: Any, x: Any) -> Any:
        return m(x), nnx.state(m, nnx.BatchStat)

    params, rest = nnx.split_state(state, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    fresh = lambda state: jax.tree.map(lambda leaf: leaf, state)  # noqa: E731
    small = halved(lambda p, x: call(nnx.merge(graphdef, p, fresh(rest)), x), params, ROWS)
    if dropping:
        with pytest.raises(ValueError, match=r"layers/0/kernel/value:1\) 4 of 8 .* outputs differ"):
            adapter.shrink(module, small, call=call)
        return
    new = adapter.shrink(module, small, call=call)
    assert new.layers[1].num_features == 4
    new.eval()
    assert new(ROWS).shape == (4, 3)


@pytest.mark.slow
def test_stacked_layers_by_vmap_and_scan():
    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def blocks(rngs: Any) -> Any:
                return nnx.Linear(8, 8, rngs=rngs)

            self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.blocks = blocks(rngs)

        def __call__(self, x: Any) -> Any:
            step = nnx.scan(lambda x, b: jnp.tanh(b(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.down(step(self.up(x), self.blocks))

    module = Net(nnx.Rngs(0))
    small = halved(*split(module), ROWS)
    new = adapter.shrink(module, small)
    assert new.blocks.kernel.shape == (3, 4, 4) and new.blocks.in_features == 4
    assert_same(*split(new), small, ROWS)


class Own(nnx.Module):
    """Attention as people write it: grouped queries, sizes stored, the root of what it sees."""

    def __init__(self, rngs: Any):
        self.heads, self.groups, self.size = 4, 2, 6
        self.q = nnx.Linear(16, 24, rngs=rngs)
        self.kv = nnx.Linear(16, 24, rngs=rngs)
        self.out = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        b, t, _ = x.shape
        q = self.q(x).reshape(b, t, self.groups, -1, self.size)
        k, v = (y.reshape(b, t, self.groups, self.size) for y in jnp.split(self.kv(x), 2, -1))
        scores = jnp.einsum("btghd,bsgd->bghts", q, k) / np.sqrt(q.shape[-1])
        mixed = jnp.einsum("bghts,bsgd->btghd", jax.nn.softmax(scores), v)
        return self.out(mixed.reshape(b, t, -1))


class Gpt(nnx.Module):
    def __init__(self, rngs: Any):
        self.embed, self.norm = nnx.Embed(40, 16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)
        self.attention, self.up = Own(rngs), nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


@pytest.mark.slow
@pytest.mark.parametrize("semantics", ["masked", "kept"])
def test_attention_of_the_users_own_code_is_told_its_sizes(semantics):
    module = Gpt(nnx.Rngs(0))
    spared = ("residual",) if semantics == "masked" else ()
    small = halved(*split(module), tokens(2, 6), semantics=semantics, spared=spared)
    new = adapter.shrink(module, small)
    assert new.attention.size == 3
    assert_same(*split(new), small, tokens(2, 6))


@pytest.mark.slow
def test_orbax_loads_into_the_small_module_and_it_trains(tmp_path):
    ocp, optax = pytest.importorskip("orbax.checkpoint"), pytest.importorskip("optax")
    module = between(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    module.eval()
    small = halved(*split(module), ROWS)
    new = adapter.shrink(module, small)
    new.train()
    optimizer = nnx.Optimizer(new, optax.sgd(0.1), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean(m(ROWS) ** 2))(new)
    optimizer.update(new, grads)
    new.eval()
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "small", nnx.state(new))
        saver.wait_until_finished()
        empty = adapter.shrink(module, small)
        nnx.update(empty, saver.restore(tmp_path / "small", nnx.state(empty)))
    empty.eval()
    np.testing.assert_array_equal(empty(ROWS), new(ROWS))


def test_users_register_their_layers():
    class Odd(nnx.Linear):
        """Stores what no other layer stores."""

        def __init__(self, *sizes: int, rngs: Any):
            super().__init__(*sizes, rngs=rngs)
            self.both = sizes[0] * sizes[1]

        def __call__(self, x: Any) -> Any:
            assert self.both == self.kernel.shape[0] * self.kernel.shape[1]
            return super().__call__(x)

    inputs, outputs = adapter.size("kernel", -2), adapter.size("kernel", -1)
    rows = {
        "in_features": inputs,
        "out_features": outputs,
        "both": adapter.product(inputs, outputs),
    }
    adapter.register(Odd, rows)
    try:
        module = between(nnx.relu, Odd(8, 8, rngs=nnx.Rngs(0)))
        new = adapter.shrink(module, halved(*split(module), ROWS))
        assert new.layers[2].both == 16
        adapter.register(Odd, {**rows, "both": inputs})
        with pytest.raises(
            ValueError, match=r"Odd.both at layers/2 is 64, and its row reads \(8,\)"
        ):
            adapter.shrink(module, halved(*split(module), ROWS))
    finally:
        del adapter.TABLE[Odd]


class Turned(nnx.Module):
    """Three queries for each key, turned by tables of positions that are given."""

    def __init__(self, rngs: Any):
        self.groups, self.size = 2, 8
        self.q = nnx.Linear(16, 48, rngs=rngs)
        self.k, self.v = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.out = nnx.Linear(48, 16, rngs=rngs)

    def __call__(self, x: Any, cos: Any, sin: Any) -> Any:
        def turned(y: Any) -> Any:
            one, two = jnp.split(y, 2, -1)
            return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

        b, t, _ = x.shape
        q = jnp.moveaxis(self.q(x).reshape(b, t, self.groups, -1, self.size), 1, -2)
        k, v = (f(x).reshape(b, t, self.groups, self.size) for f in (self.k, self.v))
        k, v = jnp.moveaxis(k, 1, -2), jnp.moveaxis(v, 1, -2)
        scores = jnp.einsum("bghtd,bgsd->bghts", turned(q), turned(k)) / np.sqrt(q.shape[-1])
        mixed = jnp.einsum("bghts,bgsd->btghd", jax.nn.softmax(scores), v)
        return self.out(mixed.reshape(b, t, -1))


class TurnedTwice(nnx.Module):
    def __init__(self, rngs: Any):
        self.cos, self.sin = (nnx.Param(f(jnp.ones((5, 4)))) for f in (jnp.cos, jnp.sin))
        self.embed, self.head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.one, self.two = Turned(rngs), Turned(rngs)

    def __call__(self, x: Any) -> Any:
        x = self.embed(x)
        x = x + self.one(x, self.cos[...], self.sin[...])
        return self.head(x + self.two(x, self.cos[...], self.sin[...]))


@pytest.mark.slow
def test_attentions_that_share_a_head_size_have_their_scales_folded_each():
    module, x = TurnedTwice(nnx.Rngs(0)), floats(2, 5, 8)
    small = halved(*split(module), x, spared=("residual",))
    new = adapter.shrink(module, small)
    assert (new.one.groups, new.one.size, new.two.size) == (1, 4, 4)
    assert_same(*split(new), small, x)
