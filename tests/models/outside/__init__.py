"""Small instances of models in Flax Linen, NNX, Haiku, Equinox and plain JAX, by group.

A module of this package is a group: it holds ``MODELS``, from names to builders. Where a group
takes its models from several packages, builders import them inside: one that is missing costs
its rows only.
"""

GROUPS = (
    "linen",
    "nnx",
    "haiku",
    "equinox",
    "plain",
    "papers",
    "states",
    "hugging_face",
    "equinox_packages",
    "packages",
)
PACKAGES = [
    "brax",
    "diffusers",
    "dm-haiku",
    "egnn_jax",
    "Equimo",
    "equinox",
    "esm2quinox",
    "flaxdiff",
    "flaxmodels",
    "flowjax",
    "gemma",
    "jaxkan",
    "jaxonmodels",
    "jraph",
    "jraphx",
    "local-attention-flax",
    "mamba2-jax",
    "mamba3-jax",
    "megalodon-jax",
    "nano-moe-jax",
    "nanodl",
    "neojax-operators",
    "PaLM-jax",
    "pdequinox",
    "transformers",
]
