"""Masks inside optax: every method keeps its masks in its state under the name ``masks``."""

from jaxprune.training.prune import PruneState as PruneState
from jaxprune.training.prune import prune as prune
from jaxprune.training.sparse_params import KeepParamsSparseState as KeepParamsSparseState
from jaxprune.training.sparse_params import keep_params_sparse as keep_params_sparse
