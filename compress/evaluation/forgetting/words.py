"""What a model said, beside what it should have said."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from compress.errors import CompressError

REFUSALS = re.compile(
    r"\b(i|we) (do not|don't|cannot|can't|could not|couldn't|am not|are not) "
    r"(know|say|tell|answer|help|assist|recall|remember|sure|certain|aware|familiar|able|allowed|provide|share)"
    r"|\bi'm (not (sure|certain|aware|familiar|able|allowed)|unable|sorry|afraid)"
    r"|\b(no idea|no information|not have (any )?information|unable to (answer|help|say))"
    r"|\b(query|question) is not valid|^sorry\b",
    re.IGNORECASE,
)
"""Ways to refuse, or to say that one does not know."""


def rouge_recall(answer: str, said: str) -> float:
    """ROUGE-L recall: the share of the answer's stems that occur in what was said, in the same order.

    Raises:
        CompressError: the library rouge-score is not installed.
    """
    return float(_scorer().score(answer, said)["rougeL"].recall)


def is_refusal(said: str) -> bool:
    """Whether the model refuses or says that it does not know, or says nothing."""
    text = said.strip().replace("’", "'")
    return not text or REFUSALS.search(text) is not None


def first_line(said: str, answer: str) -> str:
    """What was said, without the lines behind the first one where the answer itself has one line: a model
    that does not stop goes on with other questions."""
    said = said.strip()
    return said if "\n" in answer.strip() else said.partition("\n")[0].strip()


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise CompressError(
            "An audit compares answers with the library rouge-score; install it with "
            "'pip install compress-model[eval]'."
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=True)
