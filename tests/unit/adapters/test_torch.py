"""Every torch module that stores sizes: lifted, shrunk and equal, or refused by name."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("jaxprune.adapters.torch", exc_type=ImportError)
import jaxprune as jp  # noqa: E402
from tests.unit.adapters.torch_shrinking import errors, halved  # noqa: E402

nn, F = torch.nn, torch.nn.functional
ROWS, SERIES, TOKENS = torch.randn(4, 6), torch.randn(2, 6, 8), torch.randint(0, 20, (2, 5))
IMAGES, VOLUMES = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 4, 4, 4)
CASES: dict[str, tuple[type, Any, Any, str]] = {}  # name -> layer, network, input, semantics


class Ends(nn.Module):
    """A linear layer before and behind: all that is inside may be cut."""

    def __init__(self, *middle: Any, width: int = 8, last: int = 8):
        super().__init__()
        self.up, self.middle = nn.Linear(6, width), nn.Sequential(*middle)
        self.down = nn.Linear(last, 3)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.middle(self.up(x))))


class Convolved(nn.Module):
    """The same with channels before positions."""

    def __init__(self, spatial: int, *middle: Any, last: int = 8):
        super().__init__()
        self.up = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](6, 8, 1)
        self.middle, self.down = nn.Sequential(*middle), nn.Linear(last, 3)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.middle(torch.relu(self.up(x)))).flatten(2).mean(-1))


class Recurrent(nn.Module):
    def __init__(self, rnn: Any, outputs: int):
        super().__init__()
        self.rnn, self.down = rnn, nn.Linear(outputs, 3)

    def forward(self, x: Any) -> Any:
        return self.down(self.rnn(x)[0])


class Stepped(nn.Module):
    def __init__(self, cell: type):
        super().__init__()
        self.cell, self.down = cell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        state = self.cell(x)
        state = self.cell(x.flip(0), state)
        return self.down(state[0] if isinstance(state, tuple) else state)


class Looked(nn.Module):
    def __init__(self, table: Any):
        super().__init__()
        self.table, self.down = table, nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.table(x)))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 10)
        self.both, self.down = nn.Bilinear(8, 10, 12), nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.both(torch.tanh(self.one(x)), torch.tanh(self.two(x)))))


def case(layer: type, x: Any, build: Any, semantics: str = "masked", name: str = "") -> None:
    CASES[name or layer.__name__] = layer, build, x, semantics


case(nn.Linear, ROWS, lambda: Ends(nn.ReLU(), nn.Linear(8, 10), nn.GELU(), last=10))
case(nn.Bilinear, ROWS, Both)
case(nn.PReLU, ROWS, lambda: Ends(nn.PReLU(8)))
case(nn.LayerNorm, ROWS, lambda: Ends(nn.LayerNorm(8)), "kept")
case(nn.LayerNorm, ROWS, lambda: Ends(nn.LayerNorm(8, bias=False)), "kept", "LayerNorm, no bias")
bare = nn.LayerNorm(8, elementwise_affine=False)
case(nn.LayerNorm, ROWS, lambda: Ends(copy.deepcopy(bare)), "kept", "LayerNorm, bare")
case(nn.RMSNorm, ROWS, lambda: Ends(nn.RMSNorm(8)), "kept")
case(nn.GroupNorm, IMAGES, lambda: Convolved(2, nn.GroupNorm(2, 8)), "kept")
case(nn.BatchNorm1d, ROWS, lambda: Ends(nn.BatchNorm1d(8)))
case(nn.BatchNorm1d, ROWS, lambda: Ends(nn.BatchNorm1d(8, affine=False)), name="BatchNorm1d, bare")
case(nn.InstanceNorm2d, IMAGES, lambda: Convolved(2, nn.InstanceNorm2d(8, affine=True)))
for dims, sample in enumerate((SERIES.transpose(1, 2)[:, :6], IMAGES, VOLUMES), 1):
    convolution, transposed = (getattr(nn, f"{n}{dims}d") for n in ("Conv", "ConvTranspose"))
    norm = getattr(nn, f"BatchNorm{dims}d")
    case(convolution, sample, lambda d=dims, c=convolution: Convolved(d, c(8, 8, 3)))
    case(
        convolution,
        sample,
        lambda d=dims, c=convolution: Convolved(d, c(8, 16, 3, groups=8), last=16),
        name=f"{convolution.__name__}, depthwise",
    )
    case(
        convolution,
        sample,
        lambda d=dims, c=convolution: Convolved(d, c(8, 8, 3, groups=2), nn.ReLU(), c(8, 8, 1)),
        name=f"{convolution.__name__}, groups",
    )
    case(
        transposed,
        sample,
        lambda d=dims, c=transposed: Convolved(d, c(8, 10, 2, 2), nn.ReLU(), c(10, 8, 1)),
    )
    if dims > 1:
        case(norm, sample, lambda d=dims, n=norm: Convolved(d, n(8)))
case(nn.Embedding, TOKENS, lambda: Looked(nn.Embedding(20, 8, padding_idx=0)))
case(nn.LSTM, SERIES, lambda: Recurrent(nn.LSTM(8, 6, 2, batch_first=True), 6))
case(nn.GRU, SERIES, lambda: Recurrent(nn.GRU(8, 6, batch_first=True), 6))
case(nn.RNN, SERIES, lambda: Recurrent(nn.RNN(8, 6, batch_first=True, bidirectional=True), 12))
case(nn.LSTMCell, ROWS, lambda: Stepped(nn.LSTMCell))
case(nn.GRUCell, ROWS, lambda: Stepped(nn.GRUCell))
case(nn.RNNCell, ROWS, lambda: Stepped(nn.RNNCell))


def sizes(module: Any) -> dict[str, Any]:
    """Everything that modules store as numbers."""
    return {
        f"{path}.{name}": value
        for path, layer in module.named_modules()
        for name, value in vars(layer).items()
        if isinstance(value, int | tuple) and not isinstance(value, bool)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_shrunk_layer_equals_the_compact_function(name):
    _, build, x, semantics = CASES[name]
    module = build()
    before, weights = sizes(module), copy.deepcopy(module.state_dict())
    small = halved(module, x, semantics)
    new = adapter.shrink(module, small)
    assert type(new) is type(module) and sizes(module) == before and sizes(new) != before
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
    assert max(errors(new, small, x)) < 1e-5


def layers() -> list[type]:
    """All modules of torch.nn."""
    found = [x for x in vars(nn).values() if isinstance(x, type) and issubclass(x, nn.Module)]
    return [x for x in found if not x.__name__.startswith(("Lazy", "_"))]


TESTED_ELSEWHERE = {nn.MultiheadAttention, nn.Transformer, nn.EmbeddingBag, nn.SyncBatchNorm}
MANY = {nn.InstanceNorm1d, nn.InstanceNorm3d, nn.RNNBase, nn.RNNCellBase}  # rows of their kin
OF_THE_USERS = {nn.Module, nn.Unflatten, nn.Sequential, nn.ModuleList, nn.ModuleDict}


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.__name__)
def test_every_module_has_rows_and_a_case_or_is_known_to_hold_no_sizes(layer):
    rows = adapter.TABLE.rows(layer)
    assert (rows is None) == (layer in OF_THE_USERS)
    assert (layer in adapter.WITHOUT_SIZES) == (rows is not None and not rows.sizes)
    tested = TESTED_ELSEWHERE | MANY | {tested for tested, *_ in CASES.values()}
    assert rows is None or not rows.sizes or layer in tested


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_over_masked_units_is_refused_with_the_choice(layer):
    module = Ends(layer(8))
    small = halved(module, ROWS)
    wanted = (
        rf"of '?.*hidden'? \(down/weight:1\) 4 of 8 units are left, in middle/0 "
        rf"\({layer.__name__}\).*(full count 8|units are carried).*dims=.*semantics=\"kept\""
    )
    with pytest.raises(ValueError, match=wanted):
        adapter.shrink(module, small)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Any) -> Any:
        x = self.up(x)
        return self.down(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.slow
def test_heads_that_torch_ties_to_the_width_are_refused_by_name():
    module = Attending()
    small = halved(module, SERIES, spared=("width", "hidden", "size"))
    wanted = (
        r"attention heads.* 2 of 4 units are left, in .*attention \(MultiheadAttention\).*dims="
    )
    with pytest.raises(ValueError, match=wanted):
        adapter.shrink(module, small)


@pytest.mark.slow
def test_width_and_heads_of_torch_s_attention_shrink_together():
    module = Attending()
    small = halved(module, SERIES, spared=("size",))
    new = adapter.shrink(module, small)
    assert (new.attention.embed_dim, new.attention.num_heads, new.attention.head_dim) == (8, 2, 4)
    assert (new.attention.kdim, new.attention.vdim) == (8, 8)
    assert max(errors(new, small, SERIES)) < 1e-5


@pytest.mark.slow
def test_sizes_in_the_code_are_refused_by_the_name_of_the_dimension():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.down(self.up(x).reshape(-1, 8))

    module = Net()
    with pytest.raises(ValueError, match=r"\(down/weight:1\) 4 of 8 units.*torch.register\(Layer"):
        adapter.shrink(module, halved(module, ROWS))


@pytest.mark.slow
def test_sizes_that_users_store_are_guessed_or_registered():
    class Split(nn.Module):
        def __init__(self, known: bool):
            super().__init__()
            self.width = 8 if known else "8"
            self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            one, two = self.up(x).split(int(self.width), -1)
            return self.down(one * torch.sigmoid(two))

    module = Split(True)
    new = adapter.shrink(module, halved(module, ROWS))
    assert new.width == 4 and max(errors(new, halved(module, ROWS), ROWS)) < 1e-5

    module = Split(False)
    with pytest.raises(ValueError, match="units are left"):
        adapter.shrink(module, halved(module, ROWS))


def test_another_call_is_asked_for():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    call = lambda m, x: {"logits": m(x)}  # noqa: E731
    fn, params = adapter.lift(module, ROWS, call=call)
    x = jnp.asarray(ROWS.numpy())
    structure = jp.infer_structure(fn, params, x)
    masks = jp.structured(structure)(jp.magnitude(params), 0.5)
    small = jp.compact(lambda p, x: (fn(p, x)["logits"], x), params, masks, x)
    with pytest.raises(ValueError, match=r"called as module\(\*args\).*torch.shrink.*call=lambda"):
        adapter.shrink(module, small)
    assert adapter.shrink(module, small, call=lambda m, x: (m(x), x))[0].out_features == 4
    small = jp.compact(fn, params, masks, x)
    assert adapter.shrink(module, small, call=call)[0].out_features == 4


def test_params_of_another_module_are_refused():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    small = halved(module, ROWS)
    with pytest.raises(ValueError, match=r"small.params hold 0.bias, which Linear has not.*lift"):
        adapter.shrink(module[0], small)


@pytest.mark.slow
def test_a_tensor_in_several_places_stays_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.again = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.again.weight = self.table.weight
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Any) -> Any:
            x = self.table(x)
            return self.again(x + self.down(torch.relu(self.up(x))))

    module = Tied()
    small = halved(module, TOKENS)
    new = adapter.shrink(module, small)
    assert new.again.weight is new.table.weight and new.again.in_features == 4
    assert max(errors(new, small, TOKENS)) < 1e-5


def test_types_modes_and_what_is_frozen_stay():
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    module[0].weight.requires_grad = False
    module[1].eval()
    new = adapter.shrink(module, halved(module, ROWS))
    assert [m.training for m in new.modules()] == [m.training for m in module.modules()]
    assert not new[0].weight.requires_grad and new[0].bias.requires_grad
    assert new[1].num_batches_tracked.dtype == torch.int64
    assert isinstance(new[3].weight, nn.Parameter) and new[3].weight.grad is None


@pytest.mark.slow
def test_half_precision_stays():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    new = adapter.shrink(module, halved(module, ROWS.bfloat16().float()[:, :]))
    assert new[0].weight.dtype == torch.bfloat16 and new[0].weight.shape == (4, 6)


def test_a_lifted_function_is_pure_and_takes_tensors_or_arrays():
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    fast = torch.backends.mha.get_fastpath_enabled()
    fn, params = adapter.lift(module, ROWS.numpy())
    before = np.asarray(fn(params, ROWS))
    assert module.training and torch.backends.mha.get_fastpath_enabled() == fast
    assert set(params["1"]) == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    with torch.no_grad():
        module[0].weight.zero_()
        module[1].running_mean.fill_(9.0)
    del module[1]
    np.testing.assert_array_equal(fn(params, jnp.asarray(ROWS.numpy())), before)
    assert fn(params, jnp.ones((7, 6))).shape == (7, 3)
    assert jax.grad(lambda p: fn(p, ROWS).sum(), allow_int=True)(params)["0"]["weight"].any()


def test_tensors_that_are_no_buffers_are_constants():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.scale = nn.Linear(6, 3), torch.arange(3.0)

        def forward(self, x: Any) -> Any:
            return self.down(x) * self.scale

    fn, params = adapter.lift(Scaled(), ROWS)
    assert set(params) == {"down"} and not np.asarray(fn(params, ROWS))[:, 0].any()


class Cauchy(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.special.airy_ai(x)


class Branching(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


class Noisy(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.dropout(x, 0.5, True)


def test_what_torchax_lacks_is_named_with_its_line():
    wanted = r"Cauchy can't be lifted: torchax .* at test_torch.py:\d+ \(forward\).*special_airy_ai"
    with pytest.raises(NotImplementedError, match=wanted):
        adapter.lift(Cauchy(), ROWS)


def test_what_jax_can_t_trace_is_named_with_its_line():
    wanted = r"Branching can't be lifted: at test_torch.py:\d+ \(forward\) it raises Conc"
    with pytest.raises(ValueError, match=wanted):
        adapter.lift(Branching(), ROWS)


def test_a_module_that_draws_is_told_to_differ():
    with pytest.raises(ValueError, match="Noisy, lifted by torchax .*, differs from torch by"):
        adapter.lift(Noisy(), ROWS)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"lift wants a torch.nn.Module, got function; write"):
        adapter.lift(lambda x: x, ROWS)
    with pytest.raises(TypeError, match=r"shrink wants a torch.nn.Module, got dict; write"):
        adapter.shrink({}, None)


def test_gradients_that_differ_are_refused_with_the_choice():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.up(x))
            with torch.no_grad():
                z = torch.relu(self.up(x))
            return self.down(y + z)

    module = Detached()
    small = halved(module, ROWS)
    with pytest.raises(ValueError, match=r"gradients that differ .* times.*gradients=False"):
        adapter.shrink(module, small)
    assert adapter.shrink(module, small, gradients=False).up.out_features == 4


@pytest.mark.slow
def test_the_examples_in_the_docstrings_run():
    done = doctest.testmod(adapter)
    assert done.attempted and not done.failed


@pytest.mark.slow
def test_a_missing_package_is_told_with_the_install_line():
    code = (
        "import sys; sys.modules['torchax'] = None\n"
        "try:\n    import jaxprune.adapters.torch\n"
        "except ImportError as error:\n    print(error)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "pip install 'jaxprune[torch]'; here importing them raises" in done.stdout, done.stderr
