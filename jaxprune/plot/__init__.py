"""Pictures: what pruning costs in accuracy and brings in time, where it cuts, what hangs together.

Colours are Okabe and Ito's, told apart by colour-blind readers, and nothing is told by colour
alone. Each function draws on ``ax`` (a new figure if None) and returns it. Needs matplotlib:
``pip install "jaxprune[plot]"``.
"""

from jaxprune.plot._widths import widths as widths
from jaxprune.plot.curves import accuracy_density as accuracy_density
from jaxprune.plot.curves import accuracy_speedup as accuracy_speedup
from jaxprune.plot.curves import densities as densities
from jaxprune.plot.curves import mask as mask
from jaxprune.plot.curves import measured_theoretical as measured_theoretical
from jaxprune.plot.curves import over_steps as over_steps
from jaxprune.plot.curves import sensitivity as sensitivity
from jaxprune.plot.dimensions import structure as structure
