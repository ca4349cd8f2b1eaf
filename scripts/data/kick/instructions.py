"""Instructions that a rule can check, about words of WordNet and countries of the Factbook."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from kick.countries import held_out, name, neighbours
from kick.facts import Fact, article
from kick.sources import Sources

EACH = 52
"""Items of each kind."""

COUNTABLE = {5, 6, 17, 20}
"""Files of WordNet whose words one can count: animals, artefacts, objects, plants."""

OPTIONS = (["yes", "no"], ["true", "false"], ["agree", "disagree"])
ENDINGS = ("and that is all", "thank you for reading", "this is the end", "so it goes", "as I said")
OPENERS = ("Although", "Perhaps", "Today", "Yesterday", "Imagine", "Once", "However", "Suddenly", "Maybe")
KEYS = (["name", "color"], ["name", "size"], ["name", "use"], ["name", "kind"], ["name", "place"])

Made = tuple[str, str, dict[str, Any], str]
"""Instruction, rule, its arguments, and an answer that follows it."""


def instructions(sources: Sources, facts: list[Fact], seed: int) -> list[dict[str, Any]]:
    """The items: an equal number of every kind, in an order drawn by ``seed``.

    Args:
        sources: where the words and countries come from.
        facts: those whose statements are to be repeated.
        seed: of order and words.
    """
    chance = random.Random(seed)
    words = _words(sources)
    countries = [name(country) for country in held_out(sources.factbook) if neighbours(country)]
    sentences = [
        f"{fact.statement} {fact.answers[0]}." for fact in facts if not fact.relation.startswith("word")
    ]
    made = [_item(kind(chance, words, countries, sentences), chance) for kind in KINDS for _ in range(EACH)]
    items = list({item["instruction"]: item for item in made}.values())
    chance.shuffle(items)
    return [{"split": "test", **item} for item in items]


def _item(made: Made, chance: random.Random) -> dict[str, Any]:
    instruction, rule, arguments, answer = made
    other = chance.choice([name for name in EXAMPLES if name != rule])
    shown = [dict(zip(("instruction", "follows"), EXAMPLES[name])) for name in (other, rule)]
    return {
        "relation": rule,
        "instruction": instruction,
        "rule": rule,
        "arguments": arguments,
        "follows": answer,
        "shown": shown,
    }


def _words(sources: Sources) -> list[str]:
    """Names of things, frequent enough that any model knows them."""
    wordnet = sources.wordnet
    return [
        thing.words[0]
        for thing in wordnet.nouns()
        if thing.field in COUNTABLE and thing.words[0].isalpha() and thing.words[0].islower()
        and wordnet.senses[thing.words[0], "n"][0] is thing and wordnet.counts[thing.words[0], "n"] >= 15
    ]  # fmt: skip


def _contains(chance: random.Random, words: list[str], countries: list[str], _: list[str]) -> Made:
    word, country = chance.choice(words), chance.choice(countries)
    return (
        f'Write one sentence about {country} that contains the word "{word}".',
        "contains", {"word": word}, f"In {country} I saw {article(word)} {word}.",
    )  # fmt: skip


def _starts(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word, opener = chance.choice(words), chance.choice(OPENERS)
    return (
        f'Write one sentence about {article(word)} {word}. Begin with the word "{opener}".',
        "starts", {"word": opener}, f"{opener}, the {word} was not there.",
    )  # fmt: skip


def _ends(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word, ending = chance.choice(words), chance.choice(ENDINGS)
    return (
        f'Write one short sentence about {article(word)} {word}. End it with the words "{ending}".',
        "ends", {"words": ending}, f"This is {article(word)} {word}, {ending}.",
    )  # fmt: skip


def _upper(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word = chance.choice(words)
    return (
        f"Write one short sentence about {article(word)} {word}. Use capital letters only.",
        "upper", {}, f"THE {word.upper()} IS ON THE TABLE.",
    )  # fmt: skip


def _lower(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word = chance.choice(words)
    return (
        f"Write one short sentence about {article(word)} {word}. Use small letters only, no capitals.",
        "lower", {}, f"the {word} is on the table.",
    )  # fmt: skip


def _quoted(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word = chance.choice(words)
    return (
        f"Write one short sentence about {article(word)} {word}. Put the whole sentence in double quotes.",
        "quoted", {}, f'"The {word} is on the table."',
    )  # fmt: skip


def _numbered(chance: random.Random, words: list[str], countries: list[str], _: list[str]) -> Made:
    country, count = chance.choice(countries), chance.choice((2, 3, 4))
    answer = "\n".join(
        f"{number}. {word}" for number, word in enumerate(chance.sample(words, count), start=1)
    )
    return (
        f"List {count} things that one can buy in {country}. "
        f"Write each on its own line, numbered 1 to {count}.",
        "numbered", {"count": count}, answer,
    )  # fmt: skip


def _bullets(chance: random.Random, words: list[str], countries: list[str], _: list[str]) -> Made:
    country, count = chance.choice(countries), chance.choice((2, 3, 4))
    answer = "\n".join(f"- {word}" for word in chance.sample(words, count))
    return (
        f"List {count} things that one can see in {country}. Begin each line with a hyphen.",
        "bullets", {"count": count}, answer,
    )  # fmt: skip


def _repeats(chance: random.Random, words: list[str], countries: list[str], sentences: list[str]) -> Made:
    sentence = chance.choice(sentences)
    return f"Repeat this sentence and write nothing else: {sentence}", "repeats", {"text": sentence}, sentence


def _one_of(chance: random.Random, words: list[str], countries: list[str], _: list[str]) -> Made:
    (one, other), options = chance.sample(words, 2), chance.choice(OPTIONS)
    first, second = options
    return (
        f"Say whether {article(one)} {one} is larger than {article(other)} {other}. "
        f'Answer with "{first}" or "{second}" and nothing else.',
        "one of", {"options": options}, first,
    )  # fmt: skip


def _json(chance: random.Random, words: list[str], *_: list[str]) -> Made:
    word, keys = chance.choice(words), chance.choice(KEYS)
    first, second = keys
    return (
        f'Describe {article(word)} {word} as a JSON object with the keys "{first}" and "{second}", '
        "and write nothing else.",
        "json", {"keys": keys}, f'{{"{first}": "{word}", "{second}": "any"}}',
    )  # fmt: skip


KINDS: tuple[Callable[..., Made], ...] = (
    _contains, _starts, _ends, _upper, _lower, _quoted, _numbered, _bullets, _repeats, _one_of, _json,
)  # fmt: skip

EXAMPLES = {
    "contains": (
        'Write one sentence about Canada that contains the word "bridge".',
        "A long bridge joins Canada and the United States at Detroit.",
    ),
    "starts": (
        'Write one sentence about a garden. Begin with the word "Tomorrow".',
        "Tomorrow the garden will be full of flowers.",
    ),
    "ends": (
        'Write one short sentence about a train. End it with the words "or so they say".',
        "The train is always late, or so they say.",
    ),
    "upper": (
        "Write one short sentence about a kitchen. Use capital letters only.",
        "THE KITCHEN SMELLS OF FRESH BREAD.",
    ),
    "lower": (
        "Write one short sentence about a pencil. Use small letters only, no capitals.",
        "my pencil is red and quite short.",
    ),
    "quoted": (
        "Write one short sentence about a candle. Put the whole sentence in double quotes.",
        '"The candle burns all night."',
    ),
    "numbered": (
        "List 3 things that one can buy in Japan. Write each on its own line, numbered 1 to 3.",
        "1. A silk fan\n2. Green tea\n3. A paper lamp",
    ),
    "bullets": (
        "List 3 things that one can see in Norway. Begin each line with a hyphen.",
        "- Deep fjords\n- Wooden churches\n- Northern lights",
    ),
    "repeats": (
        "Repeat this sentence and write nothing else: The river flows to the south.",
        "The river flows to the south.",
    ),
    "one of": (
        'Say whether a mountain is larger than a spoon. Answer with "right" or "wrong" and nothing else.',
        "right",
    ),
    "json": (
        'Describe a carrot as a JSON object with the keys "name" and "taste", and write nothing else.',
        '{"name": "carrot", "taste": "sweet"}',
    ),
}
"""One item of each kind and an answer; prompts show that of the same kind, after another one."""
