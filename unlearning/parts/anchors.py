"""Anchors: what is particular to a text, the stand-ins put in its place, and where the tokens then are.

An anchor and its stand-in seldom have the same number of tokens. So the original text and its translation
are aligned by characters: a token of one and a token of the other correspond if what precedes their ends is
the same text, but for anchors that are translated whole.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.calibration.text.sources import HALF_CHARACTER
from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or one mark that is no part of a word. Anchors begin and end where these do."""

HEADER = ("anchor", "stand-in")
"""The first row of a CSV file if it is a header."""

Span = tuple[int, int]
"""The first character of something, and the character after its last."""

Key = tuple[str, ...]
"""The words of an anchor as they are looked up; a word that follows a space begins with one."""


class Occurrence(NamedTuple):
    """A place where an anchor is in a text.

    Attributes:
        start, end: characters of the text, ``end`` excluded.
        anchor: the anchor as it is listed, whatever its case is here.
        stand_in: what replaces it, in the case that it has here.
    """

    start: int
    end: int
    anchor: str
    stand_in: str


@dataclass(frozen=True)
class Anchors:
    """Anchors and their stand-ins.

    Attributes:
        entries: anchor -> stand-in, in the order in which they are listed.
        source: where they come from, for the record.
    """

    entries: Mapping[str, str]
    source: str

    @cached_property
    def sha256(self) -> str:
        """sha256 of the entries in their order."""
        return hashlib.sha256(json.dumps(list(self.entries.items())).encode()).hexdigest()

    @cached_property
    def _forms(self) -> dict[Key, tuple[str, str]]:
        """The words of every form of an anchor -> the anchor and the stand-in in that form. What is listed
        goes before a form that follows from another entry."""
        listed = {key_of(anchor): (anchor, stand_in) for anchor, stand_in in self.entries.items()}
        derived: dict[Key, tuple[str, str]] = {}
        for anchor, stand_in in self.entries.items():
            for form, replacement in case_forms(anchor, stand_in):
                derived.setdefault(key_of(form), (anchor, replacement))
        return derived | listed

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._forms), default=0)

    @cached_property
    def within(self) -> dict[str, frozenset[str]]:
        """An anchor -> all anchors that its words hold, itself among them ("Ada" is within "Ada Lane")."""
        return {anchor: frozenset(found.anchor for found in self._all(anchor)) for anchor in self.entries}

    def _all(self, text: str) -> Iterator[Occurrence]:
        """Every occurrence, also one inside another; those that begin at the same word, the longest first."""
        words = list(WORD.finditer(text))
        for first in range(len(words)):
            key = key_at(text, words[first : first + self._longest])
            for length in range(len(key), 0, -1):
                if (found := self._forms.get(key[:length])) is not None:
                    yield Occurrence(words[first].start(), words[first + length - 1].end(), *found)

    def occurrences(self, text: str) -> list[Occurrence]:
        """Where anchors are in ``text``, in order: whole words only, none inside another. Of those that begin
        at the same word, the longest counts."""
        found: list[Occurrence] = []
        for occurrence in self._all(text):
            if not found or occurrence.start >= found[-1].end:
                found.append(occurrence)
        return found

    def translate(self, pieces: Sequence[str]) -> Translation:
        """Replace the anchors of a text by their stand-ins.

        Args:
            pieces: the text, cut where its tokens are cut in any case (a question and its answer). No anchor
                reaches over a cut.
        """
        occurrences: list[Occurrence] = []
        translated = []
        offset = 0
        for piece in pieces:
            inside = self.occurrences(piece)
            parts, end = [], 0
            for found in inside:
                parts += [piece[end : found.start], found.stand_in]
                end = found.end
            translated.append("".join([*parts, piece[end:]]))
            occurrences += [
                found._replace(start=found.start + offset, end=found.end + offset) for found in inside
            ]
            offset += len(piece)
        return Translation(tuple(pieces), tuple(translated), tuple(occurrences))


@dataclass(frozen=True)
class Translation:
    """A text and its translation.

    Attributes:
        original, translated: the pieces of the two texts.
        occurrences: the anchors, whose characters count from the beginning of the first original piece.
    """

    original: tuple[str, ...]
    translated: tuple[str, ...]
    occurrences: tuple[Occurrence, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [found.start for found in self.occurrences]

    @cached_property
    def _shifts(self) -> list[int]:
        """How many characters longer the translation is after each occurrence."""
        shifts, total = [], 0
        for found in self.occurrences:
            total += len(found.stand_in) - (found.end - found.start)
            shifts.append(total)
        return shifts

    def position(self, character: int) -> int | None:
        """The place in the translation that corresponds to the place before an original character; None
        inside an anchor."""
        before = bisect_right(self._starts, character) - 1
        if before < 0:
            return character
        found = self.occurrences[before]
        if character == found.start:
            return character + (self._shifts[before - 1] if before else 0)
        return None if character < found.end else character + self._shifts[before]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
        ids: the tokens.
        spans: the characters of each; tokens that share a character have the same end.
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]


