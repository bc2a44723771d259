"""One-shot pruning: masks from calibration statistics, and kept weights changed to repair outputs.

All methods take ``stats = jp.calibrate(fn, params, batches)``. Those that choose masks give
``Pruned(params, masks)``. After ``masks = jp.structured(structure)(scores, sparsity)`` there are
two repairs of whole units: ``refit`` changes the kept rows of each consumer (least squares), and
``compensate`` puts the mean of what was removed into a bias.
"""

from jaxprune._renamed import missing
from jaxprune.oneshot._alps import alps as alps
from jaxprune.oneshot._compensate import compensate as compensate
from jaxprune.oneshot._dsnot import dsnot as dsnot
from jaxprune.oneshot._obc import obc as obc
from jaxprune.oneshot._osscar import osscar as osscar
from jaxprune.oneshot._refit import least_squares as least_squares
from jaxprune.oneshot._refit import output_error as output_error
from jaxprune.oneshot._refit import refit as refit
from jaxprune.oneshot._run import Pruned as Pruned
from jaxprune.oneshot._sequential import sequential as sequential
from jaxprune.oneshot._sparsegpt import sparsegpt as sparsegpt
from jaxprune.oneshot.permutation import permute as permute
from jaxprune.oneshot.permutation import permuted as permuted

# These stand on the methods above, and in a room of their own.
from jaxprune.streaming.api import Streamed as Streamed  # isort: skip
from jaxprune.streaming.api import stream as stream  # isort: skip
from jaxprune.streaming.api import survey as survey  # isort: skip
from jaxprune.streaming.checkpoint import Checkpoint as Checkpoint  # isort: skip
from jaxprune.streaming.checkpoint import Transposed as Transposed  # isort: skip

__getattr__ = missing("jp.oneshot")
