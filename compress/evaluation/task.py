"""Predict the examples of a task file with a model that is streamed layer by layer.

Inputs are sorted by length and cut into chunks, which are padded to their longest input. So memory holds one
chunk and one layer, and there is little padding. Predictions do not depend on the chunks, because padding is
masked.
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
from compress.engine.logits import first_output, through_all_layers
from compress.engine.skeleton import longest_input
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.report.scorecard import Figure, TaskProtocol

if TYPE_CHECKING:
    from compress.storage.checkpoint import Checkpoint

CHUNK_TOKENS = 1 << 14  # tokens in one chunk, with padding
ANSWER_TOKENS = 30  # tokens in the longest answer, as in BERT's evaluation on SQuAD


class TaskEvaluation:
    """The examples of a file as inputs for a model and its compressed versions.

    Args:
        path: the task file.
        dense: the dense model, whose tokenizer and labels are used.
        device: where to compute.

    Raises:
        BadInput: the model is not an encoder with a task head, or the file has no examples of its task.
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
        """The FLOPs of a model for one input of mean length."""
        return Figure(
            value=flops(config_of(checkpoint), self.protocol.mean_tokens).total,
            unit="flops",
        )

    def predictions(self, checkpoint: Checkpoint, progress: Callable[[float], None]) -> list[Any]:
        """Predict every example: a label, a dictionary of word number -> label, or the text of an answer.

        Args:
            checkpoint: the model.
            progress: called with the share that is done.

        Raises:
            BadInput: the model has another task or other labels than the dense one.
            CompressError: the model puts out NaN or infinite values.
        """
        config, dense = config_of(checkpoint), config_of(self.dense)
        task = task_of_encoder(config, str(checkpoint.folder))
        if task != self.file.task or config.id2label != dense.id2label:
            raise BadInput(
                f"'{checkpoint.folder}' and '{self.dense.folder}' do not have the same task and labels, so "
                "their predictions cannot be compared."
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
    """Compute the output of the head for each input.

    Args:
        model: the model.
        inputs: the inputs.
        progress: called with the share that is done.

    Returns:
        float32 on the CPU, with S the length of an input: [labels] for sequence classification, [S, labels]
        for token classification, and [S, 2] (begin and end) for question answering.

    Raises:
        CompressError: the model puts out NaN or infinite values.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
    done, total = 0, sum(len(one.tokens) for one in inputs)
    for numbers in _chunks(inputs):
        windows = padded([inputs[number] for number in numbers], model.config.pad_token_id or 0)
        stream = through_all_layers(model, windows)
        with model.head() as head:
            for start, hidden, mask in stream.batches():
                values = _logits(head(hidden)).float().cpu()
                check_finite(values, "The head")
                for number, row, real in zip(numbers[start:], values, mask, strict=False):
                    # Copies, because views would keep the outputs for padding in memory.
                    found[number] = row.clone() if row.ndim == 1 else row[real].clone()
        done += windows.num_tokens
        progress(done / total)
    return found


def _logits(output: Any) -> torch.Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return first_output(output)


def _chunks(inputs: Sequence[Input]) -> Iterator[list[int]]:
    """Yield the numbers of the inputs, sorted by length, in chunks of CHUNK_TOKENS with padding."""
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
    """The span of the context, of at most ANSWER_TOKENS, with the largest sum of begin and end logits.

    Args:
        context: the text that has the answer.
        places: for each window of the context: position of a token -> where its characters begin and end.
        logits: for each window [S, 2], begin and end.
        no_answer: whether there may be no answer. It is then "" if the least sum over the windows of the
            logits of the first token is larger than that of the span.
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
