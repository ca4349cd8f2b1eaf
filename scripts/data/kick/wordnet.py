"""WordNet 3.0 as Python: words, what they mean, and how they hang together.

The format is that of the manual page wndb(5WN), which lies beside the data in Debian's wordnet-base.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

POINTERS = {
    "hypernym": "@",
    "kind": "@i",
    "inside": "#p",
    "antonym": "!",
}
"""Relations by their signs: what a word is a kind of, what a thing or person is, where a place lies."""

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@dataclass(frozen=True)
class Synset:
    """Words with one meaning.

    Attributes:
        key: part of speech and offset in its file.
        field: number of the lexicographer's file, such as 5 for animals.
        words: the most usual one first, with spaces.
        pointers: (sign, key of the synset it leads to, number of the word from and to, 0 for all).
        gloss: definition and examples.
    """

    key: tuple[str, int]
    field: int
    words: tuple[str, ...]
    pointers: tuple[tuple[str, tuple[str, int], int, int], ...]
    gloss: str

    @property
    def definition(self) -> str:
        """The gloss without examples, remarks in brackets and what follows a semicolon."""
        text = re.sub(r"\s*\([^()]*\)", "", self.gloss.split('; "')[0])
        return text.split(";")[0].strip()

    def to(self, relation: str) -> list[tuple[str, int]]:
        return [key for sign, key, _, _ in self.pointers if sign == POINTERS[relation]]


class WordNet:
    """All synsets.

    Args:
        files: content of data.noun, index.noun and so on and of cntlist.rev, by name.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.synsets = {
            synset.key: synset for part in PARTS for synset in _synsets(files[f"data.{part}"], PARTS[part])
        }
        self._files = files

    @cached_property
    def senses(self) -> dict[tuple[str, str], list[Synset]]:
        """Synsets of a word (lower case) and part of speech, the most usual meaning first."""
        found = {}
        for part, letter in PARTS.items():
            for line in self._files[f"index.{part}"].splitlines():
                if not line.startswith("  "):
                    word, _, number, *rest = line.split()
                    offsets = rest[-int(number) :]
                    found[word.replace("_", " "), letter] = [self.synsets[letter, int(at)] for at in offsets]
        return found

    @cached_property
    def counts(self) -> dict[tuple[str, str], int]:
        """How often a word (lower case) occurs as this part of speech in the texts that WordNet counted."""
        parts = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
        found: dict[tuple[str, str], int] = defaultdict(int)
        for line in self._files["cntlist.rev"].splitlines():
            sense, _, times = line.split()
            word, _, rest = sense.partition("%")
            found[word.replace("_", " "), parts[rest[0]]] += int(times)
        return found

    def nouns(self) -> Iterator[Synset]:
        return (synset for synset in self.synsets.values() if synset.key[0] == "n")

    def ancestors(self, synset: Synset) -> set[tuple[str, int]]:
        """Keys of everything that it is a kind of, at any distance."""
        found: set[tuple[str, int]] = set()
        new = [synset.key]
        while new:
            here = self.synsets[new.pop()]
            up = set(here.to("hypernym")) | set(here.to("kind"))
            new += up - found
            found |= up
        return found


def _synsets(text: str, part: str) -> Iterator[Synset]:
    for line in text.splitlines():
        if line.startswith("  "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        number = int(fields[3], 16)
        words = tuple(
            re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * number : 2]
        )
        start = 5 + 2 * number
        pointers = tuple(
            (sign, ("a" if to == "s" else to, int(offset)), int(places[:2], 16), int(places[2:], 16))
            for sign, offset, to, places in zip(
                *(fields[start + i : start + 4 * int(fields[start - 1]) : 4] for i in range(4)), strict=True
            )
        )
        yield Synset((part, int(fields[0])), int(fields[1]), words, pointers, gloss.strip())
