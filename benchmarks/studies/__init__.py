"""One module or package per question, and the table of them all.

A study is a module with ``main(argv)``: it reads its options, measures, and saves
``results/<device>/<name of the study>.json``.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Study(NamedTuple):
    """A question, the module that answers it, and the options of a look that takes minutes."""

    question: str
    module: str
    quick: tuple[str, ...] | None = ()  # beside ``--quick`` itself; None: has no short way


QUICK = ("--quick",)  # of studies that know what that means

STUDIES = {
    "example": Study("What does README's example print?", "example"),
    "main": Study("What does pruning do to a real network?", "main.job"),
    "speed": Study("How fast are the networks that jp.search finds?", "speed.speed", QUICK),
    "speed_accuracy": Study(
        "Which way to a speed keeps most accuracy?", "speed.accuracy", QUICK),
    "recovery": Study(
        "Which score, objective and repair keep most accuracy?", "recovery.recovery", QUICK),
    "strangers": Study(
        "Does README's recipe hold for networks of others?", "strangers.strangers", QUICK),
    "runtimes": Study(
        "In which engine is a pruned network fastest?", "runtimes.runtimes",
        QUICK),
    "runtimes_search": Study(
        "Are widths that are best in one engine best in another?", "runtimes.searched", QUICK),
    "int8": Study(
        "What do int8 and pruning cost and bring together?", "runtimes.int8", QUICK),
    "int8_pretrained": Study(
        "What does int8 cost text and speech models?", "runtimes.int8_pretrained",
        None),
    "browser": Study("How fast is a pruned network in a browser?", "browser.browser", QUICK),
    "native": Study(
        "Is a compact program as fast as one written small?", "speed.native",
        ("--rounds", "3", "--repetitions", "1")),
    "training": Study(
        "What do training methods cost per step?", "speed.training",
        ("--rounds", "5", "--update-rounds", "2", "--sizes", "100000")),
    "selection": Study(
        "What does a mask update cost beside a sort?", "speed.selection",
        ("--rounds", "2", "--sizes", "100000", "--huge", "0")),
    "solver_speed": Study(
        "How long does choosing the widths take?", "speed.solver", ("--layers", "4")),
    "structure_speed": Study(
        "How long does finding the structure take?", "structure.structure",
        ("--rounds", "2", "--layers", "4")),
    "scale": Study(
        "What do cutting and compiling cost at twice the size?", "structure.scale",
        ("--rounds", "1", "--scale", "0.05")),
    "effects": Study("Which published effects appear here?", "effects.effects", QUICK),
    "text": Study("When and how is a text encoder pruned?", "text.text", QUICK),
    "images": Study("What does a measured speed cost image classifiers?", "images.images", QUICK),
    "thresholds": Study(
        "Do thresholds by kind of layer cost half a point?", "images.thresholds", QUICK),
    "self_supervision": Study(
        "When may an encoder that learns without labels be cut?", "self_supervision", QUICK),
    "effects_units": Study(
        "Which effects of cutting whole units appear here?", "effects.units", QUICK),
    "peers": Study(
        "Whose cut of the same weights is more accurate?", "peers.same_weights", QUICK),
    "experts": Study(
        "Which experts of a mixture may go?", "experts", ("--seeds", "1", "--steps", "30")),
    "pretrained": Study(
        "What is left of pretrained text and speech models?", "pretrained",
        ("--models", "minilm", "--rounds", "3")),
    "whisper": Study("What does pruning cost speech recognition?", "speech.speech", QUICK),
    "oneshot": Study(
        "What does one-shot pruning leave of a language model?", "oneshot.weights",
        ("--at", "50%", "--methods", "magnitude", "wanda", "--sequences", "4")),
    "stream": Study(
        "What does pruning from disk to disk take?", "oneshot.streaming",
        ("--layers", "2", "--sequences", "8", "--kills", "2")),
    "stream_large": Study(
        "Is a model of 13.5 GB cut within 4 GB?", "oneshot.large", None),
    "oneshot_layer": Study("Which method keeps one layer's output?", "oneshot.layer", None),
    "oneshot_drift": Study("How much drift should be made up for?", "oneshot.drift", None),
    "oneshot_time": Study(
        "How long does SparseGPT take?", "oneshot.time", ("--rounds", "2")),
    "oneshot_structured": Study(
        "What do fewer heads, units and blocks cost?", "oneshot.structured", None),
    "oneshot_search": Study(
        "Which units go for a measured speed, in stages?", "oneshot.search", None),
    "oneshot_structured_time": Study(
        "How fast are the cut language models?", "oneshot.structured_time", ("--rounds", "3")),
}  # fmt: skip


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser that names a study's command and opens with the first line of its text."""
    title = (doc or "").partition("\n")[0].replace("``", "")
    return argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=title)
