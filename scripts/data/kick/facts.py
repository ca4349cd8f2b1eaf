"""Facts of the three sources as questions with short answers, relation by relation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kick.countries import capital, held_out, languages, name, neighbours
from kick.sources import Sources
from kick.wordnet import Synset, WordNet


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        relation: what it says of its subject; answers of one relation are of one type.
        subject: what is asked about.
        question: ends with a question mark.
        statement: beginning of a sentence that the answer ends.
        answers: all right ones, the usual one first.
        passage: a sentence that holds subject and answer, or "".
        never: what may not stand beside the answer as a wrong one, although it is of the same relation.
    """

    relation: str
    subject: str
    question: str
    statement: str
    answers: tuple[str, ...]
    passage: str = ""
    never: frozenset[str] = frozenset()


PLACES = {"city", "town", "provincial capital"}

OCCUPATIONS = [
    "composer",
    "painter",
    "poet",
    "philosopher",
    "physicist",
    "chemist",
    "mathematician",
    "actor",
    "architect",
    "explorer",
    "singer",
    "astronomer",
    "economist",
    "sculptor",
    "dancer",
    "general",
    "inventor",
    "dramatist",
    "historian",
]

KINDS = [
    "bird",
    "fish",
    "insect",
    "tree",
    "snake",
    "dog",
    "horse",
    "monkey",
    "vegetable",
    "fruit",
    "beverage",
    "weapon",
    "garment",
    "disease",
    "metal",
    "building",
    "furniture",
    "tool",
    "fabric",
    "game",
    "dance",
    "language",
    "color",
    "boat",
    "container",
    "emotion",
    "sport",
    "flower",
    "gem",
    "vehicle",
    "rodent",
]
"""What things of everyday life are kinds of: nouns, each in its first meaning."""

THINGS = {5, 6, 8, 13, 17, 20, 27}
"""Files of WordNet whose words can be seen: animals, artefacts, bodies, food, objects, plants, substances."""

AMERICAN = ("American", "United States", "U.S.")


def all_facts(sources: Sources) -> list[Fact]:
    """Every fact, in an order that depends on the sources only."""
    wordnet = sources.wordnet
    return [
        *_countries(sources),
        *_elements(sources),
        *_cities(wordnet),
        *_state_capitals(wordnet),
        *_people(wordnet),
        *_opposites(wordnet),
        *_kinds(wordnet),
        *_definitions(wordnet),
    ]


def _countries(sources: Sources) -> Iterator[Fact]:
    for country in held_out(sources.factbook):
        here = name(country)
        if city := capital(country):
            yield Fact(
                "capital", here, f"What is the capital of {here}?", f"The capital of {here} is", (city,)
            )
        if spoken := languages(country):
            yield Fact(
                "language",
                here,
                f"What is an official language of {here}?",
                f"The official language of {here} is",
                spoken[:1] + spoken[1:],
            )
        if around := neighbours(country):
            yield Fact(
                "neighbour",
                here,
                f"Which country borders {here}?",
                f"{here} has a border with",
                around,
                never=frozenset({here}),
            )


def _elements(sources: Sources) -> Iterator[Fact]:
    for number, element in enumerate(sources.elements):
        if number % 2:
            question = f"What is the chemical symbol of {element.name}?"
            yield Fact(
                "symbol",
                element.name,
                question,
                f"The chemical symbol of {element.name} is",
                (element.symbol,),
            )
        else:
            question = f"Which chemical element has the symbol {element.symbol}?"
            statement = f"{element.symbol} is the chemical symbol of the element"
            yield Fact("element", element.symbol, question, statement, (element.name,))


def _cities(wordnet: WordNet) -> Iterator[Fact]:
    """Cities by country, and American ones by state; a name that several places share is left out."""
    countries = set(_instances(wordnet, lambda kind: kind == "country" or kind.endswith(" country")))
    states = set(_instances(wordnet, lambda kind: kind == "American state"))
    places = [place for place in wordnet.nouns() if _kinds_of(wordnet, place) & PLACES and place.field == 15]
    often = Counter(place.words[0] for place in places)
    for place in places:
        here = place.words[0]
        if often[here] > 1 or not place.definition:
            continue
        around = [key for key in place.to("inside") if key in countries | states]
        if len(around) != 1:
            continue
        answers = _names(wordnet.synsets[around[0]])
        told = any(re.search(rf"\b{re.escape(answer)}\b", place.definition) for answer in answers)
        passage = f"{here} is {place.definition}{'' if told else f', in {answers[0]}'}."
        if around[0] in states:
            question = f"In which state of the United States is {here}?"
            yield Fact("state", here, question, f"The city of {here} is in the state of", answers, passage)
        else:
            question = f"In which country is the city of {here}?"
            yield Fact(
                "country", here, question, f"The city of {here} is in the country of", answers, passage
            )


def _state_capitals(wordnet: WordNet) -> Iterator[Fact]:
    states = set(_instances(wordnet, lambda kind: kind == "American state"))
    for city in wordnet.nouns():
        for key in city.to("inside"):
            if "state capital" in _kinds_of(wordnet, city) and key in states:
                state = wordnet.synsets[key].words[0]
                question = f"What is the capital of the state of {state}?"
                yield Fact(
                    "state capital",
                    state,
                    question,
                    f"The capital of the state of {state} is",
                    (city.words[0],),
                )


