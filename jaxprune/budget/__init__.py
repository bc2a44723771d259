"""Widths under a budget: what each costs, which to keep, and what was measured."""

from jaxprune.budget.latency import LatencyTable as LatencyTable
from jaxprune.budget.result import MetricResult as MetricResult
from jaxprune.budget.result import ParetoFront as ParetoFront
from jaxprune.budget.result import SearchResult as SearchResult
from jaxprune.budget.roofline import DEVICES as DEVICES
from jaxprune.budget.roofline import Device as Device
from jaxprune.budget.roofline import device as device
from jaxprune.budget.sensitivity import Sensitivity as Sensitivity
