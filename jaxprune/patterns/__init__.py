"""Patterns: scores + sparsity -> masks. The only place where masks are born.

Each factory returns a ``Pattern``, called as ``(scores, sparsity) -> masks``. Leaves that ``where``
doesn't mean get a scalar True. Within a leaf the entries (or blocks, or channels) of largest score
are kept, among equals the earlier ones, so that counts are exact and a higher sparsity gives a
subset.
"""

from jaxprune.patterns._block import block as block
from jaxprune.patterns._channel import channel as channel
from jaxprune.patterns._n_m import n_m as n_m
from jaxprune.patterns._structured import structured as structured
from jaxprune.patterns._threshold import threshold as threshold
from jaxprune.patterns._unstructured import UNSTRUCTURED as UNSTRUCTURED
from jaxprune.patterns._unstructured import unstructured as unstructured
from jaxprune.patterns.accepted import as_pattern as as_pattern
from jaxprune.patterns.choose import is_kernel as is_kernel
from jaxprune.typing import Pattern as Pattern
