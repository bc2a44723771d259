"""The acceptance zoo: structures that break naive pruners, one or more small models for each."""

from tests.models.zoo import (
    attention,
    channels,
    control,
    convolutional,
    generated,
    mixture,
    normalised,
    recurrent,
    states,
)
from tests.models.zoo.common import ENTRIES, Entry

__all__ = [
    "ENTRIES",
    "Entry",
    "attention",
    "channels",
    "control",
    "convolutional",
    "generated",
    "mixture",
    "normalised",
    "recurrent",
    "states",
]
