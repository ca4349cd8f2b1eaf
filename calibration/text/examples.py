"""Labelled examples for the task of a model's head, from a .jsonl file with one example per line.

Sequence classification
    ``{"text": ..., "label": ...}``, with ``text_pair`` if the model reads two texts.
Token classification
    ``{"words": [...], "labels": [...]}``, with one label per word.
Question answering
    ``{"question": ..., "context": ..., "answers": [...]}``, where ``answers`` are the texts that count as
    right. An empty list says that the context holds no answer (as in SQuAD 2).

A label is an id or one of the names in the model's ``id2label``. For calibration, labels and answers may be
left out. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.anatomy import Task, anatomy_of, model_class, task_of
from compress.calibration.text.sources import Documents, json_objects
from compress.errors import BadInput, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class TextExample:
    """A text, or a pair of texts, with one label."""

    text: str
    pair: str | None = None
    label: int | None = None

    @property
    def words(self) -> str:
        """The text by which overlap with other text is found; in all three kinds of examples."""
        return self.text


@dataclass(frozen=True)
class WordsExample:
    """Words, each with a label."""

    tokens: tuple[str, ...]
    labels: tuple[int, ...] | None = None

    @property
    def words(self) -> str:
        return " ".join(self.tokens)


@dataclass(frozen=True)
class QuestionExample:
    """A question, the context that answers it, and the answers that count as right."""

    question: str
    context: str
    answers: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        return self.context


Example = TextExample | WordsExample | QuestionExample


@dataclass(frozen=True)
class TaskFile:
    """The examples of a file, in its order.

    Attributes:
        task: of the model's head.
        examples: all of the kind that belongs to the task.
        path: the file, as the user named it.
        sha256: of the bytes of the file.
    """

    task: Task
    examples: tuple[Any, ...]
    path: str
    sha256: str

    @property
    def source(self) -> str:
        return self.path

    @cached_property
    def documents(self) -> Documents:
        """The text of each example."""
        return Documents(tuple(example.words for example in self.examples), self.path)

    @cached_property
    def document_hashes(self) -> frozenset[str]:
        """sha256 of each example's text, by which overlap with calibration text is found."""
        return frozenset(self.documents.hashes)


def task_of_encoder(config: PretrainedConfig, name: str) -> Task:
    """The task of an encoder's head.

    Args:
        config: of the model.
        name: of the model, for messages.

    Raises:
        BadInput: the model is a decoder, has no task head, or does not choose a single label.
    """
    anatomy, task = anatomy_of(config), task_of(config)
    if anatomy.kind != "encoder":
        raise BadInput(
            f"'{name}' is a decoder ({config.model_type}); a task file scores encoders with a task head, "
            "so evaluate it on text, without --task-file."
        )
    if task is None:
        raise BadInput(
            f"'{name}' has no task head (its class is {model_class(config).__name__}); give a model for "
            "sequence classification, token classification or question answering."
        )
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    if task == "sequence classification" and (
        (config.num_labels or 0) < 2 or problem != "single_label_classification"
    ):
        raise BadInput(
            f"'{name}' does not choose one label per text (num_labels {config.num_labels}, problem_type "
            f"{problem}), so it has no accuracy."
        )
    return task


def read_task_file(path: str | Path, config: PretrainedConfig, task: Task, labelled: bool = True) -> TaskFile:
    """Read the examples of a file.

    Args:
        path: the file.
        config: of the model, for the names of its labels.
        task: of the model's head.
        labelled: whether every example must have its label or answers.

    Raises:
        BadInput: there is no such file, it is not JSON lines or holds no examples; a key is missing or has a
            wrong value; the model does not know a label.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"There is no task file '{path}'.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BadInput(f"The task file '{path}' cannot be read ({error.strerror or error}).") from error
    parse = {
        "sequence classification": _sequence,
        "token classification": _tagged_words,
        "question answering": _question,
    }[task]
    names: dict[Any, int] = {}
    for index, name in (config.id2label or {}).items():
        names |= {str(name): int(index), int(index): int(index)}
    examples = tuple(
        parse(_Row(row, where, task, labelled, names)) for row, where in json_objects(content, str(path))
    )
    if not examples:
        raise BadInput(f"The task file '{path}' holds no examples.")
    return TaskFile(task, examples, str(path), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class _Row:
    """One line of the file, and what is needed to check it and to say where a mistake is."""

    values: Mapping[str, Any]
    where: str
    task: Task
    labelled: bool
    names: Mapping[Any, int]  # name or id of a label -> id

    def has(self, key: str) -> bool:
        """Whether a label or answers must be read: always if examples must be labelled, else if they are."""
        return self.labelled or key in self.values

    def get(self, key: str) -> Any:
        if key not in self.values:
            there = ", ".join(f"'{name}'" for name in self.values) or "nothing"
            raise BadInput(f"{self.where} lacks '{key}', which {self.task} needs; it has {there}.")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            raise BadInput(f"{self.where}: '{key}' is not a text.")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadInput(f"{self.where}: '{key}' is not a list of texts.")
        return tuple(value)

    def label(self, value: Any) -> int:
        is_label = isinstance(value, str | int) and not isinstance(value, bool)  # True equals the label 1
        if is_label and value in self.names:
            return self.names[value]
        shown = value if isinstance(value, str) else json.dumps(value)
        names = [name for name in self.names if isinstance(name, str)]
        raise BadInput(f"{self.where}: {unknown('label', shown, names)}")


def _sequence(row: _Row) -> TextExample:
    pair = row.text("text_pair") if row.values.get("text_pair") is not None else None
    label = row.label(row.get("label")) if row.has("label") else None
    return TextExample(row.text("text"), pair, label)


def _tagged_words(row: _Row) -> WordsExample:
    words = row.texts("words")
    if not words:
        raise BadInput(f"{row.where}: 'words' is empty.")
    if not row.has("labels"):
        return WordsExample(words)
    labels = row.get("labels")
    if not isinstance(labels, list) or len(labels) != len(words):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise BadInput(
            f"{row.where}: there must be one label per word; {len(words)} words have {count} labels."
        )
    return WordsExample(words, tuple(row.label(label) for label in labels))


def _question(row: _Row) -> QuestionExample:
    answers = row.texts("answers") if row.has("answers") else None
    return QuestionExample(row.text("question"), row.text("context"), answers)
