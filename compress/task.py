"""The examples of a task file through a model: as inputs, streamed layer by layer, and back as predictions.

Inputs are sorted by length and go through the model a chunk at a time, padded to the longest of their chunk,
so that memory is bounded by the chunk and one layer, and little is spent on padding. What is predicted does
not depend on the chunks: padding is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import Task
from compress.calibration.windows import Windows
from compress.errors import BadInput
from compress.flops import flops
from compress.measure import longest_input
from compress.modeling import check_finite, config_of
from compress.models import load_tokenizer
from compress.reload import first_output
from compress.scorecard import Figure, TaskProtocol
from compress.stream import StreamedModel
from compress.task_file import (
    QuestionExample,
    TaskFile,
    TextExample,
    WordsExample,
    read_task_file,
    task_of_encoder,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from compress.checkpoint import Checkpoint

CHUNK_TOKENS = 1 << 14

# Question answering as BERT did it on SQuAD: windows over a long context, and answers that are not too long.
ANSWERING_TOKENS = 384
STRIDE_TOKENS = 128
ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Input:
    """One input of the model.

    Attributes:
        tokens: ids, with the special tokens of the model.
        types: which of two texts each token is of; None if all are of the first.
        places: of a token classifier, number of a word -> position of its first token; of a question
            answerer, position of a token of the context -> where in the context it begins and ends.
        cut: whether something of the example is missing here and in the example's other inputs.
    """

    tokens: list[int]
    types: list[int] | None
    places: dict[int, Any]
    cut: bool


class TaskEvaluation:
    """The examples of a file as a model's inputs, and what it and its compressed versions predict on them.

    Args:
        path: the task file.
        dense: the model whose tokenizer and labels count.
        device: where to compute.

    Raises:
        BadInput: the model is no encoder with a task head, or the file has no examples of its task.
    """

    def __init__(self, path: str, dense: Checkpoint, device: str = "cpu") -> None:
        self.dense = dense
        self.device = device
        config = config_of(dense)
        task = task_of_encoder(config, str(dense.folder))
        self.file = read_task_file(path, config, task)
        model = StreamedModel(dense, device)
        self.inputs = encode(self.file, load_task_tokenizer(dense, task), config, longest_input(model.model))
        if task == "token classification" and not any(one.places for inputs in self.inputs for one in inputs):
            raise BadInput(f"The tokenizer of '{dense.folder}' makes no token of any word in '{path}'.")
        lengths = [len(one.tokens) for inputs in self.inputs for one in inputs]
        self.protocol = TaskProtocol(
            task=task,
            file=path,
            file_sha256=self.file.sha256,
            examples=len(self.file.examples),
            inputs=len(lengths),
            cut=sum(any(one.cut for one in inputs) for inputs in self.inputs),
            longest_tokens=max(lengths),
            mean_tokens=round(sum(lengths) / len(lengths)),
            compute_dtype="float32",
            kernel="torch",
        )

    def flops(self, checkpoint: Checkpoint) -> Figure:
        """Of one input of mean length."""
        return Figure(
            value=flops(config_of(checkpoint), self.protocol.mean_tokens).total,
            unit="flops",
        )

    def predictions(self, checkpoint: Checkpoint, progress: Callable[[float], None]) -> list[Any]:
        """Of each example: a label, labels by number of the word, or an answer.

        Raises:
            BadInput: the model has another task or other labels than the dense one.
            CompressError: it puts out NaN or infinite values.
        """
        config, dense = config_of(checkpoint), config_of(self.dense)
        task = task_of_encoder(config, str(checkpoint.folder))
        if task != self.file.task or config.id2label != dense.id2label:
            raise BadInput(
                f"'{checkpoint.folder}' and '{self.dense.folder}' do not have the same task and labels, so "
                "their predictions do not compare."
            )
        model = StreamedModel(checkpoint, self.device)
        flat = [one for inputs in self.inputs for one in inputs]
        found = iter(outputs(model, flat, progress))
        no_answer = any(getattr(example, "answers", None) == () for example in self.file.examples)
        return [
            _predict(task, example, inputs, [next(found) for _ in inputs], no_answer)
            for example, inputs in zip(self.file.examples, self.inputs, strict=True)
        ]


def load_task_tokenizer(checkpoint: Checkpoint, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer that makes inputs for a task.

    Raises:
        BadInput: there is none, or it cannot tell which token is of which word.
    """
    # Given words one by one, byte-level BPE must know that a space stands before each, the first included.
    settings = {"add_prefix_space": True} if task == "token classification" else {}
    tokenizer = load_tokenizer(checkpoint.folder, **settings)
    if task != "sequence classification" and not tokenizer.is_fast:
        raise BadInput(
            f"The tokenizer of '{checkpoint.folder}' does not tell which token is where in the text, which "
            f"{task} needs; save it as a fast tokenizer (tokenizer.json)."
        )
    return tokenizer


