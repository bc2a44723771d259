"""Packages of Equinox models: vision, physics."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import jax.numpy as jnp

from tests.models.outside.model import (
    KEY,
    Model,
    Models,
    equinox_model,
    floats,
    stateful_equinox,
    tokens,
)

MODELS = Models()

CHW, IMAGES, SERIES = floats(2, 3, 32, 32), floats(2, 32, 32, 3), floats(2, 6, 5)


def equimo(path: str, *args: Any, **settings: Any) -> Model:
    module, name = path.rsplit(".", 1)
    built = getattr(importlib.import_module(f"equimo.models.{module}"), name)(
        **settings, num_classes=5, key=KEY
    )
    return equinox_model(built, *args, call=lambda m, x: m(x, KEY, inference=True))


_EQUIMO: dict[str, dict[str, Any]] = {
    "vit.VisionTransformer": {
        "img_size": 64,
        "in_channels": 3,
        "dim": 16,
        "patch_size": 16,
        "num_heads": 4,
        "depths": [2],
        "init_values": 0.1,
    },
    "convnext.ConvNeXt": {"in_channels": 3, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "attnet.AttNet": {"in_channels": 3, "dims": [32] * 4, "depths": [1, 1, 1, 1]},
    "fastervit.FasterViT": {
        "img_size": 64,
        "in_channels": 3,
        "dim": 8,
        "in_dim": 8,
        "num_heads": [2, 2, 2, 4],
        "hat": [False] * 4,
        "depths": [1, 1, 1, 1],
        "window_size": [4, 4, 2, 2],
        "ct_size": 1,
    },
    "lowformer.LowFormer": {
        "in_channels": 3,
        "widths": [8, 8, 16, 16, 16],
        "depths": [0, 1, 1, 1, 1],
        "att_strides": [1, 1, 1, 1, 1],
        "block_types": ["conv", "conv", "conv", "attention", "attention"],
        "attention_type": "softmax",
    },
    "mlla.Mlla": {
        "img_size": 64,
        "in_channels": 3,
        "dim": 8,
        "patch_size": 4,
        "depths": [1, 1],
        "num_heads": [2, 4],
    },
    "partialformer.PartialFormer": {
        "img_size": 64,
        "in_channels": 3,
        "dim": 8,
        "num_heads": 2,
        "depths": [1, 1],
        "foreground_ratios": 0.5,
        "patch_size": 4,
    },
    "reduceformer.ReduceFormer": {
        "in_channels": 3,
        "widths": [8, 8, 16, 16, 16],
        "depths": [1, 1, 1, 1, 1],
        "head_dim": 8,
        "block_types": ["conv", "conv", "conv", "attention", "attention"],
    },
    "vssd.Vssd": {
        "img_size": 64,
        "in_channels": 3,
        "dim": 8,
        "d_state": 4,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "attentions_layers": ("mamba2mixer", "attention"),
    },
}
for _path, _settings in _EQUIMO.items():
    _images = floats(2, 3, 64, 64)
    MODELS.add(f"equimo/{_path.split('.')[1]}", equimo, _path, _images, **_settings)


def pdequinox(name: str, **settings: Any) -> Model:
    import pdequinox as pdeqx

    module = getattr(pdeqx.arch, name)(1, 1, 1, **settings, key=KEY)
    return equinox_model(module, floats(2, 1, 32))


MODELS.add(
    "pdequinox/ClassicFNO", pdequinox, "ClassicFNO", hidden_channels=8, num_modes=4, num_blocks=2
)
for _name in ("ClassicResNet", "ModernResNet"):
    MODELS.add(
        f"pdequinox/{_name}", pdequinox, _name, hidden_channels=8, num_blocks=2, use_norm=True
    )
for _name in ("ClassicUNet", "ModernUNet"):
    MODELS.add(f"pdequinox/{_name}", pdequinox, _name, hidden_channels=8, num_levels=2)
MODELS.add("pdequinox/DilatedResNet", pdequinox, "DilatedResNet", hidden_channels=8, num_blocks=1)
MODELS.add("pdequinox/ConvNet", pdequinox, "ConvNet", hidden_channels=8, depth=3)
MODELS.add("pdequinox/MLP", pdequinox, "MLP", num_points=32, width_size=16)


def jaxon(path: str, image: Any = CHW, call: Any = None, **settings: Any) -> Model:
    module, name = path.rsplit(".", 1)
    found = getattr(importlib.import_module(f"jaxonmodels.models.{module}"), name)
    build = partial(found, **settings, key=KEY)
    return stateful_equinox(build, image, call=call)


def jaxon_efficientnet() -> Model:
    from jaxonmodels.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2)]
    return stateful_equinox(
        lambda: EfficientNet(blocks, 0.0, n_classes=5, last_channel=32, key=KEY),
        CHW,
        call=lambda m, s, x: m(x, s, KEY),
    )


def jaxon_resnet(block: str, **settings: Any) -> Model:
    from jaxonmodels.models import resnet

    def build() -> Any:
        return resnet.ResNet(
            getattr(resnet, block),
            [1, 1, 1, 1],
            n_classes=5,
            zero_init_residual=False,
            replace_stride_with_dilation=None,
            key=KEY,
            **settings,
        )

    return stateful_equinox(build, CHW, call=lambda m, s, x: m(x, s, inference=True))


def jaxon_convnext() -> Model:
    from jaxonmodels.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return stateful_equinox(
        lambda: ConvNeXt(blocks, 0.0, 0.1, 5, None, None, True, KEY, jnp.float32),
        CHW,
        call=lambda m, s, x: m(x, s, KEY),
    )


def jaxon_swin(version: str) -> Model:
    from jaxonmodels.models import swin_transformer as swin

    block, merge = {
        "v1": (swin.SwinTransformerBlock, swin.PatchMerging),
        "v2": (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    }[version]

    def build() -> Any:
        return swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            mlp_ratio=2.0,
            dropout=0.0,
            attention_dropout=0.0,
            stochastic_depth_prob=0.0,
            num_classes=5,
            norm_layer=None,
            block=block,
            downsample_layer=merge,
            inference=True,
            key=KEY,
            dtype=jnp.float32,
        )

    return stateful_equinox(build, CHW, call=lambda m, s, x: m(x, s, KEY))


MODELS.add("jaxonmodels/EfficientNet", jaxon_efficientnet)
MODELS.add("jaxonmodels/ResNet basic", jaxon_resnet, "BasicBlock", groups=1, width_per_group=64)
MODELS.add("jaxonmodels/ResNeXt", jaxon_resnet, "Bottleneck", groups=4, width_per_group=4)
MODELS.add("jaxonmodels/ConvNeXt", jaxon_convnext)
MODELS.add("jaxonmodels/Swin v1", jaxon_swin, "v1")
MODELS.add("jaxonmodels/Swin v2", jaxon_swin, "v2")
MODELS.add(
    "jaxonmodels/ViT",
    jaxon,
    "vit.VisionTransformer",
    input_resolution=32,
    patch_size=8,
    width=16,
    layers=2,
    heads=4,
    output_dim=5,
)
MODELS.add(
    "jaxonmodels/Mamba",
    jaxon,
    "mamba.Mamba",
    tokens(2, 8),
    call=lambda m, s, x: (m(x), s),
    n_embd=16,
    n_dims=40,
    n_layers=2,
    d_state=4,
)
