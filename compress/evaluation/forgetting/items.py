"""Records as a model reads them: the tokens of a prompt, and those of the answer to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from compress.calibration.text.records import IGNORED, Record, sequences
from compress.errors import BadInput

GIVEN = 3
"""One token in so many is given of an answer that is begun for the model, at least one."""


@dataclass(frozen=True)
class Question:
    """A prompt and its answer, without the end of text behind it.

    Of prose, the first half of its tokens is the prompt, and the second half the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """All ways to ask for one record.

    Attributes:
        id: of the record.
        asked: the question as it was learned.
        text: the words of its answer.
        rephrased: the same question in other words, with the same answer.
        paraphrased: the question with its answer in other words, or else the answer itself.
        wrong: the question with each wrong answer.
        misled: the question with each wrong answer in the words of the paraphrased one, or else ``wrong``.
        begun: the question with the first tokens of its answer, and what follows; None for one token.
    """

    id: str
    asked: Question
    text: str
    rephrased: tuple[Question, ...]
    paraphrased: Question
    wrong: tuple[Question, ...]
    misled: tuple[Question, ...]
    begun: Question | None

    @property
    def questions(self) -> Iterator[Question]:
        """All of them."""
        yield from (self.asked, *self.rephrased, self.paraphrased, *self.wrong, *self.misled)
        if self.begun is not None:
            yield self.begun


def items_of(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seqlen: int) -> list[Item]:
    """The records as tokens; of prose that is longer than ``seqlen`` tokens, the beginning.

    Raises:
        BadInput: a record has fewer than two tokens.
    """
    return [_item(record, tokenizer, seqlen) for record in records]


def _item(record: Record, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Item:
    def ask(**changes: Any) -> Question:
        return _question(replace(record, **changes), tokenizer, seqlen)

    asked = ask()
    given = given_of(asked)
    has_answer = record.answer is not None
    wrong = tuple(ask(answer=other) for other in record.wrong) if has_answer else ()
    misled = tuple(ask(answer=other) for other in record.paraphrased_wrong) if has_answer else ()
    begun = Question(asked.prompt + asked.answer[:given], asked.answer[given:])
    return Item(
        id=record.id,
        asked=asked,
        text=record.answer or words_of(asked.answer, tokenizer),
        rephrased=tuple(ask(question=other) for other in record.paraphrases) if has_answer else (),
        paraphrased=ask(answer=record.paraphrased_answer) if record.paraphrased_answer else asked,
        wrong=wrong,
        misled=misled or wrong,
        begun=begun if begun.answer else None,
    )


def _question(record: Record, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Question:
    found = sequences([record], tokenizer, seqlen)
    tokens, labels = (list(found[0].tokens), list(found[0].labels)) if found else ([], [])
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    if ends and not words_of(tokens[ends[-1] :], tokenizer):  # templates put a line end behind it
        tokens, labels = tokens[: ends[-1]], labels[: ends[-1]]
    if len(tokens) < 2:
        raise BadInput(
            f"The record '{record.id}' is too short to be asked for: it has fewer than two tokens."
        )
    first = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    if record.text is not None:
        first = max(1, len(tokens) // 2)
    return Question(tuple(tokens[:first]), tuple(tokens[first:]))


def given_of(question: Question) -> int:
    """How many tokens of an answer are given to a model that is to go on with it."""
    return max(1, len(question.answer) // GIVEN)


def words_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of some tokens, without special ones and white space around it."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
