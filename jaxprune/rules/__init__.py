"""One file per primitive family; importing this package fills the table.

A primitive that is not in the table is opaque: what it touches can't be pruned. :func:`register`
teaches jaxprune one of your own, with a ready-made rule (:func:`elementwise`, :func:`named_axes`),
the rule of a primitive that it is like, or a hand-written :class:`Rule`. See docs/write_a_rule.md.
"""

from jaxprune.rules import attention as attention
from jaxprune.rules import collective as collective
from jaxprune.rules import contraction as contraction
from jaxprune.rules import control as control
from jaxprune.rules import derivatives as derivatives
from jaxprune.rules import indexing as indexing
from jaxprune.rules import layout as layout
from jaxprune.rules import linalg as linalg
from jaxprune.rules import pointwise as pointwise
from jaxprune.rules import random as random
from jaxprune.rules import reduction as reduction
from jaxprune.rules import shards as shards
from jaxprune.rules import window as window
from jaxprune.rules.declared import elementwise as elementwise
from jaxprune.rules.declared import named_axes as named_axes
from jaxprune.rules.registered import register as register
from jaxprune.rules.registry import Mix as Mix
from jaxprune.rules.registry import Rule as Rule
from jaxprune.rules.zeros import Zeros as Zeros
