"""jaxprune: functional pruning transforms after which a network is really smaller and faster."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxprune import _renamed
from jaxprune import distributions as distributions
from jaxprune import masks as masks
from jaxprune import oneshot as oneshot
from jaxprune import plot as plot
from jaxprune import rules as rules
from jaxprune import sanity as sanity
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import training as training
from jaxprune.artefacts.export import Exported as Exported
from jaxprune.artefacts.export import export as export
from jaxprune.artefacts.export import load_exported as load_exported
from jaxprune.artefacts.save import load as load
from jaxprune.artefacts.save import save as save
from jaxprune.budget.api import pareto as pareto
from jaxprune.budget.api import prune_to_metric as prune_to_metric
from jaxprune.budget.api import search as search
from jaxprune.budget.latency import LatencyTable as LatencyTable
from jaxprune.budget.result import MetricResult as MetricResult
from jaxprune.budget.result import ParetoFront as ParetoFront
from jaxprune.budget.result import SearchResult as SearchResult
from jaxprune.budget.roofline import DEVICES as DEVICES
from jaxprune.budget.roofline import Device as Device
from jaxprune.budget.roofline import device as device
from jaxprune.budget.search import Search as Search
from jaxprune.budget.sensitivity import Sensitivity as Sensitivity
from jaxprune.budget.sensitivity import sensitivity as sensitivity
from jaxprune.budget.target import Target as Target
from jaxprune.calibration.api import Stats as Stats
from jaxprune.calibration.api import calibrate as calibrate
from jaxprune.compaction.api import Compact as Compact
from jaxprune.compaction.api import compact as compact
from jaxprune.costs.api import Cost as Cost
from jaxprune.costs.api import cost as cost
from jaxprune.distributions import erk as erk
from jaxprune.distributions import global_threshold as global_threshold
from jaxprune.distributions import uniform as uniform
from jaxprune.masks import apply_masks as apply_masks
from jaxprune.masks import density as density
from jaxprune.measuring import Comparison as Comparison
from jaxprune.measuring import Timing as Timing
from jaxprune.measuring import benchmark as benchmark
from jaxprune.measuring import compare as compare
from jaxprune.patterns import block as block
from jaxprune.patterns import channel as channel
from jaxprune.patterns import is_kernel as is_kernel
from jaxprune.patterns import n_m as n_m
from jaxprune.patterns import threshold as threshold
from jaxprune.patterns import unstructured as unstructured
from jaxprune.report import Summary as Summary
from jaxprune.report import summary as summary
from jaxprune.scores import batch_norm_scale as batch_norm_scale
from jaxprune.scores import magnitude as magnitude
from jaxprune.scores import random as random
from jaxprune.scores import saliency as saliency
from jaxprune.scores import wanda as wanda
from jaxprune.structure.patterns import structured as structured
from jaxprune.structure.structure import Dimension as Dimension
from jaxprune.structure.structure import Structure as Structure
from jaxprune.structure.structure import infer_structure as infer_structure
from jaxprune.training import keep_params_sparse as keep_params_sparse
from jaxprune.training import prune as prune
from jaxprune.typing import path_str as path_str

if not _TYPE_CHECKING:  # A type checker would take every name to be there.

    def __getattr__(name):
        raise _renamed.no_attribute(__name__, name)
