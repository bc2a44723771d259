"""qwix's integers through structure and compaction; the reference is the masked quantised model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

qwix = pytest.importorskip("qwix")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="first")(x))
        return nn.Dense(10, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


@pytest.mark.parametrize("activations", [None, "int8"])
def test_quantised_networks_are_cut_like_others(activations):
    net, x = Net(), jax.random.normal(jax.random.key(1), (4, 8))
    params = net.init(jax.random.key(0), x)
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype=activations)
    ptq = qwix.quantize_model(net, qwix.PtqProvider([rule]))
    held = qwix.quantize_params(params, jax.eval_shape(ptq.init, jax.random.key(0), x))
    structure = jp.infer_structure(ptq.apply, held, x)
    free = [d for d in structure.dims.values() if not d.frozen]
    assert sorted(d.size for d in free) == [16, 32]
    masks = structure.masks({d.name: np.arange(d.size) % 2 == 0 for d in free})
    small = jp.compact(ptq.apply, held, masks, x)
    wanted = ptq.apply(jp.apply_masks(held, masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), wanted, rtol=1e-5, atol=1e-6)
    assert small.certificate.exact or activations
    kernel = small.params["params"]["up"]["kernel"].array
    assert kernel.qvalue.shape == (8, 16) and kernel.qvalue.dtype == jnp.int8
    assert kernel.scale.shape == (1, 16)
