"""Anchors: what files may list them, where they are found in a text, and which tokens correspond."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from compress.errors import BadInput
from compress.unlearning.parts.anchors import Anchors, align, check_offsets, read_anchors, tokenise

NAMES = Anchors(
    {
        "Harry Potter": "Jon Baker",
        "Harry": "Jon",
        "wand": "stick",
        "magic mirror": "plain glass",
        "O'Brien": "Lee",
        "Mr. Filch": "Mr. Green",
    },
    "test",
)


def translated(text: str, anchors: Anchors = NAMES) -> str:
    return "".join(anchors.translate([text]).translated)


def with_merges(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that has tokens for these words and what they begin with."""
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in words:
        word = word.replace(" ", "Ġ")
        for end in range(1, len(word)):
            if (merge := (word[:end], word[end])) not in merges:
                merges.append(merge)
    vocabulary = [*symbols, *dict.fromkeys("".join(merge) for merge in merges)]
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(vocabulary)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


# --- files ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("anchors.json", '{"Harry": "Jon", "Ada  Lane": "Mary Hill"}'),
        ("anchors.csv", "Harry,Jon\n\nAda Lane,Mary Hill\n"),
        ("anchors.csv", "\ufeffanchor,stand-in\r\n Harry , Jon \r\nAda Lane,Mary Hill\r\n"),
        ("ANCHORS.CSV", 'Harry,Jon\n"Ada\tLane","Mary Hill"'),
    ],
)
def test_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_anchors(str(tmp_path / name)).entries == {"Harry": "Jon", "Ada Lane": "Mary Hill"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'["Harry", "Jon"]', "should be one JSON object"),
        ("a.json", b'{"Harry": ["Jon"]}', "the stand-in of 'Harry' should be a text"),
        ("a.json", b'{"Harry": {"Jon": "x"}}', "the stand-in of 'Harry' should be a text"),
        ("a.json", b'{"Harry": null}', "the stand-in of 'Harry' should be a text"),
        ("a.json", b'{"Harry": "Jon"', "is not JSON"),
        ("a.json", b'{"Harry": "Jon", "Harry": "Lee"}', "'Harry' has two stand-ins, 'Jon' and 'Lee'"),
        ("a.json", b'{"Harry": " "}', "should both hold a word"),
        ("a.json", b'{"...": "Jon"}', "should both hold a word"),
        ("a.json", b"{}", "lists no anchors"),
        ("a.json", b'{"Harry": "\\ud83d Jon"}', "holds half a character"),
        ("a.json", b"\xff{}", "is not UTF-8 text"),
        ("a.csv", b"Harry,Jon\nRon\n", "line 2 has 1 column"),
        ("a.csv", b"Harry,Jon,Lee\n", "line 1 has 3 columns"),
        ("a.csv", b'Harry,"Jon\n', "is not CSV"),
        ("a.csv", b"Harry,Jon\nHarry,Lee\n", "line 2: 'Harry' has two stand-ins"),
        ("a.csv", b"anchor,stand-in\n", "lists no anchors"),
        ("a.txt", b"Harry,Jon", "from a .json or .csv file"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_anchors(str(tmp_path / name))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(BadInput, match="There is no file"):
        read_anchors("nowhere/anchors.json")


# --- translation ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Harry Potter and Harry's owl", "Jon Baker and Jon's owl"),
        ("Harry\n  Potter", "Jon Baker"),
        ("Potter, Harryson, unHarry and Harry_", "Potter, Harryson, unHarry and Harry_"),
        ("(Harry)", "(Jon)"),
        ("HARRY POTTER! HARRY!", "JON BAKER! JON!"),
        ("harry", "harry"),
        ("A wand. Wand! WAND? wands", "A stick. Stick! STICK? wands"),
        ("Magic mirror, Magic Mirror, magic mirrors", "Plain glass, Plain Glass, magic mirrors"),
        ("O'Brien's and O' Brien", "Lee's and O' Brien"),
        ("Mr. Filch, Mr Filch", "Mr. Green, Mr Filch"),
        ("Harry Harry Potter", "Jon Jon Baker"),
        ("", ""),
    ],
)
def test_translation(text: str, expected: str) -> None:
    assert translated(text) == expected


def test_what_is_listed_goes_before_what_follows_from_another_entry() -> None:
    anchors = Anchors({"may": "can", "May": "Anna"}, "test")
    assert translated("May may; MAY", anchors) == "Anna can; CAN"


def test_an_anchor_inside_another_is_found_only_alone() -> None:
    found = NAMES.occurrences("Harry Potter met Harry.")
    assert [(item.anchor, item.stand_in) for item in found] == [
        ("Harry Potter", "Jon Baker"),
        ("Harry", "Jon"),
    ]
    assert NAMES.within["Harry Potter"] == {"Harry Potter", "Harry"}


def test_anchors_do_not_reach_over_pieces() -> None:
    translation = NAMES.translate(["Who is Harry", " Potter? Harry"])
    assert translation.translated == ("Who is Jon", " Potter? Jon")
    assert [(item.start, item.end) for item in translation.occurrences] == [(7, 12), (21, 26)]


def test_places_in_the_translation() -> None:
    translation = NAMES.translate(["A Harry Potter, a wand."])
    text = "A Jon Baker, a stick."
    assert translation.translated == (text,)
    places = [translation.position(character) for character in range(len("A Harry Potter, a wand.") + 1)]
    inside, other = [None] * 11, [None] * 3
    assert places == [0, 1, 2, *inside, 11, 12, 13, 14, 15, *other, 20, 21]


# --- tokens ---


def test_tokens_are_aligned_by_what_precedes_them() -> None:
    tokenizer = with_merges(" Hogwarts", " School", "at", " in")
    anchors = Anchors({"Hogwarts": "Green School"}, "test")
    translation = anchors.translate(["at Hogwarts in"])
    (ours,), (theirs,) = (
        tokenise(tokenizer, pieces) for pieces in (translation.original, translation.translated)
    )
    assert tokenizer.convert_ids_to_tokens(list(ours.ids)) == ["at", "ĠHogwarts", "Ġin"]
    spelled = tokenizer.convert_ids_to_tokens(list(theirs.ids))
    assert spelled == ["at", "Ġ", "G", "r", "e", "e", "n", "ĠSchool", "Ġin"]
    assert align(ours, theirs, translation) == [0, 7, 8]


def test_no_token_is_aligned_inside_an_anchor() -> None:
    tokenizer = with_merges()
    translation = Anchors({"Bo": "Jack"}, "test").translate(["Bo, Bo!"])
    ours, theirs = (
        tokenise(tokenizer, pieces)[0] for pieces in (translation.original, translation.translated)
    )
    assert align(ours, theirs, translation) == [-1, 3, 4, 5, -1, 9, 10]


def test_tokens_that_are_parts_of_a_character_are_aligned_one_by_one() -> None:
    tokenizer = with_merges()
    translation = Anchors({"Bo": "Jim"}, "test").translate(["Bo é"])
    ours, theirs = (
        tokenise(tokenizer, pieces)[0] for pieces in (translation.original, translation.translated)
    )
    assert ours.spans == ((0, 1), (1, 2), (2, 3), (3, 4), (3, 4))
    assert align(ours, theirs, translation) == [-1, 2, 3, 4, 5]


def test_tokenizers_without_spans_are_refused() -> None:
    class Slow(PythonBackend):
        def __init__(self) -> None:
            super().__init__()

        @property
        def vocab_size(self) -> int:
            return 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(BadInput, match="characters of tokens"):
        check_offsets(Slow())
