"""Masks inside optax: every method keeps its masks in its state under the name ``masks``.

=================  ==============================================================  ==============
method             masks                                                           params hold
=================  ==============================================================  ==============
static             made by ``init``, at random or by any score, for good           zeros
one_shot           made at one step                                                zeros
prune              follow a score and a schedule (GMP)                             zeros
iterative          one set per round of training, with rewinding (a driver)        zeros
set, rigl, snfs    drop the smallest, grow at random / by gradient / by momentum   zeros
ac_dc              sparse and dense phases take turns                              zeros
regularized        one_shot after a penalty: l1, group_lasso, network_slimming     zeros
ste, sr_ste        the best of the stored weights, after each step                 all weights
top_kast           two nested sets: used, and learning                             all weights
movement           by where weights go; soft_movement with a threshold             all weights
soft_threshold     each leaf learns the threshold that shrinks it (STR)            all weights
admm               those of the sparse network that params are drawn to            all weights
=================  ==============================================================  ==============

Where params hold all weights, the network computes with ``forward_params(params, opt_state)``.
What is evaluated, saved and served is ``masked_params(params, opt_state)``.
"""

from jaxprune._renamed import missing
from jaxprune.training._admm import admm as admm
from jaxprune.training._movement import movement as movement
from jaxprune.training._movement import soft_movement as soft_movement
from jaxprune.training._prune import prune as prune
from jaxprune.training._soft_threshold import SoftThresholds as SoftThresholds
from jaxprune.training._soft_threshold import soft_threshold as soft_threshold
from jaxprune.training._static import one_shot as one_shot
from jaxprune.training._static import static as static
from jaxprune.training.alternating import ac_dc as ac_dc
from jaxprune.training.core import MaskState as MaskState
from jaxprune.training.core import method as method
from jaxprune.training.dense import dense_method as dense_method
from jaxprune.training.distillation import activation_map_loss as activation_map_loss
from jaxprune.training.distillation import attention_loss as attention_loss
from jaxprune.training.distillation import distill as distill
from jaxprune.training.distillation import hidden_loss as hidden_loss
from jaxprune.training.distillation import logit_loss as logit_loss
from jaxprune.training.distillation import projection as projection
from jaxprune.training.dynamic import drop as drop
from jaxprune.training.dynamic import grow as grow
from jaxprune.training.dynamic import rigl as rigl
from jaxprune.training.dynamic import set as set
from jaxprune.training.dynamic import snfs as snfs
from jaxprune.training.forward import forward_params as forward_params
from jaxprune.training.forward import masked_params as masked_params
from jaxprune.training.packing import packed as packed
from jaxprune.training.penalties import AddPenaltyState as AddPenaltyState
from jaxprune.training.penalties import add_penalty as add_penalty
from jaxprune.training.penalties import group_lasso as group_lasso
from jaxprune.training.penalties import l1 as l1
from jaxprune.training.penalties import network_slimming as network_slimming
from jaxprune.training.penalties import regularized as regularized
from jaxprune.training.rewinding import Round as Round
from jaxprune.training.rewinding import iterative as iterative
from jaxprune.training.rewinding import set_masks as set_masks
from jaxprune.training.sparse_params import KeepParamsSparseState as KeepParamsSparseState
from jaxprune.training.sparse_params import keep_params_sparse as keep_params_sparse
from jaxprune.training.straight_through import sr_ste as sr_ste
from jaxprune.training.straight_through import ste as ste
from jaxprune.training.straight_through import top_kast as top_kast

__getattr__ = missing("jp.training")
