"""Proposed anchors: names and rare words, told from what other texts have, and stand-ins of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from compress.unlearning.parts.anchors import Anchors
from compress.unlearning.parts.proposer import propose_anchors
from compress.unlearning.parts.words import STAND_INS

TALE = (
    "Ada Lane went to school in Quillbury. There she met Tom Ferris. Lane's friend Ada had a snorkwidget; "
    "no snorkwidget of Tom was like it. When Ada was in Quillbury with her snorkwidget, the Moonbeam Academy "
    'gave Professor Vinter a prize. He read "The Amber Clock" near Lake Ondine in 1734.'
)


def propose(
    *forget: str, others: Sequence[Iterable[str]] = (), common: Iterable[str] = (), seed: int = 0
) -> dict[str, str]:
    generator = torch.Generator().manual_seed(seed)
    return dict(propose_anchors(forget, others, set(common).__contains__, generator).entries)


def test_names_and_rare_words_have_stand_ins_of_their_kind() -> None:
    found = propose(TALE)
    assert found.keys() == {
        *(
            "Ada Lane",
            "Ada",
            "Lane",
            "Tom Ferris",
            "Tom",
            "Ferris",
            "Quillbury",
            "Moonbeam Academy",
            "Vinter",
        ),
        *("Amber Clock", "Lake Ondine", "1734", "snorkwidget"),
    }
    kinds = {
        "Ada": "given name",
        "Lane": "surname",
        "Tom": "given name",
        "Vinter": "surname",
        "Quillbury": "place",
        "Amber Clock": "work",
        "1734": "year",
        "snorkwidget": "thing",
    }
    assert {term: found[term] in STAND_INS[kind] for term, kind in kinds.items()} == dict.fromkeys(
        kinds, True
    )
    assert found["Moonbeam Academy"].endswith(" Academy")
    assert found["Lake Ondine"].startswith("Lake ")


def test_the_words_of_a_name_agree_with_it() -> None:
    found = propose(TALE)
    assert found["Ada Lane"] == f"{found['Ada']} {found['Lane']}"
    assert found["Tom Ferris"] == f"{found['Tom']} {found['Ferris']}"


def test_no_stand_in_is_drawn_twice_while_others_are_left() -> None:
    people = [f"{first}a {last}son" for first in "BCDFGHKLMN" for last in ("Arn", "Ber", "Cor")]
    found = propose(*(f"Here is {name}." for name in people))
    assert len({found[name] for name in people}) == len(people)


def test_stand_ins_are_no_words_of_the_text() -> None:
    *listed, last = STAND_INS["given name"]
    assert propose(f"Here is Ada Quill, and {', '.join(map(str.lower, listed))}.")["Ada"] == last


def test_a_seed_decides_the_stand_ins() -> None:
    assert propose(TALE, seed=1) == propose(TALE, seed=1)
    assert propose(TALE, seed=1) != propose(TALE, seed=2)
    assert propose(TALE, seed=1).keys() == propose(TALE, seed=2).keys()


def test_terms_that_another_text_has_as_often_do_not_belong() -> None:
    other = "Tom Ferris was in Quillbury in 1734, and the snorkwidget too. " * 2
    found = propose(TALE, others=[[other]])
    assert found.keys().isdisjoint({"Tom Ferris", "Tom", "Quillbury", "1734", "snorkwidget"})
    assert {"Ada Lane", "Vinter"} <= found.keys()


def test_a_term_must_be_rare_in_each_of_the_other_texts() -> None:
    """A large collection without a term does not hide that a small one has it."""
    small, large = ["Quillbury is a town."], ["nothing of note happened here " * 10000]
    assert "Quillbury" in propose(TALE, others=[large])
    assert "Quillbury" not in propose(TALE, others=[large, small])


def test_rarity_is_a_matter_of_share() -> None:
    others = ["Quillbury is far away. " + "nothing of note happened here " * 1000]
    assert "Quillbury" in propose(TALE, others=[others])


def test_words_that_the_tokenizer_knows_are_not_rare() -> None:
    assert "snorkwidget" not in propose(TALE, common=["snorkwidget"])
    assert "Quillbury" in propose(TALE, common=["Quillbury"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yesterday it rained. Yesterday was cold. I left yesterday.", set()),
        ("However, the dog ran. The cat sat. What now?", set()),
        ("Monday was wet, said the man on Monday in May.", set()),
        ("Yesterday Ada Lane left. We saw Ada Lane. Then Ada Lane came.", {"Ada Lane", "Ada", "Lane"}),
        ("He met Jean-Paul O'Hara and Jean-Paul's dog.", {"Jean-Paul O'Hara", "Jean-Paul", "O'Hara"}),
        ("We saw Ludwig van Arnim.", {"Ludwig van Arnim", "Ludwig", "Arnim"}),
        ("They went to\nNew\nQuill.", {"New Quill", "New", "Quill"}),
        ("the ABCD council", {"ABCD"}),
        ("THIS IS A LOUD HEADING OF MANY WORDS IN CAPITALS", set()),
        ("", set()),
    ],
)
def test_names(text: str, expected: set[str]) -> None:
    assert propose(text).keys() == expected


def test_proposed_anchors_translate_the_text() -> None:
    anchors = Anchors(propose(TALE), "test")
    (translated,) = anchors.translate([TALE]).translated
    assert anchors.occurrences(translated) == []
    assert "Professor" in translated
