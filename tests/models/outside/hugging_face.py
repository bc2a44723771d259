"""Flax models of Hugging Face transformers, small, from their configurations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp

from tests.models.outside.model import Model, Models, floats, tokens

MODELS = Models()

_ENCODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_DECODER = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_WAV2VEC2 = dict(
    _ENCODER,
    conv_dim=(8, 8),
    conv_stride=(4, 2),
    conv_kernel=(8, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    vocab_size=20,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
)


def transformer(
    model: str, config: str, settings: dict[str, Any], *args: Any, **init: Any
) -> Model:
    """A Flax model of transformers by class names, called with its own ``__call__``."""
    import transformers

    built = getattr(transformers, config)(**settings)
    module = getattr(transformers, model)(built, seed=0, **init)
    names = ["pixel_values" if args[0].ndim == 4 else "input_ids"]
    names += ["decoder_input_ids"] * (len(args) > 1)
    if "Wav2Vec2" in model:
        names = ["input_values"]
    if "Whisper" in model:
        names = ["input_features", "decoder_input_ids"]

    def fn(params: Any, *args: Any) -> Any:
        return module(**dict(zip(names, args, strict=True)), params=params).logits

    return Model(fn, module.params, args)


def hf(model: str, config: str, settings: dict[str, Any], *args: Any, **init: Any) -> None:
    name = model.removeprefix("Flax").removesuffix("Model")
    MODELS[f"hf/{name}"] = partial(transformer, model, config, settings, *args, **init)


_IDS = tokens(2, 8)
_IMAGES = floats(2, 3, 16, 16)
_PAIR = (_IDS, tokens(2, 6, seed=1))

hf("FlaxBertForMaskedLM", "BertConfig", _ENCODER, _IDS)
hf("FlaxBertForSequenceClassification", "BertConfig", _ENCODER, _IDS)
hf("FlaxRobertaForMaskedLM", "RobertaConfig", _ENCODER, _IDS)
hf("FlaxXLMRobertaForTokenClassification", "XLMRobertaConfig", _ENCODER, _IDS)
hf("FlaxRobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", _ENCODER, _IDS)
hf("FlaxAlbertForMaskedLM", "AlbertConfig", _ENCODER | {"embedding_size": 16}, _IDS)
hf("FlaxElectraForMaskedLM", "ElectraConfig", _ENCODER | {"embedding_size": 16}, _IDS)
hf("FlaxElectraForSequenceClassification", "ElectraConfig", _ENCODER | {"embedding_size": 32}, _IDS)
hf("FlaxRoFormerForMaskedLM", "RoFormerConfig", _ENCODER | {"embedding_size": 32}, _IDS)
hf("FlaxBigBirdForMaskedLM", "BigBirdConfig", _ENCODER | {"attention_type": "original_full"}, _IDS)
hf(
    "FlaxDistilBertForSequenceClassification",
    "DistilBertConfig",
    {
        "vocab_size": 50,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 24,
    },
    _IDS,
)
_GPT2 = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 1,
}
hf("FlaxGPT2LMHeadModel", "GPT2Config", _GPT2 | {"eos_token_id": 2}, _IDS)
hf("FlaxGPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4, "eos_token_id": 2}, _IDS)
hf(
    "FlaxGPTNeoForCausalLM",
    "GPTNeoConfig",
    _DECODER | {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    _IDS,
)
hf("FlaxLlamaForCausalLM", "LlamaConfig", _DECODER | {"num_key_value_heads": 2}, _IDS)
hf("FlaxMistralForCausalLM", "MistralConfig", _DECODER | {"num_key_value_heads": 2}, _IDS)
hf(
    "FlaxGemmaForCausalLM",
    "GemmaConfig",
    _DECODER | {"num_key_value_heads": 2, "head_dim": 8, "hidden_activation": "gelu"},
    _IDS,
)
hf(
    "FlaxBloomForCausalLM",
    "BloomConfig",
    {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    _IDS,
)
hf(
    "FlaxOPTForCausalLM",
    "OPTConfig",
    _DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    _IDS,
)
hf(
    "FlaxXGLMForCausalLM",
    "XGLMConfig",
    _DECODER | {"d_model": 32, "ffn_dim": 64, "attention_heads": 4, "num_layers": 2},
    _IDS,
)
for _family in ("Bart", "MBart", "Pegasus", "Blenderbot", "BlenderbotSmall"):
    hf(f"Flax{_family}ForConditionalGeneration", f"{_family}Config", _SEQ2SEQ, *_PAIR)
hf(
    "FlaxBartForSequenceClassification",
    "BartConfig",
    _SEQ2SEQ | {"num_labels": 3},
    tokens(2, 8).at[:, -1].set(2),
)
hf("FlaxMarianMTModel", "MarianConfig", _SEQ2SEQ, *_PAIR)
hf("FlaxT5ForConditionalGeneration", "T5Config", _T5, *_PAIR)
hf(
    "FlaxMT5ForConditionalGeneration",
    "MT5Config",
    _T5 | {"feed_forward_proj": "gated-gelu"},
    *_PAIR,
)
hf(
    "FlaxLongT5ForConditionalGeneration",
    "LongT5Config",
    _T5 | {"local_radius": 3, "encoder_attention_type": "local"},
    *_PAIR,
)
hf("FlaxViTForImageClassification", "ViTConfig", _VISION, _IMAGES)
hf("FlaxBeitForImageClassification", "BeitConfig", _VISION, _IMAGES)
hf("FlaxDinov2ForImageClassification", "Dinov2Config", _VISION | {"mlp_ratio": 2}, _IMAGES)
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "num_labels": 5}
hf(
    "FlaxResNetForImageClassification",
    "ResNetConfig",
    _STAGES | {"layer_type": "bottleneck"},
    floats(2, 3, 32, 32),
)
hf(
    "FlaxRegNetForImageClassification",
    "RegNetConfig",
    _STAGES | {"groups_width": 4, "layer_type": "y"},
    floats(2, 3, 32, 32),
)
hf("FlaxWav2Vec2ForCTC", "Wav2Vec2Config", _WAV2VEC2, floats(2, 400), input_shape=(1, 400))
hf(
    "FlaxWhisperForConditionalGeneration",
    "WhisperConfig",
    _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
    floats(2, 8, 20),
    tokens(2, 6),
    input_shape=(1, 8, 20),
)


def clip() -> Model:
    import transformers

    text = _ENCODER | {"projection_dim": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = _VISION | {"projection_dim": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    module = transformers.FlaxCLIPModel(config, input_shape=((1, 8), (1, 16, 16, 3)))

    def fn(params: Any, ids: Any, images: Any) -> Any:
        return module(ids, images, params=params).logits_per_image

    return Model(fn, module.params, (_IDS, _IMAGES))


MODELS.add("hf/CLIP", clip)


def pair_of_encoder_and_decoder(kind: str) -> Model:
    """An encoder of text, images or sound with a GPT-2 that attends to it."""
    import transformers

    gpt2 = transformers.GPT2Config(
        **_GPT2, eos_token_id=2, pad_token_id=0, add_cross_attention=True
    )
    encoders = {
        "Encoder": (transformers.BertConfig(**_ENCODER), _IDS, "input_ids"),
        "VisionEncoder": (transformers.ViTConfig(**_VISION), _IMAGES, "pixel_values"),
        "SpeechEncoder": (transformers.Wav2Vec2Config(**_WAV2VEC2), floats(2, 400), "inputs"),
    }
    encoder, source, name = encoders[kind]
    prefix = kind.replace("Encoder", "EncoderDecoder")
    config_class = getattr(transformers, f"{prefix}Config")
    config = config_class.from_encoder_decoder_configs(encoder, gpt2)
    shapes = {"SpeechEncoder": {"input_shape": ((1, 400), (1, 6))}}
    module = getattr(transformers, f"Flax{prefix}Model")(config, **shapes.get(kind, {}))

    def fn(params: Any, source: Any, ids: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        given = {name: source, "decoder_input_ids": ids, "decoder_position_ids": positions}
        return module(**given, params=params).logits

    return Model(fn, module.params, (source, _PAIR[1]))


for _kind in ("Encoder", "VisionEncoder", "SpeechEncoder"):
    MODELS.add(f"hf/{_kind}Decoder", pair_of_encoder_and_decoder, _kind)
