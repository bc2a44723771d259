"""Distributions: one global sparsity -> one sparsity per leaf.

Each takes a tree of scores and a sparsity, a number or traced, and returns a scalar per leaf.
Patterns pass a dict {path: scores} of the leaves that they prune, with one score per unit that
lives or dies as a whole: an entry, a block, a channel.
"""

from jaxprune.distributions.outliers import owl as owl
from jaxprune.distributions.ranked import counts_of as counts_of
from jaxprune.distributions.ranked import global_threshold as global_threshold
from jaxprune.distributions.ranked import lamp as lamp
from jaxprune.distributions.rules import ByPath as ByPath
from jaxprune.distributions.rules import Rule as Rule
from jaxprune.distributions.rules import as_distribution as as_distribution
from jaxprune.distributions.rules import by_depth as by_depth
from jaxprune.distributions.rules import by_path as by_path
from jaxprune.distributions.rules import like as like
from jaxprune.distributions.rules import without_ends as without_ends
from jaxprune.distributions.shapes import erk as erk
from jaxprune.distributions.shapes import uniform as uniform