def encode(
    file: TaskFile, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, longest: int
) -> list[list[Input]]:
    """The inputs of each example, none longer than ``longest`` tokens.

    Raises:
        BadInput: a question leaves no room for its context.
    """
    make = {
        "sequence classification": _text_inputs,
        "token classification": _word_inputs,
        "question answering": _question_inputs,
    }[file.task]
    longest = min(longest, tokenizer.model_max_length)
    typed = getattr(config, "type_vocab_size", 1) > 1

    def call(*texts: Any, **settings: Any) -> Any:
        return tokenizer(*texts, return_token_type_ids=typed, verbose=False, **settings)

    return [make(call, example, longest) for example in file.examples]


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


@torch.no_grad()
def outputs(
    model: StreamedModel, inputs: Sequence[Input], progress: Callable[[float], None] = lambda share: None
) -> list[torch.Tensor]:
    """What the head puts out for each input, float32 on the CPU: [labels] of a text, [S, labels] of words,
    and [S, 2] (begin and end) of a context, with S the length of the input.

    Raises:
        CompressError: the model puts out NaN or infinite values.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
    done, total = 0, sum(len(one.tokens) for one in inputs)
    for numbers in _chunks(inputs):
        windows = padded([inputs[number] for number in numbers], model.config.pad_token_id or 0)
        stream = model.stream(windows)
        for layer in model.walk(None, stream):
            stream.advance(layer)
        with model.head() as head:
            for start, hidden, mask in stream.batches():
                values = _logits(head(hidden)).float().cpu()
                check_finite(values, "The head")
                for number, row, real in zip(numbers[start:], values, mask, strict=False):
                    # Copies: views would keep what was put out for the padding.
                    found[number] = row.clone() if row.ndim == 1 else row[real].clone()
        done += windows.num_tokens
        progress(done / total)
    return found


def _logits(output: Any) -> torch.Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return first_output(output)


def _chunks(inputs: Sequence[Input]) -> Iterator[list[int]]:
    """Numbers of the inputs by length, as many at a time as fit into CHUNK_TOKENS with their padding."""
    chunk: list[int] = []
    for number in sorted(range(len(inputs)), key=lambda number: len(inputs[number].tokens)):
        if chunk and (len(chunk) + 1) * len(inputs[number].tokens) > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(number)
    yield chunk


def padded(inputs: Sequence[Input], padding: int, source: str = "") -> Windows:
    """Inputs as rows of one length, with ``padding`` on the right of the shorter ones."""
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


def _predict(
    task: Task, example: Any, inputs: Sequence[Input], found: Sequence[torch.Tensor], no_answer: bool
) -> Any:
    if task == "sequence classification":
        return int(found[0].argmax())
    if task == "token classification":
        return {word: int(found[0][position].argmax()) for word, position in inputs[0].places.items()}
    return best_answer(example.context, [one.places for one in inputs], found, no_answer)


def best_answer(
    context: str,
    places: Sequence[dict[int, tuple[int, int]]],
    logits: Sequence[torch.Tensor],
    no_answer: bool,
) -> str:
    """The span of the context, at most ANSWER_TOKENS long, whose begin and end logits have the largest sum in
    any window; or "" where there may be no answer and the first token's, least of all windows, is larger.

    Args:
        places: for each window, position of a token of the context -> its characters.
        logits: for each window [S, 2].
        no_answer: whether there may be none.
    """
    best, answer = -float("inf"), ""
    for spans, scores in zip(places, logits, strict=True):
        inside = torch.full((len(scores),), -float("inf"))
        inside[list(spans)] = 0.0
        begin, end = scores[:, 0] + inside, scores[:, 1] + inside
        for length in range(min(ANSWER_TOKENS, len(scores))):
            sums = begin[: len(begin) - length] + end[length:]
            first = int(sums.argmax())
            if sums[first] > best:
                best = float(sums[first])
                answer = context[spans[first][0] : spans[first + length][1]].strip()
    if no_answer and min(float(scores[0].sum()) for scores in logits) > best:
        return ""
    return answer