def read_anchors(file: str) -> Anchors:
    """The anchors of a file of the user's.

    Args:
        file: ``.json``, one object ``{"anchor": "stand-in", ...}``; or ``.csv``, two columns, with or without
            the header ``anchor,stand-in``. UTF-8.

    Raises:
        BadInput: there is no such file, or it holds something else.
    """
    path = Path(file).expanduser()
    readers = {".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise BadInput(f"Anchors are read from a .json or .csv file, not from '{file}'.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"There is no file {file}.") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from error
    entries: dict[str, str] = {}
    for where, anchor, stand_in in readers[path.suffix.lower()](text, file):
        anchor, stand_in = (" ".join(words.split()) for words in (anchor, stand_in))
        if HALF_CHARACTER.search(anchor + stand_in):
            raise BadInput(f"{where} holds half a character (a lone surrogate).")
        if not re.search(r"\w", anchor) or not re.search(r"\w", stand_in):
            raise BadInput(f"{where}: '{anchor}' and '{stand_in}' should both hold a word.")
        if entries.setdefault(anchor, stand_in) != stand_in:
            raise BadInput(f"{where}: '{anchor}' has two stand-ins, '{entries[anchor]}' and '{stand_in}'.")
    if not entries:
        raise BadInput(f"{file} lists no anchors.")
    return Anchors(entries, file)


def _read_json(text: str, file: str) -> Iterator[tuple[str, str, str]]:
    try:
        # Objects become tuples of pairs, so that a key that is given twice is seen.
        content: Any = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not JSON ({error}).") from error
    if not isinstance(content, tuple):
        raise BadInput(f'{file} should be one JSON object, such as {{"Hogwarts": "Greenfield School"}}.')
    for anchor, stand_in in content:
        if not isinstance(stand_in, str):
            raise BadInput(f"{file}: the stand-in of '{anchor}' should be a text.")
        yield file, anchor, stand_in


def _read_csv(text: str, file: str) -> Iterator[tuple[str, str, str]]:
    reader = csv.reader(text.splitlines(), strict=True)
    try:
        for row in filter(any, reader):
            where = f"{file}, line {reader.line_num}"
            if len(row) != 2:
                columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
                raise BadInput(f"{where} has {columns}; give two, an anchor and its stand-in.")
            anchor, stand_in = row
            if reader.line_num > 1 or (anchor.strip(), stand_in.strip()) != HEADER:
                yield where, anchor, stand_in
    except csv.Error as error:
        raise BadInput(f"{file}, line {reader.line_num} is not CSV ({error}).") from error


def key_of(words: str) -> Key:
    """What ``words`` are looked up by. Any white space between them is the same."""
    return key_at(words, list(WORD.finditer(words)))


def key_at(text: str, words: Sequence[re.Match[str]]) -> Key:
    """The same of some words of ``text`` that follow each other."""
    key = []
    for number, word in enumerate(words):
        spaced = number > 0 and words[number - 1].end() < word.start()
        key.append(f" {word[0]}" if spaced else word[0])
    return tuple(key)


def case_forms(anchor: str, stand_in: str) -> list[tuple[str, str]]:
    """The forms of an anchor in other case, and of its stand-in in the same.

    Both in capitals; and of an anchor in small letters both with a capital at the beginning, or at the
    beginning of every word. A name ("Rose") is not looked for in small letters: there it is a word.
    """
    forms = [(anchor.upper(), stand_in.upper())]
    if anchor == anchor.lower():
        forms += [(_capital(anchor), _capital(stand_in)), (_title(anchor), _title(stand_in))]
    return forms


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _title(words: str) -> str:
    return " ".join(map(_capital, words.split()))


def tokenise(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[Tokens]:
    """The tokens of every piece of a text, with the characters that they span in the whole text.

    Special tokens that are spelled out in the text are those tokens, and no others are added.

    Raises:
        BadInput: the tokenizer does not know which characters a token spans.
    """
    check_offsets(tokenizer)
    tokens, start = [], 0
    for piece in pieces:
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = tuple((start + first, start + end) for first, end in encoded["offset_mapping"])
        tokens.append(Tokens(tuple(encoded["input_ids"]), spans))
        start += len(piece)
    return tokens


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not know which characters a token spans.

    Raises:
        BadInput: it is such a one.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            "Anchors are aligned by the characters of tokens, which this model's tokenizer "
            f"({type(tokenizer).__name__}) does not give; add a tokenizer.json to the model folder."
        )


def align(original: Tokens, translated: Tokens, translation: Translation) -> list[int]:
    """For every original token the translated token that ends at the same place.

    Up to there both texts are the same but for whole anchors, so what both predict next is the same, too.
    Tokens that are parts of one character end at the same place: they correspond one by one if both texts
    have the same of them there; otherwise only the last ones do.

    Returns:
        Indices of translated tokens; -1 where there is none: inside an anchor, and where tokens are cut
        differently.
    """
    theirs = _by_end(translated.spans)
    aligned = [-1] * len(original.ids)
    for end, ours in _by_end(original.spans).items():
        place = translation.position(end)
        there = theirs.get(place, []) if place is not None else []
        if [original.ids[i] for i in ours] == [translated.ids[j] for j in there]:
            for i, j in zip(ours, there):
                aligned[i] = j
        elif there:
            aligned[ours[-1]] = there[-1]
    return aligned


def _by_end(spans: Iterable[Span]) -> dict[int, list[int]]:
    """Indices of tokens by the character at which they end."""
    groups: dict[int, list[int]] = {}
    for index, (_, end) in enumerate(spans):
        groups.setdefault(end, []).append(index)
    return groups
