"""One-shot pruning: masks from calibration statistics, and kept weights changed to repair outputs.

All methods take ``stats = jp.calibrate(fn, params, batches)``.
"""

from jaxprune.oneshot._alps import alps as alps
from jaxprune.oneshot._dsnot import dsnot as dsnot
from jaxprune.oneshot._obc import obc as obc
from jaxprune.oneshot._refit import least_squares as least_squares
from jaxprune.oneshot._refit import output_error as output_error
from jaxprune.oneshot._refit import refit as refit
from jaxprune.oneshot._sequential import sequential as sequential
from jaxprune.oneshot._sparsegpt import sparsegpt as sparsegpt
from jaxprune.oneshot.permutation import permute as permute
from jaxprune.oneshot.permutation import permuted as permuted
from jaxprune.oneshot.structured import activation_energy as activation_energy
from jaxprune.oneshot.structured import compensate as compensate
from jaxprune.oneshot.structured import flap as flap
