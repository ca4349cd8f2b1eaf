"""Logit distillation as LLM-QAT does it: a student is trained to predict what its teacher predicts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from compress.errors import CompressError
from compress.storage.writer import write_tensors

if TYPE_CHECKING:
    from compress.engine.activations import Activations
    from compress.engine.head import Head
    from compress.engine.stream import StreamedModel
    from compress.engine.windows import Windows
    from compress.method import StepContext

log = logging.getLogger(__name__)

PASS_TOKENS = 2048
"""Tokens that go through the model in one pass. The logits of more would take gigabytes, and beside so many
tokens the work on the weights in every pass costs little."""

SAVE_SECONDS = 300.0
"""Seconds between two saved states of the training, from which a killed run goes on."""


class Student(Protocol):
    """The model that is trained."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that change."""

    def logits(self, windows: Windows, rows: torch.Tensor) -> torch.Tensor:
        """Logits of the windows with the indices ``rows``: float32 [B, S, V]."""


class TrainingOptions(Protocol):
    """The options of a method that training needs."""

    @property
    def batch_size(self) -> int:
        """Number of windows in a step."""

    @property
    def learning_rate(self) -> float:
        """Learning rate at the first step."""

    @property
    def max_gradient_norm(self) -> float:
        """Gradients above this norm are scaled down to it."""


@dataclass
class Teacher:
    """The dense model: its hidden states after the last layer, and the head that makes logits of them."""

    head: Head
    hidden: Activations

    @torch.no_grad()
    def log_probabilities(self, window: int) -> torch.Tensor:
        """Log-probabilities of every next token in a window: float32 [S, V]."""
        return self.head(self.hidden.read(window, window + 1)).logits[0].float().log_softmax(-1)


def teacher_hidden_states(model: StreamedModel, context: StepContext) -> Activations:
    """Compute the teacher's hidden states after the last layer, float32 [N, S, D], layer by layer."""
    stream = model.stream(context.calibration, context.folder / "teacher")
    for layer in model.walk(context.journal("teacher"), stream, label="asking the teacher"):
        stream.advance(layer)
    return stream.hidden


def divergence(student: Student, teacher: Teacher, windows: Windows, rows: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats per token: the mean over the real tokens of the windows ``rows``.

    The published code divides the sum by the number of windows instead, so its gradient grows with their
    length.
    """
    total = torch.zeros(())
    for window, logits in zip(rows.tolist(), student.logits(windows, rows), strict=True):
        mask = windows.mask[window]
        expected = teacher.log_probabilities(window)[mask]
        given = logits[mask].log_softmax(-1)
        total = total.to(given) + nn.functional.kl_div(given, expected, reduction="sum", log_target=True)
    return total / windows.mask[rows].sum()


def distil(
    student: Student,
    teacher: Teacher,
    windows: Windows,
    steps: int,
    options: TrainingOptions,
    context: StepContext,
) -> dict[str, Any]:
    """Minimise the divergence with AdamW (no weight decay).

    The learning rate falls from ``learning_rate`` to 0 along a cosine. The run's seed decides the random
    order of the windows. A killed run goes on from the state that was saved last.

    Returns:
        Metadata of the training: ``losses`` of every step, the means of the first and the last tenth of them,
        tokens seen, seconds.

    Raises:
        CompressError: the loss became NaN or infinite.
    """
    from transformers import get_scheduler

    parameters = student.trained()
    groups = [{"params": parameters, "initial_lr": options.learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0, fused=True)
    file = context.folder / "training" / "state.safetensors"
    losses = _restore(file, parameters, optimizer)
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=0,
        num_training_steps=steps,
        scheduler_specific_kwargs={"last_epoch": len(losses) - 1},
    )
    tenth, tokens, begun = max(1, steps // 10), 0, len(losses)
    started = saved = time.perf_counter()
    for step, rows in enumerate(batches(len(windows), options.batch_size, steps, context.generator())):
        if step < begun:
            continue
        losses.append(_accumulate(student, teacher, windows, rows))
        if not math.isfinite(losses[-1]):
            raise CompressError(
                f"The loss is {losses[-1]} at step {step + 1}; lower the learning_rate or max_gradient_norm."
            )
        nn.utils.clip_grad_norm_(parameters, options.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += int(windows.mask[rows].sum())
        context.progress("training", (step + 1) / steps)
        if (step + 1) % tenth == 0:
            log.info("step %d of %d: loss %.4f nats per token", step + 1, steps, _mean(losses[-tenth:]))
        if time.perf_counter() - saved > SAVE_SECONDS and step + 1 < steps:
            _save(file, parameters, optimizer, losses)
            saved = time.perf_counter()
    seconds = time.perf_counter() - started
    return {
        "steps": steps,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "first_loss": _mean(losses[:tenth]),
        "last_loss": _mean(losses[-tenth:]),
        "losses": [round(value, 6) for value in losses],
        "tokens": tokens,  # this and the seconds count from where a resumed run went on
        "seconds": round(seconds, 1),
    }


def _accumulate(student: Student, teacher: Teacher, windows: Windows, rows: torch.Tensor) -> float:
    """The divergence of the windows ``rows``; its gradient is added to those of the parameters."""
    size = max(1, PASS_TOKENS // windows.tokens.shape[1])
    total = 0.0
    for part in rows.split(size):
        share = windows.mask[part].sum() / windows.mask[rows].sum()
        loss = divergence(student, teacher, windows, part) * share.item()
        loss.backward()
        total += loss.item()
    return total


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield the indices of the windows of each step: all windows in a random order, then in another one."""
    done = 0
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            if done == steps:
                return
            yield rows
            done += 1


def _save(
    file: Path, parameters: list[nn.Parameter], optimizer: torch.optim.AdamW, losses: list[float]
) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, parameter in enumerate(parameters):
        tensors[f"{number}.parameter"] = parameter
        for name in ("exp_avg", "exp_avg_sq"):
            tensors[f"{number}.{name}"] = optimizer.state[parameter][name]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, file)


@torch.no_grad()
def _restore(file: Path, parameters: list[nn.Parameter], optimizer: torch.optim.AdamW) -> list[float]:
    """Restore parameters and moments from ``file``, if it exists. Returns the losses so far."""
    if not file.exists():
        return []
    held = load_file(file)
    losses = held["losses"].tolist()
    for number, parameter in enumerate(parameters):
        parameter.copy_(held[f"{number}.parameter"])
        moments = {name: held[f"{number}.{name}"].to(parameter).clone() for name in ("exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(len(losses)), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}
    return losses


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
