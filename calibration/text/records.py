"""Records: pieces of knowledge to forget or to retain, one per line of a .jsonl file.

A line is an object with one of

- ``text``: prose;
- ``question`` and ``answer``;
- ``messages``: a conversation, a list of ``{"role": ..., "content": ...}``, whose last message is learned.

Questions may also have ``paraphrases`` (a list of other wordings), ``paraphrased_answer``, ``wrong`` (a list
of wrong answers of the same kind) and ``paraphrased_wrong`` (the same in the words of
``paraphrased_answer``), which the audit of forgetting uses. Any record may have an ``id`` (by default the
number in the set, where blank lines do not count) and a ``subject``. Other keys are errors.

Besides files there are the offline benchmark ``people:SPLIT[:SEED]`` (see the module ``people``), and sets of
the Hugging Face hub: ``tofu:CONFIG`` (arXiv:2401.06121), ``muse:news|books:SPLIT`` (arXiv:2407.06460),
``wmdp:bio|chem|cyber`` and ``wmdp:CORPUS`` (arXiv:2403.03218), and ``hub:DATASET[:CONFIG[:SPLIT]]``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.text.people import SPLITS, people
from compress.calibration.text.sources import (
    HALF_CHARACTER,
    Conversation,
    Documents,
    hub_rows,
    json_objects,
    words,
)
from compress.calibration.text.tokens import first_tokens
from compress.errors import BadInput, unknown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROMPT = "Question: {question}\nAnswer:"
"""How a question is put to the model. A space and the answer follow."""

IGNORED = -100
"""The label of a token that is not learned."""

KEYS = (
    "id",
    "subject",
    "text",
    "question",
    "answer",
    "messages",
    "paraphrases",
    "paraphrased_answer",
    "wrong",
    "paraphrased_wrong",
)

HUB_NAMES = {
    "paraphrased_question": "paraphrases",
    "perturbed_answer": "wrong",
}
"""Names of columns in sets of the hub -> ours."""


@dataclass(frozen=True)
class Record:
    """A piece of knowledge: prose, a question with its answer, or a conversation.

    Attributes:
        id: names the record in results.
        paraphrases: other wordings of the question.
        paraphrased_answer: another wording of the answer.
        wrong: wrong answers of the same kind as the right one.
        paraphrased_wrong: wrong answers in the words of the paraphrased one.
        subject: whom or what it is about.
    """

    id: str
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    messages: Conversation | None = None
    paraphrases: tuple[str, ...] = ()
    paraphrased_answer: str | None = None
    wrong: tuple[str, ...] = ()
    paraphrased_wrong: tuple[str, ...] = ()
    subject: str | None = None

    @cached_property
    def words(self) -> str:
        """All its words, with single spaces; overlap with other text is found by them."""
        said = [message["content"] for message in self.messages or ()]
        parts = (self.text, self.question, self.answer, *said)
        return " ".join(" ".join(part for part in parts if part).split())

    @cached_property
    def hash(self) -> str:
        """sha256 of its words."""
        return hashlib.sha256(self.words.encode()).hexdigest()


@dataclass(frozen=True)
class Records:
    """Records in the order of their source, which is the string that names it."""

    entries: tuple[Record, ...]
    source: str

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def hashes(self) -> frozenset[str]:
        """The hash of every record."""
        return frozenset(record.hash for record in self.entries)

    @cached_property
    def sha256(self) -> str:
        """sha256 over the hashes of the records, in order."""
        return hashlib.sha256("".join(record.hash for record in self.entries).encode()).hexdigest()

    @property
    def described(self) -> dict[str, Any]:
        """How many there are and their sha256, for the report of a step."""
        return {"records": len(self), "sha256": self.sha256}

    def holds(self, text: str) -> bool:
        """Whether a text tells what a record tells.

        Prose counts where one of the two holds the other, and a question where the text holds both the
        question and its answer; white space and capitals do not matter.
        """
        said = " ".join(text.split()).casefold()
        return any(all(part in said for part in parts) or said in whole for parts, whole in self._folded)

    @cached_property
    def _folded(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        found = []
        for record in self.entries:
            whole = record.words.casefold()
            asked = (record.question, record.answer) if record.question and record.answer else (whole,)
            found.append((tuple(" ".join(part.split()).casefold() for part in asked), whole))
        return tuple(found)


def read_records(source: str, what: str = "forget") -> Records:
    """Read the records of a source.

    Args:
        source: a .jsonl file, or one of the named sets above.
        what: what the records are for, for messages ("forget", "retain", ...).

    Raises:
        BadInput: there is no such source; a line is not an object with the keys above; nothing is in it.
        CompressError: a set of the hub cannot be fetched.
    """
    name, colon, rest = source.partition(":")
    if colon and name == "people":
        rows = _people(source, rest)
    elif colon and name in ("tofu", "muse", "wmdp", "hub"):
        rows = _hub(source, name, rest)
    else:
        rows = _file(source, what)
    entries = tuple(_record(row, number, where) for number, (row, where) in enumerate(rows, start=1))
    if not entries:
        raise BadInput(f"The {what} set '{source}' holds no records.")
    seen: set[str] = set()
    for record in entries:
        if record.id in seen:
            raise BadInput(f"The {what} set '{source}' has two records with the id '{record.id}'.")
        seen.add(record.id)
    return Records(entries, source)


def check_apart(forget: Records, retain: Records) -> None:
    """Make sure that nothing is to be forgotten and retained.

    Raises:
        BadInput: the two sets share a record.
    """
    if shared := forget.hashes & retain.hashes:
        first = next(record for record in forget.entries if record.hash in shared)
        raise BadInput(
            f"{len(shared)} of the {len(forget)} records to forget are also to be retained, the first is "
            f"'{first.words[:60]}'; take them out of '{retain.source}'."
        )


def without(documents: Documents, forget: Sequence[Records]) -> Documents:
    """The documents that do not tell what is to be forgotten; a warning counts the others.

    Raises:
        BadInput: none is left.
    """
    kept = tuple(
        entry for entry in documents.entries if not any(records.holds(words(entry)) for records in forget)
    )
    if left_out := len(documents.entries) - len(kept):
        log.warning(
            "%d of the %d documents of %s tell what is to be forgotten, and are left out of the calibration.",
            *(left_out, len(documents.entries), documents.source),
        )
    if not kept:
        raise BadInput(f"All of '{documents.source}' is to be forgotten; calibrate on other text.")
    return replace(documents, entries=kept) if left_out else documents


def _people(source: str, rest: str) -> Iterator[tuple[dict[str, Any], str]]:
    split, _, seed = rest.partition(":")
    if split not in SPLITS:
        raise unknown("split of people", split, SPLITS)
    if seed and not seed.isdecimal():
        raise BadInput(f"'{source}' should read people:SPLIT[:SEED], where the seed is a whole number.")
    for row in people(split, int(seed or 0)):
        yield dict(row), source


def _file(source: str, what: str) -> Iterator[tuple[dict[str, Any], str]]:
    path = Path(source).expanduser()
    if not path.is_file() or path.suffix != ".jsonl":
        problem = "is not a .jsonl file" if path.is_file() else "does not exist"
        raise BadInput(
            f"The {what} set '{source}' {problem}; give a .jsonl file, or people:, tofu:, muse:, wmdp: or "
            "hub: and the name of a set."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"The {what} set '{source}' cannot be read ({error.strerror or error}).") from None
    for row, where in json_objects(content, source):
        for key in row:
            if key not in KEYS:
                raise BadInput(f"{where}: {unknown('field', key, KEYS)}")
        yield row, where


def _hub(source: str, name: str, rest: str) -> Iterator[tuple[dict[str, Any], str]]:
    dataset, config, split = _place(source, name, rest)
    for number, row in enumerate(hub_rows(dataset, config, split), start=1):
        known = {HUB_NAMES.get(key, key): value for key, value in row.items() if value is not None}
        if isinstance(known.get("paraphrases"), str):
            known["paraphrases"] = [known["paraphrases"]]
        if isinstance(known.get("choices"), list) and isinstance(known.get("answer"), int):
            choices = list(known["choices"])
            if not 0 <= known["answer"] < len(choices):  # some sets hide the answers with -1
                found = f"the answer {known['answer']} is none of the {len(choices)} choices"
                raise BadInput(f"{source}, row {number}: {found}.")
            known["answer"] = choices.pop(known["answer"])
            known["wrong"] = choices
        yield (
            {key: value for key, value in known.items() if key in KEYS and key != "id"},
            f"{source}, row {number}",
        )


def _place(source: str, name: str, rest: str) -> tuple[str, str | None, str]:
    """Data set, config and split of a set of the hub."""
    parts = rest.split(":")
    if not parts[0]:
        raise BadInput(f"'{source}' names no set.")
    if name == "tofu" and len(parts) == 1:
        return "locuslab/TOFU", parts[0], "train"
    if name == "muse" and len(parts) == 2 and parts[0] in ("news", "books"):
        return f"muse-bench/MUSE-{parts[0].title()}", "raw", parts[1]
    if name == "wmdp" and len(parts) == 1:
        if parts[0] in ("bio", "chem", "cyber"):
            return "cais/wmdp", f"wmdp-{parts[0]}", "test"
        return "cais/wmdp-corpora", parts[0], "train"
    if name == "hub" and len(parts) <= 3:
        config, split = (*parts[1:], "", "")[:2]
        return parts[0], config or None, split or "train"
    raise BadInput(
        f"'{source}' should read tofu:CONFIG, muse:news:SPLIT, muse:books:SPLIT, wmdp:SUBJECT, wmdp:CORPUS "
        "or hub:DATASET[:CONFIG[:SPLIT]]."
    )


def _record(row: Mapping[str, Any], number: int, where: str) -> Record:
    if HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False, default=str)):
        raise BadInput(f"{where} holds half a character (a lone surrogate).")

    def text(key: str) -> str | None:
        value = row.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise BadInput(f"{where}: '{key}' is not a text.")
        return value

    def texts(key: str) -> tuple[str, ...]:
        value = row.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise BadInput(f"{where}: '{key}' is not a list of texts.")
        return tuple(value)

    messages = row.get("messages")
    if messages is not None and (
        not isinstance(messages, list)
        or len(messages) < 2
        or not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    ):
        raise BadInput(
            f"{where}: 'messages' is not a list of at least two messages with 'role' and 'content'."
        )
    if messages is not None and not messages[-1]["content"].strip():
        raise BadInput(f"{where}: the last of the 'messages', which is to be learned, is empty.")
    kinds = [key for key in ("text", "question", "messages") if row.get(key) is not None]
    if len(kinds) != 1 or (kinds == ["question"]) != (row.get("answer") is not None):
        there = ", ".join(f"'{key}'" for key in row) or "nothing"
        raise BadInput(f"{where} needs 'text', 'question' and 'answer', or 'messages'; it has {there}.")
    return Record(
        id=str(number if row.get("id") is None else row["id"]),
        text=text("text"),
        question=text("question"),
        answer=text("answer"),
        messages=tuple({"role": message["role"], "content": message["content"]} for message in messages or ())
        or None,
        paraphrases=texts("paraphrases"),
        paraphrased_answer=text("paraphrased_answer"),
        wrong=texts("wrong"),
        paraphrased_wrong=texts("paraphrased_wrong"),
        subject=text("subject"),
    )


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that go through a model in one piece.

    Attributes:
        id: of the record; those of a long text share it.
        tokens: token ids.
        labels: what is learned at each token: the token itself, or `IGNORED` (the prompt of an answer).
    """

    id: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]


