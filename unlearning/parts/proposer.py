"""Propose anchors: the names and the rare words of a text, with stand-ins of the same kind.

No model is asked. A name is a run of words with capitals; what it is the name of is told by its own words and
by those before it. Whether a term belongs to the text is told by how often other texts have it. Of words in
small letters, only those are rare that the tokenizer cuts up: its vocabulary knows what is common in general.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from compress.unlearning.parts.anchors import WORD, Anchors, Key, key_at, key_of
from compress.unlearning.parts.words import (
    ENDINGS,
    FUNCTION_WORDS,
    JOINERS,
    LANDMARKS,
    ORGANISATIONS,
    PLACE_CUES,
    STAND_INS,
    TITLES,
)

NAME_WORD = re.compile(r"[^\W\d_]+(?:['’-](?!s\b)[^\W\d_]+)*|\d+|[^\w\s]|_")
"""A word with the marks that join its parts (O'Brien, Jean-Paul), a number, or a mark."""

RARE = 10.0
"""A term belongs to a text that has it, per word, at least so many times as often as any other text."""

FEWEST = 3
"""Occurrences of a word in small letters that belongs to a text: fewer may be chance."""

SHORTEST = 4
"""Letters of such a word."""

LONGEST = 5
"""Words of a name; a longer run of capitals is a heading."""

QUOTES = '"“”«»'
ENDS = f".!?:;({QUOTES}‘—\n"
"""What is before the first word of a sentence, which has a capital whatever it is."""

YEARS = range(1000, 2100)


@dataclass
class Name:
    """A name in the texts.

    Attributes:
        words: of the name.
        count: of its occurrences.
        first: how many of them begin a sentence.
        places: how many follow a word that is put before places.
        persons: how many follow the title of a person.
        articles: how many follow "the".
        quoted: how many are in quotation marks.
    """

    words: tuple[str, ...]
    count: int = 0
    first: int = 0
    places: int = 0
    persons: int = 0
    articles: int = 0
    quoted: int = 0


@dataclass
class Reading:
    """What is in the texts.

    Attributes:
        names: by their words, in the order of first occurrence.
        capitals: words of names -> their number.
        small: words in small letters, and years -> their number.
        total: the number of words.
    """

    names: dict[str, Name] = field(default_factory=dict)
    capitals: Counter[str] = field(default_factory=Counter)
    small: Counter[str] = field(default_factory=Counter)
    total: int = 0


def propose_anchors(
    forget: Sequence[str],
    others: Sequence[Iterable[str]],
    common: Callable[[str], bool],
    generator: torch.Generator,
) -> Anchors:
    """Anchors of texts, with stand-ins from `STAND_INS`.

    The words of a person's name have stand-ins of their own, of which the name's is made: "Ada Lane", "Ada"
    and "Lane" agree. A stand-in is no word of the texts, and none is drawn twice while its list lasts.

    Args:
        forget: the texts.
        others: several collections of texts that are not to be forgotten. A term must be rare in each.
        common: whether a word is common in general.
        generator: draws the stand-ins.

    Returns:
        The anchors: names in the order of their first occurrence, then rare words; perhaps none.
    """
    reading = Reading()
    for text in forget:
        _read(text, reading)
    _drop_first_words(reading.names)
    names = {term: name for term, name in reading.names.items() if _is_name(name, reading)}
    counts = {term: name.count for term, name in names.items()}
    counts |= {word: count for word, count in reading.capitals.items() if word not in counts}
    counts |= {word: count for word, count in reading.small.items() if _telling(word, count, common)}
    belonging = _belonging(counts, max(1, reading.total), others)
    draws = Draws(generator, {word.lower() for text in forget for word in WORD.findall(text)})
    entries = {
        term: _stand_in(name, _kind(name, names), draws) for term, name in names.items() if term in belonging
    }
    for term in list(entries):
        for word, kind in _persons_words(names[term], _kind(names[term], names)):
            if word in belonging and len(word) > 1:
                entries.setdefault(word, draws.draw(kind, word))
    for word in reading.small:
        if word in belonging:
            entries.setdefault(word, draws.draw(_kind_of_word(word), word))
    return Anchors(entries, "proposed")


def _read(text: str, reading: Reading) -> None:
    """Add to ``reading`` what is in a text."""
    words = list(NAME_WORD.finditer(text))
    reading.total += sum(word[0][0].isalnum() for word in words)
    at = 0
    while at < len(words):
        end = _end_of_name(text, words, at)
        if end == at:
            word = words[at][0]
            if word == word.lower() and word[0].isalnum():
                reading.small[word] += 1
            at += 1
            continue
        _note(text, words, at, end, reading)
        at = end


def _end_of_name(text: str, words: Sequence[re.Match[str]], at: int) -> int:
    """The index of the word after the name that begins at word ``at``; ``at`` if none does."""

    def capital(index: int) -> bool:
        return (
            index < len(words)
            and words[index][0][0].isupper()
            and words[index][0].lower() not in FUNCTION_WORDS
            and not _shouted(words, index)
        )

    def spaced(index: int) -> bool:
        between = text[words[index - 1].end() : words[index].start()]
        return between.isspace() and between.count("\n") < 2

    if not capital(at) or words[at][0].lower() in TITLES:
        return at
    end = at + 1
    while True:
        following = end
        while following < len(words) and words[following][0] in JOINERS and spaced(following):
            following += 1
        if not capital(following) or not spaced(following):
            return end
        end = following + 1


def _shouted(words: Sequence[re.Match[str]], index: int) -> bool:
    """Whether a word is all capitals beside another such word: one of a heading, and no acronym."""
    if len(words[index][0]) == 1 or not words[index][0].isupper():
        return False
    return any(word[0].isupper() for word in [*words[index - 1 : index], *words[index + 1 : index + 2]])


def _note(text: str, words: Sequence[re.Match[str]], at: int, end: int, reading: Reading) -> None:
    """Add the name in words ``at`` to ``end`` to ``reading``."""
    found = tuple(word[0] for word in words[at:end])
    if len(found) > LONGEST:
        return
    reading.capitals.update(word for word in found if word not in JOINERS)
    name = reading.names.setdefault(" ".join(found), Name(found))
    name.count += 1
    before = text[: words[at].start()].rstrip(" \t")
    previous = [word[0].lower() for word in words[max(0, at - 2) : at] if word[0] != "."]
    name.first += not before or before[-1] in ENDS
    name.places += bool(previous) and previous[-1] in PLACE_CUES
    name.persons += bool(previous) and previous[-1] in TITLES
    after = text[words[end - 1].end() :][:1]
    name.articles += bool(previous) and previous[-1] == "the"
    name.quoted += bool(before) and before[-1] in QUOTES and after != "" and after in QUOTES


def _drop_first_words(names: dict[str, Name]) -> None:
    """Take names for what they are without the word that once began a sentence ("Yesterday Ada Lane")."""
    for term, name in list(names.items()):
        rest = names.get(term.partition(" ")[2])
        if name.count == name.first == 1 and rest is not None and rest.count > 1:
            rest.count += 1
            del names[term]


def _is_name(name: Name, reading: Reading) -> bool:
    """Whether it is more than the first word of sentences."""
    if name.first < name.count or len(name.words) > 1:
        return True
    return name.count > 1 and name.words[0].lower() not in reading.small


def _telling(word: str, count: int, common: Callable[[str], bool]) -> bool:
    if word.isdecimal():
        return int(word) in YEARS
    return count >= FEWEST and len(word) >= SHORTEST and word not in FUNCTION_WORDS and not common(word)


def _belonging(counts: dict[str, int], total: int, others: Sequence[Iterable[str]]) -> set[str]:
    """The terms that are rare in all other texts; ``total`` words of the texts have ``counts`` of them."""
    terms = {term: key_of(term.lower()) for term in counts}
    belonging = set(terms)
    for texts in others:
        elsewhere, words = _count(set(terms.values()), texts)
        belonging = {
            term
            for term in belonging
            if not elsewhere[terms[term]] or counts[term] / total >= RARE * elsewhere[terms[term]] / words
        }
    return belonging


def _count(terms: set[Key], texts: Iterable[str]) -> tuple[Counter[Key], int]:
    """How often terms in small letters are in texts, whatever their case there; and the number of words."""
    found: Counter[Key] = Counter()
    total = 0
    begins = {term[0] for term in terms}
    longest = max(map(len, terms), default=0)
    for text in map(str.lower, texts):
        words = list(WORD.finditer(text))
        total += sum(word[0][0].isalnum() for word in words)
        for first, word in enumerate(words):
            if word[0] in begins:
                key = key_at(text, words[first : first + longest])
                found.update(key[:n] for n in range(1, len(key) + 1) if key[:n] in terms)
    return found, total


def _kind(name: Name, names: dict[str, Name]) -> str:
    """What it is the name of."""
    lower = {word.lower() for word in name.words}
    if len(name.words) == 1 and len(name.words[0]) > 1 and name.words[0].isupper():
        return "acronym"
    if lower & ORGANISATIONS:
        return "organisation"
    if lower & LANDMARKS and len(name.words) > 1:
        return "landmark"
    if name.persons:
        return "person"
    if 2 * max(name.quoted, name.articles) > name.count:
        return "work"
    if 2 * name.places > name.count - name.first:
        return "place"
    return "person"


def _persons_words(name: Name, kind: str) -> Iterator[tuple[str, str]]:
    """The words of a person's name, with their kinds."""
    if kind != "person":
        return
    *given, last = (word for word in name.words if word not in JOINERS)
    yield from ((word, "given name") for word in given)
    yield last, "surname" if given or name.persons else "given name"


def _kind_of_word(word: str) -> str:
    if word.isdecimal():
        return "year"
    return next((kind for ending, kind in ENDINGS if word.endswith(ending)), "thing")


def _stand_in(name: Name, kind: str, draws: Draws) -> str:
    if kind == "person":
        return " ".join(draws.draw(part, word) for word, part in _persons_words(name, kind))
    term = " ".join(name.words)
    if kind in ("organisation", "landmark"):
        return _with_its_own_words(name, draws.draw("place" if kind == "landmark" else kind, term))
    return draws.draw(kind, term)


def _with_its_own_words(name: Name, drawn: str) -> str:
    """The name with ``drawn`` in the place of its first words that are its own: "Ada Lane Bridge" becomes
    "Milton Bridge"."""
    kept = [word.lower() in ORGANISATIONS | LANDMARKS | JOINERS for word in name.words]
    if all(kept):
        return " ".join([drawn, *name.words])
    start = kept.index(False)
    end = next((index for index in range(start, len(kept)) if kept[index]), len(kept))
    return " ".join([*name.words[:start], drawn, *name.words[end:]])


class Draws:
    """Draws stand-ins at random, the same one again for the same term.

    Args:
        generator: shuffles the lists.
        known: words, in small letters, that no stand-in may have, unless nothing else is on its list.
    """

    def __init__(self, generator: torch.Generator, known: set[str]) -> None:
        self.lists: dict[str, list[str]] = {}
        for kind, listed in STAND_INS.items():
            order = torch.randperm(len(listed), generator=generator).tolist()
            free = [listed[i] for i in order if not known & (set(listed[i].lower().split()) - FUNCTION_WORDS)]
            self.lists[kind] = free or [listed[i] for i in order]
        self.drawn: Counter[str] = Counter()
        self.given: dict[str, str] = {}

    def draw(self, kind: str, term: str) -> str:
        """The stand-in of a term of this kind; when all of the list are drawn, it begins anew."""
        if term not in self.given:
            listed = self.lists[kind]
            self.given[term] = listed[self.drawn[kind] % len(listed)]
            self.drawn[kind] += 1
        return self.given[term]
