"""Scores: ``(params, **evidence) -> scores``, the same tree; larger = keep."""

from jaxprune.scores.gradients import saliency as saliency
from jaxprune.scores.gradients import taylor as taylor
from jaxprune.scores.weights import batch_norm_scale as batch_norm_scale
from jaxprune.scores.weights import l2 as l2
from jaxprune.scores.weights import magnitude as magnitude
from jaxprune.scores.weights import random as random
