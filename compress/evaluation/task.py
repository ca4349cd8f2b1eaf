"""The examples of a task file through a model, streamed layer by layer, and what it predicts for each.

Inputs are sorted by length and go through the model a chunk at a time, padded to the longest of their chunk,
so that memory is bounded by the chunk and one layer, and little is spent on padding. What is predicted does
not depend on the chunks: padding is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import Task
from compress.calibration.text.encoder_inputs import Input, encode, load_task_tokenizer, padded
from compress.calibration.text.examples import read_task_file, task_of_encoder
from compress.engine.checks import check_finite
from compress.engine.config import config_of
from compress.engine.flops import flops
from compress.engine.logits import first_output
from compress.engine.skeleton import longest_input
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.report.scorecard import Figure, TaskProtocol

if TYPE_CHECKING:
    from compress.storage.checkpoint import Checkpoint

CHUNK_TOKENS = 1 << 14  # of one chunk, with padding
ANSWER_TOKENS = 30  # the longest answer, as in BERT's evaluation on SQuAD


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
        tokenizer = load_task_tokenizer(dense, task)
        self.inputs = list(encode(self.file.examples, tokenizer, config, longest_input(model.model)))
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