def _people(wordnet: WordNet) -> Iterator[Fact]:
    """Occupation or nationality of a person, alternately."""
    number = 0
    for person in wordnet.nouns():
        occupations = [kind for kind in sorted(_kinds_of(wordnet, person)) if kind in OCCUPATIONS]
        full = max((word for word in person.words if " " in word), key=len, default="")
        if person.field != 18 or len(occupations) != 1 or not full or full.isupper():
            continue
        occupation = occupations[0]
        people = re.match(r"(United States|[A-Z][a-z]+(?:n|h|ch|se))\b", person.definition)
        if occupation not in person.definition or not people:
            continue
        number += 1
        passage = f"{full} was {article(person.definition)} {person.definition}."
        if number % 2:
            never = frozenset(other for other in OCCUPATIONS if other in person.gloss and other != occupation)
            yield Fact(
                "occupation",
                full,
                f"What was the profession of {full}?",
                f"{full} was a famous",
                (occupation,),
                passage,
                never,
            )
        else:
            answers = AMERICAN if people[1] == "United States" else (people[1],)
            yield Fact(
                "nationality",
                full,
                f"What was the nationality of the {occupation} {full}?",
                f"The nationality of the {occupation} {full} was",
                answers,
                passage,
            )


def _opposites(wordnet: WordNet) -> Iterator[Fact]:
    """Opposite adjectives, asked for in one direction."""
    for one in wordnet.synsets.values():
        for sign, key, here, there in one.pointers:
            if one.key[0] != "a" or sign != "!" or key < one.key:
                continue
            other = wordnet.synsets[key]
            word, opposite = one.words[here - 1], other.words[there - 1]
            if min(wordnet.counts[word, "a"], wordnet.counts[opposite, "a"]) < 2 or _alike(word, opposite):
                continue
            answers = (opposite, *(more for more in other.words if more != opposite))
            yield Fact(
                "opposite",
                word,
                f"What is the opposite of {word}?",
                f"The opposite of {word} is",
                answers,
                never=frozenset(_near(wordnet, word) | _near(wordnet, opposite)),
            )


def _kinds(wordnet: WordNet) -> Iterator[Fact]:
    kinds = {wordnet.senses[kind, "n"][0].key: kind for kind in KINDS}
    for thing in wordnet.nouns():
        word = thing.words[0]
        up = [kinds[key] for key in wordnet.ancestors(thing) if key in kinds]
        if len(up) == 1 and _usual(wordnet, thing, 1) and up[0] not in word and word not in KINDS:
            yield Fact(
                "kind",
                word,
                f"What kind of thing is {article(word)} {word}?",
                f"{article(word).capitalize()} {word} is a kind of",
                (up[0],),
            )


def _definitions(wordnet: WordNet) -> Iterator[Fact]:
    for thing in wordnet.nouns():
        word, meaning = thing.words[0], thing.definition
        if thing.field in THINGS and _usual(wordnet, thing, 8) and 4 <= len(meaning.split()) <= 20:
            if word.lower()[:4] in meaning.lower():
                continue
            yield Fact(
                f"word {thing.field}",
                meaning,
                f'Which word means "{meaning}"?',
                f'The word that means "{meaning}" is',
                tuple(w.lower() for w in thing.words),
                never=frozenset(_near(wordnet, word, "n")),
            )


def _usual(wordnet: WordNet, thing: Synset, least: int) -> bool:
    """Whether the first word of a noun is one word, frequent, and usually means this."""
    word = thing.words[0]
    usual = word.isalpha() and word.islower() and wordnet.senses[word, "n"][0].key == thing.key
    return usual and wordnet.counts[word, "n"] >= least


def _near(wordnet: WordNet, word: str, part: str = "a") -> set[str]:
    """Words that share a meaning with ``word``, or are next to one of its meanings."""
    near = set()
    for synset in wordnet.senses.get((word.lower(), part), []):
        for key in [synset.key, *(key for sign, key, _, _ in synset.pointers if sign in "&@~^")]:
            near |= {more.lower() for more in wordnet.synsets[key].words}
    return near


def _instances(wordnet: WordNet, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    return [place.key for place in wordnet.nouns() if any(wanted(kind) for kind in _kinds_of(wordnet, place))]


def _kinds_of(wordnet: WordNet, thing: Synset) -> set[str]:
    return {wordnet.synsets[key].words[0] for key in thing.to("kind")}


def _names(place: Synset) -> tuple[str, ...]:
    return tuple(word for word in place.words if not word.startswith("capital"))


def _alike(word: str, other: str) -> bool:
    """Whether one is made of the other, as happy and unhappy are."""
    return word[:4] == other[:4] or word in other or other in word or word[-4:] == other[-4:]


def article(text: str) -> str:
    return "an" if text[:1].lower() in "aeiou" and not text.startswith(("Eu", "eu", "Uni", "uni")) else "a"
