"""Masks inside optax: prune while training."""

from jaxprune.training.prune import PruneState as PruneState
from jaxprune.training.prune import prune as prune
from jaxprune.training.sparse_params import keep_params_sparse as keep_params_sparse
