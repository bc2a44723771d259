"""Models of other packages, in all frameworks."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.outside.model import (
    KEY,
    Model,
    Models,
    by_path,
    equinox_model,
    floats,
    haiku_model,
    linen,
    nnx_model,
    tokens,
)

MODELS = Models()

_PICTURES = floats(2, 32, 32, 3)
_RNGS = ("dropout",)


def linen_of(
    path: str, *args: Any, rngs: tuple[str, ...] = (), call: Any = (), **settings: Any
) -> Model:
    """A Linen module by the path of its class; ``call`` are keyword arguments of ``__call__``."""
    module = by_path(path)(**settings)
    return linen(module, *args, rngs=rngs, **dict(call))


def nnx_of(path: str, *args: Any, call: Any = (), **settings: Any) -> Model:
    from flax import nnx

    module = by_path(path)(**settings, rngs=nnx.Rngs(0))
    module.eval()
    return nnx_model(module, *args, **dict(call))


_FLAXMODELS = {"output": "logits", "pretrained": None, "num_classes": 5, "normalize": False}
for _name in ("ResNet18", "ResNet50", "VGG16"):
    MODELS.add(
        f"flaxmodels/{_name}",
        linen_of,
        f"flaxmodels.{_name}",
        _PICTURES,
        call={"train": False},
        **_FLAXMODELS,
    )
_NANODL = {"num_layers": 2, "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 64, "dropout": 0.0}
_TEXT = _NANODL | {
    "vocab_size": 50,
    "embed_dim": 32,
    "max_length": 8,
    "start_token": 0,
    "end_token": 1,
}
for _name in ("GPT3", "LaMDA", "Gemma", "LlaMA2"):
    _extra = {"num_groups": 2} if _name in ("Gemma", "LlaMA2") else {}
    MODELS.add(
        f"nanodl/{_name}", linen_of, f"nanodl.{_name}", tokens(2, 8), rngs=_RNGS, **_TEXT, **_extra
    )
MODELS.add(
    "nanodl/GPT4 (mixture)", linen_of, "nanodl.GPT4", tokens(2, 8), rngs=_RNGS, **_TEXT,
    num_experts=4, top_k=2,
)  # fmt: skip
MODELS.add(
    "nanodl/Mixtral", linen_of, "nanodl.Mixtral", tokens(2, 8), rngs=_RNGS, **_TEXT,
    num_groups=2, window_size=4, shift_size=2, num_experts=4, top_k=2,
)  # fmt: skip
for _name in ("ViT", "MLPMixer"):
    _size = (
        {"patch_size": (8, 8), "n_outputs": 5}
        if _name == "ViT"
        else {"patch_size": 8, "n_outputs": 5}
    )
    MODELS.add(
        f"nanodl/{_name}", linen_of, f"nanodl.{_name}", _PICTURES, rngs=_RNGS, **_NANODL, **_size
    )


def mamba2() -> Model:
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50, hidden_size=16, state_size=8, head_dim=8, chunk_size=4, num_hidden_layers=2
    )
    graphdef, params = nnx.split(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))

    def fn(p: Any, ids: Any) -> Any:
        return nnx.merge(graphdef, p)(ids)["logits"]

    return Model(fn, params, (tokens(2, 8),))


def mamba3() -> Model:
    from flax import nnx
    from mamba3_jax import Mamba3Config, Mamba3ForCausalLM

    config = Mamba3Config(
        vocab_size=50, hidden_size=16, state_size=8, head_dim=8, chunk_size=4, num_hidden_layers=2
    )
    graphdef, params = nnx.split(Mamba3ForCausalLM(config, rngs=nnx.Rngs(0)))
    return Model(lambda p, i: nnx.merge(graphdef, p)(i)["logits"], params, (tokens(2, 8),))


def nano_moe() -> Model:
    from nano_moe import NanoMoE, NanoMoEConfig

    config = NanoMoEConfig()
    fields = {
        "vocab_size": 50,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 32,
        "max_seq_len": 8,
    }
    known = {k: v for k, v in fields.items() if hasattr(config, k)}
    return linen(NanoMoE(NanoMoEConfig(**known)), tokens(2, 8), rngs=_RNGS)


def equinox_of(path: str, *args: Any, call: Any = None, **settings: Any) -> Model:
    module = by_path(path)(**settings, key=KEY)
    return equinox_model(module, *args, call=call)


def megalodon() -> Model:
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM

    config = MegalodonConfig(
        vocab_size=50, model_dim=32, num_layers=2, num_heads=2, z_dim=16, value_dim=32,
        ffn_hidden_dim=48, cema_ndim=4, chunk_size=8, norm_num_groups=4,
    )  # fmt: skip
    module = MegalodonForCausalLM(config, key=KEY)
    return equinox_model(module, tokens(2, 8), call=lambda m, i: m(i)[0], batch=False)


def egnn() -> Model:
    import jraph
    from egnn_jax import EGNN

    senders, receivers = np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 0, 2])

    def net(h: Any, x: Any) -> Any:
        graph = jraph.GraphsTuple(
            nodes=h, edges=None, senders=senders, receivers=receivers, globals=None,
            n_node=np.array([4]), n_edge=np.array([5]),
        )  # fmt: skip
        return EGNN(12, 3, num_layers=2)(graph, x)[0]

    return haiku_model(net, floats(4, 5), floats(4, 3, seed=1))


def graph_net(kind: str) -> Model:
    import haiku as hk
    import jraph

    senders, receivers = np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 0, 2])

    def net(nodes: Any, edges: Any) -> Any:
        graph = jraph.GraphsTuple(
            nodes=nodes, edges=edges, senders=senders, receivers=receivers,
            globals=jnp.ones((1, 2)), n_node=np.array([4]), n_edge=np.array([5]),
        )  # fmt: skip

        @jraph.concatenated_args
        def update(features: Any) -> Any:
            return jax.nn.relu(hk.Linear(12)(jax.nn.relu(hk.Linear(12)(features))))

        if kind == "GraphNetwork":
            layers = [jraph.GraphNetwork(update, update, update) for _ in range(2)]
        elif kind == "GAT":
            layers = [
                jraph.GAT(
                    lambda n: hk.Linear(12)(n),
                    lambda s, r, e: hk.Linear(1)(jnp.concatenate([s, r], -1)),
                    jax.nn.relu,
                )
                for _ in range(2)
            ]
        else:
            layers = [jraph.GraphConvolution(lambda n: jax.nn.relu(hk.Linear(12)(n)))] * 2
        for layer in layers:
            graph = layer(graph)
        return hk.Linear(3)(graph.nodes)

    return haiku_model(net, floats(4, 5), floats(5, 4, seed=1))


def jraphx(name: str) -> Model:
    edges = jnp.array([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    heads = {"heads": 2} if name == "GAT" else {}
    return nnx_of(
        f"jraphx.nn.models.{name}", floats(4, 5), edges, in_features=5, hidden_features=12,
        num_layers=3, out_features=3, **heads,
    )  # fmt: skip


def kan(layer: str) -> Model:
    from flax import nnx
    from jaxkan.models.KAN import KAN

    graphdef, params = nnx.split(KAN([4, 8, 8, 3], layer))
    return Model(lambda p, x: nnx.merge(graphdef, p)(x), params, (floats(5, 4),))


def gemma3() -> Model:
    from gemma import gm

    kinds = (gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL)
    config = gm.nn.config.TransformerConfig(
        num_embed=50, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8, num_kv_heads=2,
        final_logit_softcap=None, use_post_attn_norm=True, use_post_ffw_norm=True,
        attention_types=kinds, use_qk_norm=True, sliding_window_size=4, max_cache_length=16,
    )  # fmt: skip
    module = gm.nn.Transformer(config=config)
    params = jax.jit(module.init)(jax.random.key(0), tokens(2, 8))
    return Model(lambda p, i: module.apply(p, i).logits, params, (tokens(2, 8),))


def flow(kind: str) -> Model:
    import flowjax.distributions
    import flowjax.flows

    base = flowjax.distributions.Normal(jnp.zeros(4))
    built = getattr(flowjax.flows, kind)(KEY, base_dist=base, flow_layers=2, nn_width=16)
    return equinox_model(built, floats(5, 4), call=lambda d, x: d.log_prob(x), batch=False)


def unet_2d() -> Model:
    from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel

    module = FlaxUNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        attention_head_dim=8, cross_attention_dim=16,
    )  # fmt: skip
    args = floats(1, 4, 8, 8), jnp.ones((1,), jnp.int32), floats(1, 3, 16)
    params = jax.jit(module.init_weights)(jax.random.key(0))
    return Model(lambda p, *a: module.apply({"params": p}, *a).sample, params, args)


def vae() -> Model:
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    module = FlaxAutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=16)
    params = jax.jit(module.init_weights)(jax.random.key(0))
    return Model(
        lambda p, x: module.apply({"params": p}, x).sample, params, (floats(1, 3, 16, 16),)
    )


MODELS.add("mamba2_jax/Mamba2", mamba2)
MODELS.add("mamba3_jax/Mamba3", mamba3)
MODELS.add("nano_moe/NanoMoE", nano_moe)
MODELS.add("megalodon_jax/Megalodon", megalodon)
MODELS.add(
    "esm2quinox/ESM2",
    equinox_of,
    "esm2quinox.ESM2",
    tokens(2, 8, high=20),
    num_layers=2,
    embed_size=32,
    num_heads=4,
    token_dropout=False,
    call=lambda m, i: m(i).logits,
)
MODELS.add(
    "palm_jax/PaLM",
    equinox_of,
    "palm_jax.PaLM",
    tokens(2, 8),
    num_tokens=50,
    dim=32,
    dim_head=8,
    depth=2,
    heads=4,
)
MODELS.add("egnn_jax/EGNN", egnn)
for _name in ("GraphNetwork", "GraphConvolution", "GAT"):
    MODELS.add(f"jraph/{_name}", graph_net, _name)
for _name in ("GCN", "GAT", "GraphSAGE", "GIN"):
    MODELS.add(f"jraphx/{_name}", jraphx, _name)
for _name in ("spline", "chebyshev", "rbf", "fourier"):
    MODELS.add(f"jaxkan/KAN {_name}", kan, _name)
MODELS.add("gemma/Gemma 3", gemma3)
for _name in ("masked_autoregressive_flow", "coupling_flow"):
    MODELS.add(f"flowjax/{_name}", flow, _name)
MODELS.add("diffusers/UNet2DCondition", unet_2d)
MODELS.add("diffusers/AutoencoderKL", vae)
MODELS.add(
    "brax/MLP",
    linen_of,
    "brax.training.networks.MLP",
    floats(4, 6),
    layer_sizes=[16, 16, 3],
    layer_norm=True,
)
MODELS.add(
    "brax/SNMLP",
    linen_of,
    "brax.training.networks.SNMLP",
    floats(4, 6),
    layer_sizes=[16, 16, 3],
    rngs=("sing_vec",),
)
MODELS.add(
    "flaxdiff/SimpleDiT",
    linen_of,
    "flaxdiff.models.simple_dit.SimpleDiT",
    floats(2, 16, 16, 3),
    jnp.ones(2),
    floats(2, 4, 16),
    patch_size=8,
    emb_features=32,
    num_layers=2,
    num_heads=4,
)
MODELS.add(
    "flaxdiff/UViT",
    linen_of,
    "flaxdiff.models.simple_vit.UViT",
    floats(2, 16, 16, 3),
    jnp.ones(2),
    floats(2, 4, 32),
    patch_size=8,
    emb_features=32,
    num_layers=2,
    num_heads=4,
    norm_groups=0,
)
MODELS.add(
    "local_attention_flax/LocalAttention",
    linen_of,
    "local_attention_flax.LocalAttention",
    floats(2, 16, 12),
    dim=12,
    window_size=4,
    heads=4,
    dim_head=8,
)
MODELS.add(
    "neojax/FNO",
    lambda: equinox_model(
        importlib.import_module("neojax.models").FNO(KEY, 2, 1, 8, 2, (4, 4)), floats(2, 2, 16, 16)
    ),
)
