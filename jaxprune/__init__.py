"""jaxprune: functional pruning transforms after which a network is really smaller and faster.

Names in the order of the way: params -> scores -> masks -> structure -> small model -> its speed.
"""

import importlib.metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxprune import _renamed

# Namespaces: what is not used in every program.
from jaxprune import budget as budget
from jaxprune import distributions as distributions
from jaxprune import experts as experts
from jaxprune import masks as masks
from jaxprune import oneshot as oneshot
from jaxprune import patterns as patterns
from jaxprune import plot as plot
from jaxprune import recovery as recovery
from jaxprune import reduce as reduce
from jaxprune import rules as rules
from jaxprune import runtimes as runtimes
from jaxprune import sanity as sanity
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import training as training
from jaxprune import typing as typing

# Keeping.
from jaxprune.artefacts.export import export as export
from jaxprune.artefacts.export import load_exported as load_exported
from jaxprune.artefacts.save import load as load
from jaxprune.artefacts.save import save as save

# Choosing.
from jaxprune.budget.api import pareto as pareto
from jaxprune.budget.api import prune_to_metric as prune_to_metric
from jaxprune.budget.api import search as search
from jaxprune.budget.search import Search as Search
from jaxprune.budget.sensitivity import sensitivity as sensitivity
from jaxprune.budget.target import Target as Target

# Statistics, structure and compaction.
from jaxprune.calibration.api import calibrate as calibrate
from jaxprune.compaction.api import compact as compact

# Measuring.
from jaxprune.costs.api import cost as cost
from jaxprune.distributions import erk as erk
from jaxprune.distributions import global_threshold as global_threshold
from jaxprune.distributions import uniform as uniform
from jaxprune.masks import apply_masks as apply_masks
from jaxprune.masks import density as density
from jaxprune.measuring import benchmark as benchmark
from jaxprune.measuring import compare as compare

# Scores, patterns, training.
from jaxprune.patterns import block as block
from jaxprune.patterns import channel as channel
from jaxprune.patterns import is_kernel as is_kernel
from jaxprune.patterns import n_m as n_m
from jaxprune.patterns import structured as structured
from jaxprune.patterns import threshold as threshold
from jaxprune.patterns import unstructured as unstructured
from jaxprune.recovery import recover as recover
from jaxprune.report import summary as summary
from jaxprune.runtimes.freezing import freeze as freeze
from jaxprune.scores import magnitude as magnitude
from jaxprune.scores import random as random
from jaxprune.scores import saliency as saliency
from jaxprune.scores import wanda as wanda
from jaxprune.structure.api import infer_structure as infer_structure
from jaxprune.training import keep_params_sparse as keep_params_sparse
from jaxprune.training import prune as prune

__version__ = _metadata.version("jaxprune")
_SPACES = (
    "budget", "distributions", "experts", "masks", "oneshot", "patterns", "plot", "recovery",
    "reduce", "rules", "runtimes", "sanity", "schedules", "scores", "training", "typing",
)  # fmt: skip
__all__ = [n for n, x in globals().items() if n[0] != "_" and (callable(x) or n in _SPACES)]
_elsewhere = _renamed.missing("jp")

# These names have moved to a namespace, and are still found here.
_NAMESPACES = {
    "budget": ("DEVICES", "Device", "LatencyTable", "Sensitivity", "device"),
    "scores": ("batch_norm_scale",),
    "typing": (
        "Compact", "Comparison", "Cost", "Dimension", "Exported", "Stats", "Structure", "Summary",
        "Timing", "path_str",
    ),
}  # fmt: skip
_MOVED = {name: namespace for namespace, names in _NAMESPACES.items() for name in names}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not _TYPE_CHECKING:  # A type checker would take every name to be there.

    def __getattr__(name: str) -> object:
        if name in _MOVED:
            return getattr(globals()[_MOVED[name]], name)
        return _elsewhere(name)
