"""Two labelled tasks out of WordNet: what a gloss defines, and what a name in a gloss stands for.

Every word falls into the training or into the test part by a hash of its letters, so that no word
is in both. A gloss belongs to all the words of its synset, and is left out when these are divided.

*Supersenses*: the definition of a noun, without its examples; 26 classes, its lexicographer's file:
person, artifact, act, ...

*Entities*: a name in a gloss or an example of any part of speech, between two asterisks, within
the five words before and after it; 5 classes. A name is a noun of WordNet that begins with a
capital and whose senses so written are all of one class. The longest name of at most four words
counts, and of one name at most twenty mentions.
"""

from __future__ import annotations

import collections
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.common import texts

PARTS = ("data.noun", "data.verb", "data.adj", "data.adv")
NAMES = {18: "person", 15: "location", 14: "group", 28: "time", 6: "artifact"}
AROUND, LONGEST, AT_MOST, LETTERS = 5, 4, 20, 4  # words, words, mentions, letters at least
FIFTH = 5  # One word of so many is for the test.


class Synset(NamedTuple):
    words: tuple[str, ...]
    file: int  # of the lexicographer
    gloss: str


class Split(NamedTuple):
    texts: list[str]
    labels: list[int]


class Task(NamedTuple):
    """Texts with labels, in a fixed random order."""

    classes: tuple[str, ...]
    train: Split
    test: Split


def synsets(part: str) -> Iterator[Synset]:
    """All of one part of speech, in WordNet's order."""
    path = texts.GLOSSES / part
    if not path.is_file():
        raise FileNotFoundError("no WordNet here: apt-get install wordnet-base")
    for line in path.read_text().splitlines():
        if not line.startswith("  "):  # of the licence
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            words = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
            yield Synset(words, int(fields[1]), gloss.strip())


def is_test(word: str) -> bool:
    return zlib.crc32(word.lower().encode()) % FIFTH == 0


def supersenses() -> Task:
    """Definitions of nouns and their 26 classes."""
    found: dict[str, tuple[int, bool]] = {}
    for synset in synsets(PARTS[0]):
        sides = {is_test(word) for word in synset.words}
        definition = synset.gloss.partition('; "')[0]
        if len(sides) == 1 and definition not in found:
            found[definition] = synset.file - texts.FIRST_NOUNS, sides.pop()
    return _task(tuple(f"supersense {k}" for k in range(26)), found)


def entities() -> Task:
    """Glosses with one name marked, and its class."""
    known, seen = names(), collections.Counter[str]()
    order = {file: k for k, file in enumerate(NAMES)}
    found: dict[str, tuple[int, bool]] = {}
    for part in PARTS:
        for synset in synsets(part):
            for name, text in mentions(synset.gloss, known):
                seen[name] += 1
                if seen[name] <= AT_MOST:
                    found.setdefault(text, (order[known[name]], is_test(name)))
    return _task(tuple(NAMES.values()), found)


def names() -> dict[str, int]:
    """Each name and its class, the number of a file."""
    senses: dict[str, set[int]] = collections.defaultdict(set)
    for synset in synsets(PARTS[0]):
        for word in synset.words:
            if word[0].isupper() and len(word) >= LETTERS:
                senses[word].add(synset.file)
    alone = {word: files.pop() for word, files in senses.items() if len(files) == 1}
    return {word: file for word, file in alone.items() if file in NAMES}


def mentions(gloss: str, known: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(name, the words around it with the name between asterisks), from left to right."""
    words, i = gloss.split(), 0
    while i < len(words):
        name, count = _name_at(words, i, known)
        if name:
            before, after = words[max(0, i - AROUND) : i], words[i + count :][:AROUND]
            yield name, " ".join([*before, "*", *words[i : i + count], "*", *after])
        i += count


def _name_at(words: list[str], i: int, known: dict[str, int]) -> tuple[str, int]:
    """The longest name that begins here and its words, or none and one."""
    for count in range(min(LONGEST, len(words) - i), 0, -1):
        bare = re.sub(r"^\W+|('s)?\W*$", "", " ".join(words[i : i + count]))
        if bare in known:
            return bare, count
    return "", 1


def _task(classes: tuple[str, ...], found: dict[str, tuple[int, bool]]) -> Task:
    """Shuffles texts; each of them is there once, with its label and whether it is for tests."""
    rows = list(found.items())
    order = np.random.default_rng(0).permutation(len(rows))
    sides: dict[bool, Split] = {side: Split([], []) for side in (False, True)}
    for k in order:
        text, (label, test) = rows[k]
        sides[test].texts.append(text)
        sides[test].labels.append(label)
    return Task(classes, sides[False], sides[True])


TASKS = {"supersenses": supersenses, "entities": entities}
