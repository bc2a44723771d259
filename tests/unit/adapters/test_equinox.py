"""Every Equinox layer that stores sizes: shrunk, it equals the compact function, or is refused."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

eqx = pytest.importorskip("equinox")
from jaxprune.adapters import equinox as adapter  # noqa: E402
from tests.models.outside.model import floats, tokens  # noqa: E402
from tests.unit.adapters.shrinking import assert_same, halved  # noqa: E402

KEYS = jax.random.split(jax.random.key(0), 9)
ROWS, SERIES, LINES = floats(4, 6), floats(2, 5, 6), floats(2, 4, 8)
CASES: dict[str, tuple[type, Any, Any, str]] = {}  # name -> layer, network, input, semantics


def case(layer: type, x: Any, semantics: str = "masked", name: str = "") -> Any:
    def add(build: Any) -> Any:
        CASES[name or layer.__name__] = layer, build, x, semantics
        return build

    return add


def linear(*sizes: int, key: int = 0) -> Any:
    return eqx.nn.Linear(*sizes, key=KEYS[key])


def between(*middle: Any, width: int = 8) -> Any:
    """A linear layer before and behind: all that is inside may be cut."""
    relu = eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential([linear(6, 8), *middle, relu, linear(width, 3, key=1)])


def convolved(*middle: Any) -> Any:
    first = eqx.nn.Conv1d(4, 8, 3, key=KEYS[0])
    return eqx.nn.Sequential([first, *middle, eqx.nn.Conv1d(8, 2, 3, key=KEYS[1])])


RELU = eqx.nn.Lambda(jax.nn.relu)
case(eqx.nn.Linear, ROWS)(lambda: between(RELU, linear(8, 8, key=2)))
case(eqx.nn.LayerNorm, ROWS, "kept")(lambda: between(eqx.nn.LayerNorm(8)))
case(eqx.nn.LayerNorm, ROWS, "kept", "LayerNorm, bare")(
    lambda: between(eqx.nn.LayerNorm(8, use_weight=False, use_bias=False))
)
case(eqx.nn.RMSNorm, ROWS, "kept")(lambda: between(eqx.nn.RMSNorm(8)))
case(eqx.nn.GroupNorm, LINES, "kept")(lambda: convolved(eqx.nn.GroupNorm(2, 8)))
case(eqx.nn.PReLU, ROWS)(lambda: between(eqx.nn.Lambda(eqx.nn.PReLU())))
case(eqx.nn.WeightNorm, ROWS)(lambda: between(eqx.nn.WeightNorm(linear(8, 8, key=2))))
case(eqx.nn.MLP, ROWS)(lambda: between(eqx.nn.MLP(8, 8, 12, 2, key=KEYS[2])))
case(eqx.nn.MLP, ROWS, "masked", "MLP, scanned")(
    lambda: between(eqx.nn.MLP(8, 8, 12, 3, eqx.nn.PReLU(), scan=True, key=KEYS[2]))
)


@case(eqx.nn.Conv, LINES)
def grouped() -> Any:
    one = eqx.nn.Conv1d(8, 8, 3, groups=2, key=KEYS[2])
    two = eqx.nn.Conv1d(8, 8, 3, groups=8, padding=1, key=KEYS[3])
    return convolved(one, RELU, two)


@case(eqx.nn.ConvTranspose, LINES)
def transposed() -> Any:
    one = eqx.nn.ConvTranspose1d(8, 8, 2, stride=2, key=KEYS[2])
    return convolved(RELU, one, eqx.nn.ConvTranspose1d(8, 8, 3, groups=2, key=KEYS[3]))


@case(eqx.nn.Embedding, tokens(4))
def embedded() -> Any:
    return eqx.nn.Sequential([eqx.nn.Embedding(40, 8, key=KEYS[0]), RELU, linear(8, 3)])


class Attending(eqx.Module):
    first: Any
    attention: Any
    rope: Any
    last: Any

    def __init__(self, rope: bool = False):
        options: Any = {"qk_size": 6, "vo_size": 4, "use_query_bias": True}
        self.first, self.last = linear(6, 16), linear(16, 3, key=1)
        self.attention = eqx.nn.MultiheadAttention(4, 16, **options, key=KEYS[2])
        self.rope = eqx.nn.RotaryPositionalEmbedding(6) if rope else None

    def __call__(self, x: Any) -> Any:
        x = jax.vmap(self.first)(x)
        turn = jax.vmap(self.rope, 1, 1) if self.rope else lambda q: q
        x = self.attention(x, x, x, process_heads=lambda q, k, v: (turn(q), turn(k), v))
        return jax.vmap(self.last)(x)


case(eqx.nn.MultiheadAttention, SERIES)(Attending)


class Recurrent(eqx.Module):
    cell: Any
    last: Any

    def __init__(self, cell: type):
        self.cell, self.last = cell(6, 8, key=KEYS[0]), linear(8, 3, key=1)

    def __call__(self, xs: Any) -> Any:
        zero = jnp.zeros(self.cell.hidden_size)
        pair = isinstance(self.cell, eqx.nn.LSTMCell)

        def step(carry: Any, x: Any) -> Any:
            return self.cell(x, carry), None

        end, _ = jax.lax.scan(step, (zero, zero) if pair else zero, xs)
        return self.last(end[0] if pair else end)


case(eqx.nn.LSTMCell, SERIES)(lambda: Recurrent(eqx.nn.LSTMCell))
case(eqx.nn.GRUCell, SERIES)(lambda: Recurrent(eqx.nn.GRUCell))


@case(eqx.nn.Shared, ROWS)
def shared() -> Any:
    class Tied(eqx.Module):
        first: Any
        pair: Any
        last: Any

        def __init__(self) -> None:
            both = linear(8, 8, key=2), linear(8, 8, key=3)
            self.first, self.last = linear(6, 8), linear(8, 3, key=1)
            self.pair = eqx.nn.Shared(both, lambda p: p[1].weight, lambda p: p[0].weight)

        def __call__(self, x: Any) -> Any:
            one, two = self.pair()
            return self.last(two(jax.nn.relu(one(self.first(x)))))

    return Tied()


# Their state is a part of the pair that make_with_state gives: see the test below.
STATEFUL = {eqx.nn.BatchNorm, eqx.nn.SpectralNorm}


def layers() -> list[type]:
    """All layers of equinox.nn."""
    found = (x for x in vars(eqx.nn).values() if inspect.isclass(x) and issubclass(x, eqx.Module))
    return [layer for layer in found if layer is not eqx.nn.StatefulLayer]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.__name__)
def test_every_layer_has_rows_and_a_case_or_is_known_to_hold_no_sizes(layer):
    rows = adapter.TABLE.rows(layer)
    assert rows is not None, f"{layer} is new: give it rows, or an entry in WITHOUT_SIZES"
    known = issubclass(layer, adapter.WITHOUT_SIZES)
    assert known == (not rows.sizes)
    tested = {layer for layer, *_ in CASES.values()} | STATEFUL | {eqx.nn.RotaryPositionalEmbedding}
    assert known or any(base in tested for base in layer.__mro__)


def split(module: Any, call: Any = jax.vmap) -> tuple[Any, Any]:
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda params, *args: call(eqx.combine(params, static))(*args), params


def sizes(module: Any) -> list[Any]:
    """Everything that is static: sizes among it."""
    return [str(eqx.partition(m, eqx.is_array)[1]) for _, m in adapter._modules(module)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_shrunk_layer_equals_the_compact_function(name):
    _, build, x, semantics = CASES[name]
    module = build()
    before = sizes(module)
    small = halved(*split(module), x, semantics=semantics)
    new = adapter.shrink(module, small)
    assert sizes(module) == before != sizes(new)
    assert_same(*split(new), small, x)


@pytest.mark.slow
def test_a_norm_over_masked_units_is_refused_with_the_choice():
    module = between(eqx.nn.LayerNorm(8))
    small = halved(*split(module), ROWS)
    with pytest.raises(ValueError, match=r"LayerNorm.*4 removed units are carried.*dims=.*semanti"):
        adapter.shrink(module, small)


@pytest.mark.slow
def test_rotary_heads_are_refused_by_name_and_whole_ones_are_not():
    module = Attending(rope=True)
    pure, params = split(module)
    with pytest.raises(ValueError, match=r"of 'attention head size.*embedding_size, but"):
        adapter.shrink(module, halved(pure, params, SERIES))
    small = halved(pure, params, SERIES, spared=("head size",))
    new = adapter.shrink(module, small)
    assert new.attention.num_heads == 2 and new.attention.qk_size == 6
    assert_same(*split(new), small, SERIES)


@pytest.mark.slow
@pytest.mark.parametrize("inference", [True, False])
def test_batch_statistics_and_spectral_norms_in_both_modes(inference):
    class Net(eqx.Module):
        up: Any
        norm: Any
        down: Any

        def __init__(self) -> None:
            self.up, self.norm = linear(6, 8), eqx.nn.BatchNorm(8, "batch", mode="batch")
            self.down = eqx.nn.SpectralNorm(linear(8, 3, key=1), "weight", key=KEYS[2])

        def __call__(self, x: Any, state: Any) -> Any:
            x, state = self.norm(self.up(x), state)
            return self.down(jax.nn.relu(x), state)

    model, state = eqx.nn.make_with_state(Net)()
    model = eqx.nn.inference_mode(model, inference)
    state = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, state)

    def call(both: Any, xs: Any) -> Any:
        module, state = both
        run = jax.vmap(module, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        return run(xs, state)  # the updated state, too: else nothing would read it in training

    params, static = eqx.partition((model, state), eqx.is_inexact_array)
    small = _half_of(lambda p, x: call(eqx.combine(p, static), x), params)
    new, kept = adapter.shrink((model, state), small, call=call)
    assert new.norm.input_size == 4
    assert kept.get(new.norm.batch_state_index)[0].shape == (4,)


def _half_of(fn: Any, params: Any) -> Any:
    """As ``halved``, with the parameters as they are: statistics have no names here."""
    import jaxprune as jp
    from tests.unit.adapters.shrinking import halves

    structure = jp.infer_structure(fn, params, ROWS)
    return jp.compact(fn, params, structure.masks(halves(structure, params)), ROWS)


@pytest.mark.slow
def test_stacked_layers_by_filter_vmap_and_scan():
    class Net(eqx.Module):
        up: Any
        blocks: Any
        down: Any

        def __init__(self) -> None:
            self.up, self.down = linear(6, 8), linear(8, 3, key=1)
            self.blocks = eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 8, key=k))(KEYS[3:6])

        def __call__(self, x: Any) -> Any:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            step = lambda x, b: (jnp.tanh(eqx.combine(b, static)(x)), None)  # noqa: E731
            return self.down(jax.lax.scan(step, self.up(x), arrays)[0])

    module = Net()
    small = halved(*split(module), ROWS)
    new = adapter.shrink(module, small)
    assert new.blocks.weight.shape == (3, 4, 4) and new.blocks.in_features == 4
    assert_same(*split(new), small, ROWS)


class Own(eqx.Module):
    """Attention as people write it: one fused kernel, sizes stored, the root of what it sees."""

    qkv: Any
    out: Any
    heads: int = eqx.field(static=True)

    def __init__(self) -> None:
        self.qkv, self.out = linear(6, 3 * 4 * 8), linear(4 * 8, 3, key=1)
        self.heads = 4

    def __call__(self, x: Any) -> Any:
        q, k, v = jnp.split(jax.vmap(self.qkv)(x), 3, -1)
        q, k, v = (y.reshape(len(x), self.heads, -1) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]))
        return jax.vmap(self.out)(jnp.einsum("hts,shd->thd", weights, v).reshape(len(x), -1))


@pytest.mark.slow
def test_attention_of_the_users_own_code_is_told_its_sizes():
    module = Own()
    small = halved(*split(module), SERIES)
    new = adapter.shrink(module, small)
    assert new.heads == 2 and new.qkv.out_features == 3 * 2 * 4
    assert_same(*split(new), small, SERIES)


@pytest.mark.slow
def test_serialised_leaves_load_into_the_small_module_and_it_trains(tmp_path):
    module = between(RELU, linear(8, 8, key=2))
    small = halved(*split(module), ROWS)
    new = adapter.shrink(module, small)
    grads = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(ROWS) ** 2))(new)
    tuned = eqx.apply_updates(new, jax.tree.map(lambda g: -0.1 * g, grads))
    eqx.tree_serialise_leaves(tmp_path / "small.eqx", tuned)
    again = eqx.tree_deserialise_leaves(tmp_path / "small.eqx", new)
    np.testing.assert_array_equal(jax.vmap(again)(ROWS), jax.vmap(tuned)(ROWS))


def test_params_of_another_module_are_refused():
    module = between()
    small = halved(*split(module), ROWS)
    with pytest.raises(ValueError, match=r"small.params have . leaves, and Linear .*eqx.partition"):
        adapter.shrink(linear(6, 8), small)


def test_users_register_their_layers():
    class Table(eqx.Module):
        weight: Any
        entries: int = eqx.field(static=True)

        def __call__(self, x: Any, key: Any = None) -> Any:
            return x.reshape(self.entries) * self.weight

    adapter.register(Table, {"entries": adapter.size("weight", 0)})
    try:
        module = between(Table(jnp.arange(1.0, 9.0), 8))
        new = adapter.shrink(module, halved(*split(module), ROWS))
        assert new.layers[1].entries == 4
    finally:
        del adapter.TABLE[Table]
