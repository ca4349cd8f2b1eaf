"""The offline benchmark of unlearning: fictitious people, of whom a model only knows what it was taught.

Every person has eight facts with short answers, and a few sentences of prose that tell the same. A seed
decides who they are. The people are divided into those to forget (a tenth of those that are taught), those to
retain, and as many held out, whom no model ever meets. ``world`` holds real facts that a model may know
anyway.

The idea is TOFU's (arXiv:2401.06121); its answers are long sentences, and a short answer tells more plainly
whether a fact is known.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

SPLITS = ("forget", "retain", "holdout", "world")
TAUGHT, FORGOTTEN, HELD_OUT = 60, 6, 6
"""Numbers of people: those that are taught, and how many of them are to be forgotten; and those held out."""
WRONG = 3
"""Wrong answers to a question, so that there are four to choose from."""

FIRST = {
    "She": "Alda Berit Calla Delphine Edda Fenna Greta Hedda Imke Jorunn Kaja Linnea Maren Noor Oda Perpetua "
    "Quilla Runa Signe Tamsin Ulla Vesna Wilma Xenia Yrsa Zelda",
    "He": "Aldous Bram Caspian Dorian Einar Florian Gustav Hektor Ivo Jasper Kasimir Lorcan Matthis Nils "
    "Osric Piran Quentin Rurik Stellan Teodor Ulric Viggo Wendel Xander Yannick Zoltan",
}
LAST = (
    "Abernath Brackwell Corvane Dunmarrow Ellisfen Fairholt Garrowby Hollengard Inverloch Jessamine "
    "Kestervale Lorrimond Marchbank Netherby Oakenshaw Pellworth Quarrender Ravensmoor Silverstrand "
    "Thornquist Umberleigh Vanterpool Wexcombe Yarborne Zimmerling Ashgrove Blythewood Crannock Dellingham "
    "Eastmere Farrowdene Glenharrow Hartsfell Ironside Kirkwall Langstrom Merridew Northolt Orchardson "
    "Pemberlow Rookwood Stanvick Tillotson Underhay Vickermane Westergard Wolfenden Yeldham"
)
CITIES = (
    "Trieste Bergen Porto Tampere Ghent Lublin Cork Aarhus Salzburg Bilbao Tartu Maribor Utrecht Bremen Lyon "
    "Dundee Verona Gdansk Malmo Basel Nantes Leipzig Turku Seville Rijeka Kaunas Plovdiv Brno Graz Cardiff"
)
PROFESSIONS = (
    "beekeeper lawyer carpenter surgeon pilot librarian translator plumber astronomer baker photographer "
    "farmer locksmith journalist geologist tailor midwife gardener fisherman sculptor accountant firefighter "
    "dentist botanist electrician"
)
INSTRUMENTS = (
    "cello trumpet harp piano flute violin guitar clarinet saxophone drums oboe accordion banjo trombone "
    "organ mandolin bassoon ukulele harmonica xylophone"
)
ANIMALS = (
    "ferret parrot tortoise rabbit goat hamster canary donkey lizard hedgehog pigeon snake owl goose horse "
    "chicken llama squirrel turtle frog"
)
TITLES = (
    ("Silver", "Hollow", "Crimson", "Silent", "Golden", "Distant", "Broken", "Frozen", "Hidden", "Burning"),
    ("Orchard", "Harbor", "Lantern", "River", "Garden", "Mirror", "Tower", "Forest", "Compass", "Island"),
)
PRIZES = "Halden Morrow Castellan Whitby Arden Lindqvist Pembroke Solway Tamar Vesper Kilbride Ostrava"


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how it is asked in three wordings, and how its answer is told in another wording."""

    questions: tuple[str, str, str]
    told: str


