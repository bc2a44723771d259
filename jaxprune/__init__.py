"""jaxprune: functional pruning transforms after which a network is really smaller and faster."""

from jaxprune.types import path_str as path_str
