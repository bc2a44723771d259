"""The acceptance zoo: structures that break naive pruners, one or more small models for each."""

from zoo import (
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
from zoo.common import ENTRIES, Entry

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
