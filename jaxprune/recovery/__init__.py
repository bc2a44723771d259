"""From a compact model to a good one: what :func:`jp.recover` does, and its parts."""

from jaxprune.recovery.api import recover as recover
from jaxprune.recovery.recipe import Recipe as Recipe
from jaxprune.recovery.recipe import recipe_for as recipe_for
from jaxprune.recovery.rounds import in_rounds as in_rounds
from jaxprune.recovery.statistics import estimate_statistics as estimate_statistics
