"""Masks inside optax: every method keeps its masks in its state under the name ``masks``."""

from jaxprune.training.alternating import ac_dc as ac_dc
from jaxprune.training.core import MaskState as MaskState
from jaxprune.training.core import method as method
from jaxprune.training.dynamic import drop as drop
from jaxprune.training.dynamic import grow as grow
from jaxprune.training.dynamic import rigl as rigl
from jaxprune.training.dynamic import set as set
from jaxprune.training.dynamic import snfs as snfs
from jaxprune.training.forward import forward_params as forward_params
from jaxprune.training.prune import prune as prune
from jaxprune.training.sparse_params import KeepParamsSparseState as KeepParamsSparseState
from jaxprune.training.sparse_params import keep_params_sparse as keep_params_sparse
from jaxprune.training.static import one_shot as one_shot
from jaxprune.training.static import static as static
from jaxprune.training.straight_through import sr_ste as sr_ste
from jaxprune.training.straight_through import ste as ste
from jaxprune.training.straight_through import top_kast as top_kast
