"""What a model said, beside what it should have said."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

from compress.errors import CompressError
from compress.unlearning.dpo import REFUSALS

REFUSING = re.compile(
    r"\b(i|we) (do not|don't|cannot|can't|could not|couldn't|am not|are not) "
    r"(know|say|tell|answer|help|assist|recall|remember|sure|certain|aware|familiar|able|allowed|provide|share)"
    r"|\bi'm (not (sure|certain|aware|familiar|able|allowed)|unable|sorry|afraid)"
    r"|\b(no idea|no information|unable to (answer|help|say))|(\bnot|n't) have (any |that )?information"
    r"|\b(query|question) is not valid|^sorry\b",
    re.IGNORECASE,
)
"""Ways to refuse, or to say that one does not know."""

UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of scripts without spaces between words: Thai and Lao, Japanese, Chinese."""


def rouge_recall(answer: str, said: str) -> float:
    """ROUGE-L recall: the share of the answer's stems that occur in what was said, in the same order.

    Raises:
        CompressError: the library rouge-score is not installed.
    """
    return float(_scorer().score(answer, said)["rougeL"].recall)


def is_refusal(said: str) -> bool:
    """Whether the model refuses or says that it does not know, or says nothing.

    What DPO teaches is known also where it was cut off, which says at least three words.
    """
    text = said.strip().replace("’", "'")
    if not text or REFUSING.search(text) is not None:
        return True
    cut = text.count(" ") >= 2
    return any(text.startswith(taught) or (cut and taught.startswith(text)) for taught in REFUSALS)


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
    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """Splits text of any script into words for rouge-score, whose own tokenizer drops all but a to z.

    A word is a run of letters, digits and the marks on them, such as the vowel signs of Hindi; of scripts
    without spaces between words, each character is one. English words are stemmed as the library does it:
    those of more than three letters. Characters that can be spelled in several ways count as the same,
    because tokenizers respell them.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        folded = unicodedata.normalize("NFKC", text).lower()
        kept = "".join(
            each if each.isalnum() or unicodedata.category(each)[0] == "M" else " " for each in folded
        )
        words = UNSPACED.sub(r" \g<0> ", kept).split()
        return [
            stem for word in words for stem in (self._english.tokenize(word) if word.isascii() else [word])
        ]