def sequences(
    records: Records | Sequence[Record], tokenizer: PreTrainedTokenizerBase, seqlen: int = 256
) -> list[TokenSequence]:
    """The records as tokens, in their order.

    A question is put as `PROMPT`, and the answer ends with the tokenizer's end-of-text token. Of a
    conversation the last message is learned. Prose is cut into pieces of at most ``seqlen`` tokens and
    learned from its second token on; each piece begins with the BOS token if the tokenizer puts one before
    texts.

    Raises:
        BadInput: a question or conversation has more than ``seqlen`` tokens, or an answer without any; there
            is no chat template; or no record of a set has more than one token.
    """
    entries = records.entries if isinstance(records, Records) else records
    found = [sequence for record in entries for sequence in _sequences(record, tokenizer, seqlen)]
    if isinstance(records, Records) and not found:
        raise BadInput(f"No record of '{records.source}' has more than one token, so nothing can be learned.")
    return found


def _sequences(record: Record, tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Iterator[TokenSequence]:
    if record.text is not None:
        begin = first_tokens(tokenizer)
        tokens = tokenizer(record.text, add_special_tokens=False)["input_ids"]
        size = seqlen - len(begin)
        for start in range(0, len(tokens), size):
            piece = [*begin, *tokens[start : start + size]]
            if len(piece) > 1:
                yield TokenSequence(record.id, tuple(piece), (IGNORED, *piece[1:]))
        return
    if record.messages is not None:
        if tokenizer.chat_template is None:
            raise BadInput("The tokenizer has no chat template, which records with 'messages' need.")
        *before, last = record.messages
        try:
            prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
            whole = str(tokenizer.apply_chat_template(list(record.messages), tokenize=False))
        except Exception as error:  # a template is a program, and may raise anything
            raise BadInput(
                f"The tokenizer's chat template refuses the record '{record.id}' ({error})."
            ) from error
        # Some templates write what came before differently once there is an answer.
        learned = whole.removeprefix(prompt) if whole.startswith(prompt) else last["content"]
        yield _prompted(record.id, prompt, learned, tokenizer, seqlen, special=False)
        return
    end = tokenizer.eos_token or ""
    prompt = PROMPT.format(question=record.question)
    yield _prompted(record.id, prompt, f" {record.answer}{end}", tokenizer, seqlen, special=True)


def _prompted(
    name: str, prompt: str, learned: str, tokenizer: PreTrainedTokenizerBase, seqlen: int, special: bool
) -> TokenSequence:
    begin = first_tokens(tokenizer) if special else []
    before = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    after = tokenizer(learned, add_special_tokens=False)["input_ids"]
    if not set(after) - {tokenizer.eos_token_id}:
        raise BadInput(f"The answer of the record '{name}' has no tokens: the tokenizer drops all of it.")
    if len(before) + len(after) > seqlen:
        raise BadInput(
            f"The record '{name}' has {len(before) + len(after)} tokens, more than the seqlen of {seqlen}."
        )
    return TokenSequence(name, (*before, *after), (*[IGNORED] * len(before), *after))


def collate(batch: Sequence[TokenSequence], pad: int) -> dict[str, torch.Tensor]:
    """Sequences as one batch, padded on the right.

    Args:
        batch: B sequences.
        pad: the token that fills up.

    Returns:
        ``input_ids``, ``attention_mask`` (0 at padding) and ``labels`` (`IGNORED` at padding): int64 [B, S].
    """
    import torch

    longest = max(len(sequence.tokens) for sequence in batch)

    def filled(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([filled(sequence.tokens, pad) for sequence in batch]),
        "attention_mask": torch.tensor([filled([1] * len(sequence.tokens), 0) for sequence in batch]),
        "labels": torch.tensor([filled(sequence.labels, IGNORED) for sequence in batch]),
    }
