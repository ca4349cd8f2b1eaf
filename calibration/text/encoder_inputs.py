"""Inputs of encoders: examples and texts with the model's special tokens at the beginning and the end.

Every input holds one example, in calibration as in use, and is padded. Two examples cannot share an input,
because attention would see both and a classifier reads its answer from the first token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import Task, task_of
from compress.calibration.text.examples import (
    Example,
    QuestionExample,
    TextExample,
    WordsExample,
    read_task_file,
)
from compress.calibration.text.sources import Documents, read_documents
from compress.calibration.text.tokens import fingerprint
from compress.engine.config import config_of
from compress.engine.skeleton import longest_input
from compress.engine.stream import StreamedModel
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from compress.calibration.text.settings import Calibration
    from compress.storage.checkpoint import Checkpoint

log = logging.getLogger(__name__)

# For question answering, windows of a long context overlap, with the numbers that BERT used on SQuAD.
ANSWERING_TOKENS = 384
STRIDE_TOKENS = 128


@dataclass(frozen=True)
class Input:
    """One input of the model.

    Attributes:
        tokens: ids, with the special tokens of the model.
        types: 0 or 1 for tokens of the first or second text; None if all tokens belong to the first.
        places: for token classification, number of a word -> position of its first token; for question
            answering, position of a token of the context -> where in the context it begins and ends.
        cut: whether a part of the example is in none of its inputs.
    """

    tokens: list[int]
    types: list[int] | None
    places: dict[int, Any]
    cut: bool


def load_task_tokenizer(checkpoint: Checkpoint, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer that makes inputs for a task.

    Raises:
        BadInput: there is none, or it cannot tell which token belongs to which word.
    """
    # Byte-level BPE must be told that a space stands before each of the words, including the first.
    settings = {"add_prefix_space": True} if task == "token classification" else {}
    tokenizer = load_tokenizer(checkpoint.folder, **settings)
    if task != "sequence classification" and not tokenizer.is_fast:
        raise BadInput(
            f"The tokenizer of '{checkpoint.folder}' does not tell where in the text a token is, which "
            f"{task} needs; save it as a fast tokenizer (tokenizer.json)."
        )
    return tokenizer


def encode(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, longest: int
) -> Iterator[list[Input]]:
    """Yield the inputs of each example.

    Args:
        examples: of one task.
        tokenizer: as `load_task_tokenizer` gives it.
        config: of the model, which says whether it reads token types.
        longest: the largest number of tokens in an input.

    Raises:
        BadInput: a question leaves no room for its context.
    """
    longest = min(longest, tokenizer.model_max_length)
    typed = getattr(config, "type_vocab_size", 1) > 1

    def call(*texts: Any, **settings: Any) -> Any:
        return tokenizer(*texts, return_token_type_ids=typed, verbose=False, **settings)

    for example in examples:
        if isinstance(example, TextExample):
            yield _text_inputs(call, example, longest)
        elif isinstance(example, WordsExample):
            yield _word_inputs(call, example, longest)
        else:
            yield _question_inputs(call, example, longest)


def _text_inputs(call: Callable[..., Any], example: TextExample, longest: int) -> list[Input]:
    texts = [example.text] if example.pair is None else [example.text, example.pair]
    whole = call(*texts)
    cut = len(whole.input_ids) > longest
    if cut:
        whole = call(*texts, truncation=True, max_length=longest)
    return [Input(whole.input_ids, _types(whole.get("token_type_ids")), {}, cut)]


def _word_inputs(call: Callable[..., Any], example: WordsExample, longest: int) -> list[Input]:
    encoded = call(list(example.tokens), is_split_into_words=True, truncation=True, max_length=longest)
    first: dict[int, int] = {}
    for position, word in enumerate(encoded.word_ids()):
        if word is not None:
            first.setdefault(word, position)
    cut = len(first) < len(example.tokens)
    return [Input(encoded.input_ids, _types(encoded.get("token_type_ids")), first, cut)]


