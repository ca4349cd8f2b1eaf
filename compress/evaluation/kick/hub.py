"""The data sets of LLM-KICK in the shape that the scorers want; lm-eval calls these as ``process_docs``.

``datasets`` fetches them. The defects of the published selection are mended: a story that comes twice is
asked once, and no story holds the ``@highlight`` lines that are its reference.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = (
    "kick_hub_factoid",
    "mmlu",
    "kick_hub_mmlu_letter",
    "kick_hub_closed",
    "kick_hub_open",
    "kick_hub_summary_short",
    "kick_hub_summary_medium",
    "kick_hub_summary_long",
    "kick_hub_instruct",
    "kick_hub_turn_first",
    "kick_hub_turn_second",
)
"""Members of the group ``kick_hub``."""

CONTEXT = 3072
"""Characters of the open-book texts, as in the published script."""

STORIES = 100
"""Stories of each length, as in the paper."""

WORDS = 150
"""What a summary has to stay under, as in the published prompt."""

SHORT, LONG = 470, 790
"""Words of the longest short story, and of the longest one of medium length, as in the paper."""

EXAMPLES = 5
FIRST_REPLY = "gpt-4"
"""Whose answer to the first question stands before the second one, for every model."""


def freebase(questions: Dataset) -> Dataset:
    """FreebaseQA: every question with the answers of its first parse; questions without any are left out."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        first = row["Parses"][0]["Answers"] if row["Parses"] else []
        names = [name for answer in first for name in answer["AnswersName"]]
        return {"question": row["RawQuestion"], "answers": names}

    return _made([one(row) for row in questions], lambda row: row["answers"] and row["question"])


def trivia(questions: Dataset) -> Dataset:
    """TriviaQA: question and aliases; ``passage`` is the first Wikipedia and the first web text, cut."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        pages = row["entity_pages"]["wiki_context"][:1] + row["search_results"]["search_context"][:1]
        answer = row["answer"]
        answers = list(dict.fromkeys([answer["value"], *answer["aliases"]]))
        return {"question": row["question"], "answers": answers, "passage": "\n".join(pages)[:CONTEXT]}

    return _made([one(row) for row in questions], lambda row: row["answers"] and row["question"])


def with_passage(questions: Dataset) -> Dataset:
    """`trivia`, only questions that have a text."""
    return trivia(questions).filter(lambda row: bool(row["passage"].strip()))


def short_stories(stories: Dataset) -> Dataset:
    """CNN/DailyMail: the first stories of at most 470 words."""
    return _stories(stories, 1, SHORT)


def medium_stories(stories: Dataset) -> Dataset:
    """CNN/DailyMail: the first stories of 471 to 790 words."""
    return _stories(stories, SHORT + 1, LONG)


def long_stories(stories: Dataset) -> Dataset:
    """CNN/DailyMail: the first stories of more than 790 words."""
    return _stories(stories, LONG + 1, None)


def instructions(questions: Dataset) -> Dataset:
    """The 80 questions of Vicuna's blog."""
    rows = [{"instruction": row["turns"][0], "category": row["category"]} for row in questions]
    return _made(rows, lambda row: row["instruction"])


def first_turn(conversations: Dataset) -> Dataset:
    """MT-Bench: the first question of each conversation."""
    return _turns(conversations, lambda talk: talk[0]["content"])


def second_turn(conversations: Dataset) -> Dataset:
    """MT-Bench: both questions, with the first reply of one model between them.

    Every model gets the same first reply, so that two of them are asked the same and can be paired.
    """
    return _turns(
        conversations,
        lambda talk: f"{talk[0]['content']} ASSISTANT: {talk[1]['content']}</s>USER: {talk[2]['content']}",
    )


def mmlu(**metadata: object) -> dict[str, Dataset]:
    """MMLU: all subjects; ``header`` holds the subject and five of its examples, as is usual."""
    from datasets import load_dataset

    data = load_dataset("cais/mmlu", "all")
    shown: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in data["dev"]:
        shown[row["subject"]].append(row)
    rows = [{**row, "header": header(row["subject"], shown[row["subject"]])} for row in data["test"]]
    return {"test": _made(rows, lambda row: (row["subject"], row["question"], *row["choices"]))}


def header(subject: str, examples: list[dict[str, Any]]) -> str:
    """The published header of a subject, with its first five examples."""
    start = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    )
    return start + "".join(f"{_lettered(row)} {'ABCD'[row['answer']]}\n\n" for row in examples[:EXAMPLES])


def without_highlights(story: str) -> str:
    """A story up to the first ``@highlight``, after which comes its reference."""
    return re.split(r"\s*@highlight\b", story)[0].strip()


def _lettered(row: dict[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def _stories(stories: Dataset, least: int, most: int | None) -> Dataset:
    found: dict[str, dict[str, Any]] = {}
    for row in stories:
        story = without_highlights(row["article"])
        length = len(story.split())
        if least <= length and (most is None or length <= most) and len(found) < STORIES:
            found.setdefault(story, {"story": story, "summary": row["highlights"], "words": WORDS})
    return _made(list(found.values()), lambda row: row["story"])


def _turns(conversations: Dataset, prompt: Any) -> Dataset:
    found: dict[int, dict[str, Any]] = {}
    for row in conversations:
        for side in ("a", "b"):
            talk = row[f"conversation_{side}"]
            if row[f"model_{side}"] == FIRST_REPLY and len(talk) >= 3:
                found.setdefault(row["question_id"], {"id": row["question_id"], "instruction": prompt(talk)})
    rows = [found[number] for number in sorted(found)]
    return _made(rows, lambda row: row["instruction"])


def _made(rows: list[dict[str, Any]], key: Any) -> Dataset:
    """A data set of the rows that have a key, each key once."""
    from datasets import Dataset

    once = {str(key(row)): row for row in rows if key(row)}
    return Dataset.from_list(list(once.values()))
