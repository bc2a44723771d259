"""Texts that Debian packages carry: Python's documentation, and WordNet's glosses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path("/usr/share/doc/python3.11/html/_sources")
GLOSSES = Path("/usr/share/wordnet")
FIRST_NOUNS = 3  # number of WordNet's first lexicographer file of nouns


def docs(folder: str) -> list[Path]:
    """The pages of a part of the documentation, such as ``library``, in order of name."""
    if not DOCS.is_dir():
        raise FileNotFoundError("no documentation here: apt-get install python3.11-doc")
    return sorted((DOCS / folder).glob("**/*.rst.txt"))


def glosses(every: int = 40) -> str:
    """One noun gloss of ``every``, a line each."""
    path = GLOSSES / "data.noun"
    if not path.is_file():
        raise FileNotFoundError("no WordNet here: apt-get install wordnet-base")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("  ")]
    return "\n".join(line.split(" | ", 1)[1].strip() for line in lines[::every])


def sequences(tokenizer: Any, text: str, count: int, length: int) -> np.ndarray:
    """The first ``count`` x ``length`` tokens of a text."""
    ids = tokenizer.encode(text[: 12 * count * length]).ids[: count * length]
    return np.asarray(ids, np.int32).reshape(-1, length)


def samples(tokenizer: Any, pages: list[Path], count: int, length: int, seed: int) -> np.ndarray:
    """``count`` stretches of ``length`` tokens, from random places of random pages."""
    rng = np.random.default_rng(seed)
    rows: list[Any] = []
    while len(rows) < count:
        text = pages[rng.integers(len(pages))].read_text()
        begin = int(rng.integers(max(1, len(text) - 12 * length)))
        ids = tokenizer.encode(text[begin : begin + 12 * length]).ids[:length]
        if len(ids) == length:
            rows.append(ids)
    return np.asarray(rows, np.int32)


def verb_glosses() -> str:
    """All verb glosses, a line each: out of :func:`glosses`, but of the same kind."""
    return _all_glosses("data.verb")


def adjective_glosses() -> str:
    """All adjective glosses, a line each: of neither verbs nor nouns."""
    return _all_glosses("data.adj")


def _all_glosses(name: str) -> str:
    lines = (GLOSSES / name).read_text().splitlines()
    return "\n".join(line.split(" | ", 1)[1].strip() for line in lines if " | " in line)


def labelled_glosses() -> tuple[list[str], np.ndarray]:
    """Distinct noun glosses and their supersenses, 0..25: person, artifact, act, ..."""
    path = GLOSSES / "data.noun"
    if not path.is_file():
        raise FileNotFoundError("no WordNet here: apt-get install wordnet-base")
    found: dict[str, int] = {}
    for line in path.read_text().splitlines():
        if not line.startswith("  "):
            found.setdefault(line.split(" | ", 1)[1].strip(), int(line.split()[1]) - FIRST_NOUNS)
    return list(found), np.array(list(found.values()))