def _question_inputs(call: Callable[..., Any], example: QuestionExample, longest: int) -> list[Input]:
    longest = min(longest, ANSWERING_TOKENS)
    room = longest - len(call(example.question, "").input_ids)
    if room < 2:
        raise BadInput(
            f"The question '{example.question[:40]}…' fills the {longest} tokens the model reads and leaves "
            "no room for its context; shorten it."
        )
    encoded = call(
        example.question,
        example.context,
        truncation="only_second",
        max_length=longest,
        stride=min(STRIDE_TOKENS, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    inputs = []
    for window, tokens in enumerate(encoded.input_ids):
        offsets = zip(encoded.sequence_ids(window), encoded.offset_mapping[window], strict=True)
        places = {position: span for position, (text, span) in enumerate(offsets) if text == 1}
        types = encoded.token_type_ids[window] if "token_type_ids" in encoded else None
        inputs.append(Input(tokens, _types(types), places, cut=False))
    return inputs


def _types(types: list[int] | None) -> list[int] | None:
    return types if any(types or ()) else None


def padded(inputs: Sequence[Input], padding: int, source: str = "") -> Windows:
    """Put inputs together as windows of one length.

    Args:
        inputs: at least one.
        padding: the token on the right of shorter inputs.
        source: where they come from.
    """
    shape = len(inputs), max(len(one.tokens) for one in inputs)
    tokens = torch.full(shape, padding, dtype=torch.int64)
    types = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, one in enumerate(inputs):
        length = len(one.tokens)
        tokens[row, :length] = torch.tensor(one.tokens)
        mask[row, :length] = True
        if one.types is not None:
            types[row, :length] = torch.tensor(one.types)
    windows = Windows(tokens, mask, source)
    return replace(windows, token_types=types) if types.any() else windows


def calibration_inputs(checkpoint: Checkpoint, wanted: Calibration, seed: int) -> Windows:
    """Calibration inputs of an encoder, with one example each, padded to the longest of them.

    If the model has a task head, a .jsonl file holds examples of its task, with or without labels (see
    :mod:`compress.calibration.text.examples`). Otherwise, and in any other source, each document is an
    example. ``wanted.nsamples`` inputs of at most ``wanted.seqlen`` tokens are drawn at random. If there are
    fewer, a warning says how many.

    Raises:
        BadInput: the source cannot be used, does not fit the task, or holds conversations.
        CompressError: the source cannot be fetched.
    """
    if wanted.chat_template:
        raise BadInput("An encoder does not read conversations; calibrate it without a chat template.")
    config = config_of(checkpoint)
    task = task_of(config)
    examples, documents = _calibration_examples(wanted, config, task)
    tokenizer = load_task_tokenizer(checkpoint, task) if task else load_tokenizer(checkpoint.folder)
    longest = min(wanted.size.seqlen, longest_input(StreamedModel(checkpoint).model))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn: list[Input] = []
    used: set[int] = set()
    for index, inputs in zip(
        order, encode((examples[i] for i in order), tokenizer, config, longest), strict=True
    ):
        used.add(index)
        drawn += inputs[: wanted.size.nsamples - len(drawn)]
        if len(drawn) == wanted.size.nsamples:
            break
    if len(drawn) < wanted.size.nsamples:
        log.warning(
            "%s holds only %d of the %d inputs asked for; calibration uses these.",
            wanted.source,
            len(drawn),
            wanted.size.nsamples,
        )
    return replace(
        padded(drawn, config.pad_token_id or 0, wanted.source),
        document_hashes=frozenset(documents.hashes[index] for index in used),
        settings={
            "nsamples": wanted.size.nsamples,
            "seed": seed,
            "chat_template": False,
            "licence": documents.licence,
            "text_sha256": documents.sha256,
            "tokenizer": fingerprint(tokenizer),
        },
    )


def _calibration_examples(
    wanted: Calibration, config: PretrainedConfig, task: Task | None
) -> tuple[Sequence[Example], Documents]:
    """The examples of a source, and their texts in the same order, by which overlap with evaluation text is
    found."""
    if task is not None and Path(wanted.source).suffix.lower() == ".jsonl":
        file = read_task_file(wanted.source, config, task, labelled=False)
        return file.examples, file.documents
    documents = read_documents(wanted.source, 8 * wanted.size.nsamples * wanted.size.seqlen)
    texts = [entry for entry in documents.entries if isinstance(entry, str)]
    if len(texts) < len(documents.entries):
        raise BadInput(f"{wanted.source} holds conversations, which an encoder does not read; give texts.")
    return [TextExample(text) for text in texts], documents
