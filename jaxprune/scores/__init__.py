"""Scores: ``(params, **evidence) -> scores``, the same tree; larger = keep."""

from jaxprune.scores import evidence as evidence
from jaxprune.scores.activations import Activity as Activity
from jaxprune.scores.activations import activity as activity
from jaxprune.scores.activations import apoz as apoz
from jaxprune.scores.activations import mean_activation as mean_activation
from jaxprune.scores.activations import wanda as wanda
from jaxprune.scores.channels import batch_norm_scale as batch_norm_scale
from jaxprune.scores.channels import fpgm as fpgm
from jaxprune.scores.controls import inverted as inverted
from jaxprune.scores.controls import smallest as smallest
from jaxprune.scores.curvature import adam_fisher as adam_fisher
from jaxprune.scores.curvature import fisher as fisher
from jaxprune.scores.curvature import obd as obd
from jaxprune.scores.curvature import woodfisher as woodfisher
from jaxprune.scores.flow import synflow as synflow
from jaxprune.scores.gradients import grasp as grasp
from jaxprune.scores.gradients import movement as movement
from jaxprune.scores.gradients import saliency as saliency
from jaxprune.scores.gradients import snip as snip
from jaxprune.scores.gradients import taylor as taylor
from jaxprune.scores.rounds import in_rounds as in_rounds
from jaxprune.scores.weights import l2 as l2
from jaxprune.scores.weights import lamp as lamp
from jaxprune.scores.weights import magnitude as magnitude
from jaxprune.scores.weights import random as random
from jaxprune.scores.weights import rms_normalized as rms_normalized