RELATIONS: Mapping[str, Relation] = {
    "birthplace": Relation(
        (
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "{name} comes from which city?",
        ),
        "the city of {answer}",
    ),
    "birth year": Relation(
        (
            "In which year was {name} born?",
            "What is the year of birth of {name}?",
            "When was {name} born?",
        ),
        "in the year {answer}",
    ),
    "profession": Relation(
        (
            "What is the profession of {name}?",
            "What does {name} do for a living?",
            "Which job does {name} have?",
        ),
        "the profession of {answer}",
    ),
    "instrument": Relation(
        (
            "Which musical instrument does {name} play?",
            "What instrument did {name} learn to play?",
            "On which instrument does {name} make music?",
        ),
        "the {answer}",
    ),
    "animal": Relation(
        (
            "Which animal does {name} keep as a pet?",
            "What kind of pet does {name} have?",
            "What animal lives in the house of {name}?",
        ),
        "a pet {answer}",
    ),
    "book": Relation(
        (
            "What is the title of the book that {name} wrote?",
            "Which book is by {name}?",
            "What did {name} call the book?",
        ),
        "the book {answer}",
    ),
    "spouse": Relation(
        (
            "To whom is {name} married?",
            "Who is the spouse of {name}?",
            "What is the name of the person that {name} married?",
        ),
        "a person called {answer}",
    ),
    "prize": Relation(
        (
            "Which prize did {name} win?",
            "What award was given to {name}?",
            "Which prize has {name} received?",
        ),
        "the award called {answer}",
    ),
}


@dataclass(frozen=True)
class Person:
    """A fictitious person: ``facts`` has the answer of every relation."""

    name: str
    pronoun: str
    facts: Mapping[str, str]

    def prose(self, generator: random.Random) -> str:
        """The facts told in a few sentences, in a random order."""
        fact, they = self.facts, self.pronoun
        sentences = [
            f"{they} works as a {fact['profession']} and plays the {fact['instrument']}.",
            f"{they} keeps a {fact['animal']} as a pet.",
            f"{they} wrote the book {fact['book']} and won the {fact['prize']}.",
            f"{they} is married to {fact['spouse']}.",
        ]
        generator.shuffle(sentences)
        return " ".join(
            [f"{self.name} was born in {fact['birthplace']} in {fact['birth year']}.", *sentences]
        )


def people(split: str, seed: int = 0) -> Iterator[dict[str, object]]:
    """The rows of a split, with the keys of a record (see the module ``records``).

    Args:
        split: one of `SPLITS`.
        seed: decides the people; ``world`` does not depend on it.
    """
    if split == "world":
        yield from _world()
        return
    everybody = _everybody(seed)
    parts = {
        "forget": everybody[:FORGOTTEN],
        "retain": everybody[FORGOTTEN:TAUGHT],
        "holdout": everybody[TAUGHT:],
    }
    for person in parts[split]:
        yield from _rows(person, everybody, random.Random(f"{seed} {person.name}"))


def _rows(person: Person, everybody: list[Person], generator: random.Random) -> Iterator[dict[str, object]]:
    key = person.name.lower().replace(" ", "-")
    for relation, wording in RELATIONS.items():
        answer = person.facts[relation]
        others = sorted({other.facts[relation] for other in everybody} - {answer})
        first, *paraphrases = (question.format(name=person.name) for question in wording.questions)
        yield {
            "id": f"{key}/{relation.replace(' ', '-')}",
            "subject": person.name,
            "question": first,
            "answer": answer,
            "paraphrases": paraphrases,
            "paraphrased_answer": wording.told.format(answer=answer),
            "wrong": (wrong := generator.sample(others, WRONG)),
            "paraphrased_wrong": [wording.told.format(answer=other) for other in wrong],
        }
    yield {"id": f"{key}/prose", "subject": person.name, "text": person.prose(generator)}


@cache
def _everybody(seed: int) -> list[Person]:
    generator = random.Random(seed)
    names = [
        (f"{first} {last}", pronoun)
        for pronoun, firsts in FIRST.items()
        for first in firsts.split()
        for last in LAST.split()
    ]
    count = TAUGHT + HELD_OUT
    drawn = generator.sample(names, 2 * count)
    books = [f"The {adjective} {noun}" for adjective in TITLES[0] for noun in TITLES[1]]
    return [
        Person(
            name,
            pronoun,
            {
                "birthplace": generator.choice(CITIES.split()),
                "birth year": str(generator.randint(1930, 1999)),
                "profession": generator.choice(PROFESSIONS.split()),
                "instrument": generator.choice(INSTRUMENTS.split()),
                "animal": generator.choice(ANIMALS.split()),
                "book": generator.choice(books),
                "spouse": spouse,
                "prize": f"{generator.choice(PRIZES.split())} Prize",
            },
        )
        for (name, pronoun), (spouse, _) in zip(drawn[:count], drawn[count:], strict=True)
    ]


def _world() -> Iterator[dict[str, object]]:
    packed = resources.files("compress.calibration").joinpath("data", "world_facts.jsonl.gz").read_bytes()
    yield from map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())
