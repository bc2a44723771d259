"""Whole torch networks: lifted, pruned by a score, compacted, given back, trained, exported, saved.

In an environment of their own: ``pip install -e ".[dev,torch]"``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("jaxprune.adapters.torch", exc_type=ImportError)
import jaxprune as jp  # noqa: E402
from benchmarks.models import torch_networks as networks  # noqa: E402
from tests.unit.adapters.torch_shrinking import count, errors  # noqa: E402

# torch.export says of any recurrent module that it sets its flat weights.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
IMAGES, SERIES = torch.randn(2, 3, 32, 32), torch.randn(2, 6, 12)
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
# name -> builds it, input, labels of what is left out, semantics
NETWORKS: dict[str, tuple[Any, Any, tuple[str, ...], str]] = {
    "resnet18": (networks.resnet18, IMAGES, (), "masked"),
    "vit": (networks.Vit, IMAGES, ("residual",), "masked"),
    "vit, residual width too": (networks.Vit, IMAGES, (), "kept"),
    "encoder, hidden units": (networks.Encoder, TOKENS, ("residual", "head"), "masked"),
    "encoder, width and heads": (networks.Encoder, TOKENS, ("size",), "kept"),
    "gpt": (networks.Gpt, TOKENS, ("residual",), "masked"),
    "lstm": (networks.Recurrent, SERIES, (), "masked"),
    "resnet50": (networks.resnet50, IMAGES, (), "masked"),
}


def trained(build: Any) -> Any:
    """A network whose norms have statistics and scales, as after training."""
    torch.manual_seed(0)
    module = build()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
        if hasattr(layer, "bias") and isinstance(layer.bias, torch.nn.Parameter):
            torch.nn.init.normal_(layer.bias, 0.0, 0.1)
    return module


def compacted(module: Any, x: Any, spared: tuple[str, ...] = (), semantics: str = "masked") -> Any:
    """Half of every dimension by magnitude, but of those whose label holds a word."""
    fn, params = adapter.lift(module, x)
    array = jnp.asarray(x.numpy())
    structure = jp.infer_structure(fn, params, array)
    free = [n for n, d in structure.dims.items() if not d.frozen]
    dims = [n for n in free if not any(word in structure.dims[n].label for word in spared)]
    masks = jp.structured(structure, dims=dims)(jp.magnitude(params), 0.5)
    return jp.compact(fn, params, masks, array, semantics=semantics)


def assert_usable(new: Any, build: Any, x: Any, path: Any) -> None:
    """It is exported, trained for a step, saved, and loaded into a copy."""
    new.eval()
    with torch.no_grad():
        before = new(x)
        np.testing.assert_allclose(torch.export.export(new, (x,)).module()(x), before, atol=1e-5)
    torch.save(new.state_dict(), path)
    new.train()
    optimizer = torch.optim.SGD(new.parameters(), 1e-2)
    new(x).square().mean().backward()
    optimizer.step()
    new.load_state_dict(torch.load(path))
    np.testing.assert_allclose(new.eval()(x).detach(), before, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_smaller_and_equal(name, tmp_path):
    build, x, spared, semantics = NETWORKS[name]
    module = trained(build)
    small = compacted(module, x, spared, semantics)
    new = adapter.shrink(module, small)
    assert type(new) is type(module) and count(new) < count(module) == count(build())
    assert max(errors(new, small, x)) < 1e-5
    with torch.no_grad():
        got, wanted = new.eval()(x).numpy(), np.asarray(small.fn(small.params, x.numpy()))
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert_usable(new, build, x, tmp_path / "small.pt")


def test_a_searched_network_comes_back():
    module = trained(networks.resnet18)
    fn, params = adapter.lift(module, IMAGES)
    x = jnp.asarray(IMAGES.numpy())
    structure = jp.infer_structure(fn, params, x)
    plan = jp.search(
        fn, params, structure, jp.magnitude(params), x, target=jp.Target(flops=0.5), verify=False
    )
    small = jp.compact(fn, params, plan.masks, x)
    new = adapter.shrink(module, small)
    assert jp.cost(small.fn, small.params, x).flops <= 0.51 * jp.cost(fn, params, x).flops
    assert len({len(kept) / kept.sum() for kept in plan.keep.values()}) > 1  # not uniform
    assert max(errors(new, small, IMAGES)) < 1e-5


def test_sizes_that_may_stand_for_several_axes_are_registered():
    """Here heads and head size are 16."""
    module = trained(lambda: networks.Gpt(heads=(16, 2)))
    small = compacted(module, TOKENS, ("residual",))
    with pytest.raises(ValueError, match=r"units are left, in .*torch.register\(Layer"):
        adapter.shrink(module, small)
    rows = {
        "n_head": adapter.leading("q_proj.weight", 0),
        "n_kv_head": adapter.leading("k_proj.weight", 0),
        "head_dim": adapter.trailing("v_proj.weight", 0),
    }
    try:
        adapter.register(networks.GroupedAttention, rows)
        new = adapter.shrink(module, small)
    finally:
        adapter.TABLE.pop(networks.GroupedAttention, None)
    assert (new.h[0].attn.n_head, new.h[0].attn.n_kv_head, new.h[1].attn.head_dim) == (4, 1, 8)
    assert max(errors(new, small, TOKENS)) < 1e-5


REFUSED = {
    "heads of torch's attention": (networks.Encoder, TOKENS, ("residual", "hidden", "size"),
        r"encoder/layers/0/self_attn heads.* 2 of 4 units.*self_attn \(MultiheadAttention\)"),
    "width of torch's encoder": (networks.Encoder, TOKENS, ("hidden", "head"),
        r"residual width.* 16 of 32 units are left.*\(LayerNorm\).*semantics=\"kept\""),
    "width of a ViT": (networks.Vit, IMAGES, ("hidden", "head"),
        r"residual width.* 24 of 48 units are left.*norm1 \(LayerNorm\).*semantics=\"kept\""),
    "width of a GPT": (networks.Gpt, TOKENS, ("hidden", "head", "size"),
        r"residual width.* 24 of 48 units are left.*\(RMSNorm\).*semantics=\"kept\""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plain_module_equals_is_refused_by_name(name):
    build, x, spared, wanted = REFUSED[name]
    module = trained(build)
    with pytest.raises(ValueError, match=wanted):
        adapter.shrink(module, compacted(module, x, spared))
