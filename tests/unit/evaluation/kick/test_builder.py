"""The builder of the bundled questions, on a WordNet of six lines and facts made up here: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[4] / "scripts" / "data"

NOUNS = """  1 the licence
00000010 05 n 02 bird 0 feathered_friend 0 001 ~ 00000020 n 0000 | an animal that flies; "birds sing"
00000020 05 n 01 robin 0 001 @ 00000010 n 0000 | a small (red) bird; common in gardens
00000030 15 n 01 France 0 000 | a republic
00000040 15 n 01 Lyon 0 002 @i 00000050 n 0000 #p 00000030 n 0000 | a city in France
00000050 15 n 01 city 0 000 | a large town
"""
INDEX = "robin n 1 1 @ 1 1 00000020\nfeathered_friend n 1 1 ~ 1 0 00000010\n"


@pytest.fixture
def kick(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from kick import facts, leaks, questions, summaries, wordnet

    return {
        "facts": facts,
        "leaks": leaks,
        "questions": questions,
        "summaries": summaries,
        "wordnet": wordnet,
    }


def test_wordnet(kick: Any) -> None:
    files = {f"{file}.{part}": "" for file in ("data", "index") for part in kick["wordnet"].PARTS}
    files |= {
        "data.noun": NOUNS,
        "index.noun": INDEX,
        "cntlist.rev": "robin%1:05:00:: 1 7\nrobin%1:05:01:: 2 2\n",
    }
    found = kick["wordnet"].WordNet(files)
    (robin,) = found.senses["robin", "n"]
    assert robin.definition == "a small bird"
    assert found.ancestors(robin) == {("n", 10)}
    assert found.counts["robin", "n"] == 9
    assert found.senses["feathered friend", "n"][0].words == ("bird", "feathered friend")
    lyon = found.synsets["n", 40]
    assert (lyon.to("kind"), lyon.to("inside"), lyon.to("hypernym")) == ([("n", 50)], [("n", 30)], [])


def made_up(kick: Any, number: int) -> list[Any]:
    return [
        kick["facts"].Fact(
            "country", f"City {one}", f"Where is City {one}?", f"City {one} is in", (f"Land {one % 40}",),
            f"City {one} is a city in Land {one % 40}.",
        )
        for one in range(number)
    ]  # fmt: skip


def test_the_same_seed_deals_the_same_and_no_fact_twice(kick: Any) -> None:
    questions = kick["questions"]

    def deal(seed: int) -> list[dict[str, Any]]:
        dealer = questions.Dealer(made_up(kick, 400), seed)
        return questions.factoid(dealer) + questions.choice(dealer) + questions.retrieval(dealer)

    assert deal(0) == deal(0)
    assert deal(0) != deal(1)
    asked = [item["question"] for item in deal(0)]
    assert len(set(asked)) == len(asked) > 200


def test_passages_have_one_sentence_with_the_subject(kick: Any) -> None:
    dealer = kick["questions"].Dealer(made_up(kick, 200), 0)
    for item in kick["questions"].retrieval(dealer):
        assert sum(f"{item['subject']} is" in part for part in item["passage"].split(". ")) == 1
        assert item["passage"].count(item["answers"][0] + ".") == 1


def test_facts_that_the_calibration_text_tells_are_left_out(
    kick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [
        "City 1\n\nIt lies in Land 1, far away.\n\nNothing.",
        "Land 2\n\nIts port is City 22.\n\nCity 2-north.",
    ]
    monkeypatch.setattr(kick["leaks"], "factbook", lambda split: text)
    left = {fact.subject for fact in kick["leaks"].without(made_up(kick, 4))}
    assert left == {"City 0", "City 3"}


def test_the_principal_sentence(kick: Any) -> None:
    sentences = [
        "The weather is mild there in most of the winter months.",
        "The economy lives on cotton, and cotton prices decide about the whole economy.",
        "Cotton prices fell.",
        "The economy shrank.",
    ]
    assert kick["summaries"].principal(sentences) == sentences[1]
    assert kick["summaries"].principal(["One two.", "Three four."]) is None
