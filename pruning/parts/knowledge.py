"""Measure the knowledge in attention heads and neurons, for K-prune (arXiv:2308.03449, section 4).

A *sublayer* is the attention or the MLP of a layer. A *channel* is one input of its output projection W_out:
a neuron has one, an attention head as many as it is wide. All sums are over real tokens, in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import anatomy_of, layer_shapes, task_of, weight
from compress.engine.activations import Activations
from compress.engine.backward import Tape
from compress.engine.flops import unit_flops
from compress.engine.stream import Layer, Observer, Seen
from compress.engine.windows import Windows
from compress.pruning.parts.blocks import Part
from compress.pruning.parts.width import channels_of_groups

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of one layer, and its units.

    Attributes:
        index: number of the layer.
        name: attention or mlp.
        path: path of the output projection inside the layer.
        channels: int64 [units, channels of a unit], the inputs of the output projection that belong to a
        unit.
        flops: FLOPs of one unit in one sequence.
        heads: query heads in a unit; 1 for neurons.
    """

    index: int
    name: Part
    path: str
    channels: torch.Tensor
    flops: int
    heads: int = 1

    @property
    def total(self) -> int:
        """FLOPs of all units."""
        return self.flops * len(self.channels)


def sublayers_of(config: PretrainedConfig, tokens: int) -> list[Sublayer]:
    """The sublayers of a model bottom-up, without those already removed; a sequence has ``tokens`` tokens."""
    anatomy, sublayers = anatomy_of(config), []
    for index, shape in enumerate(layer_shapes(config)):
        group, neuron = unit_flops(config, index, tokens)
        if shape.num_key_value_heads:
            channels = channels_of_groups(config, index)
            heads = shape.num_attention_heads // shape.num_key_value_heads
            output = anatomy.attention_output
            sublayers.append(Sublayer(index, "attention", output, channels, group, heads))
        if shape.intermediate_size:
            channels = torch.arange(shape.intermediate_size)[:, None]
            sublayers.append(Sublayer(index, "mlp", anatomy.down, channels, neuron))
    return sublayers


class Divergence:
    """How far the student's predictions are from the teacher's: a loss for each window.

    A window has R predictions: one for each real token (causal and masked language models, token
    classification), one (sequence classification), begin and end of the answer (question answering), or one
    for each label (several labels at once). With logits z and temperature g,

        KL = g^2 mean over R of KL(softmax(z_teacher / g) || softmax(z_student / g)).

    For a model that predicts numbers (regression) the mean squared error takes its place.

    Args:
        config: config of the model; its class decides what it predicts.
        windows: the text; padding has no predictions.
        temperature: g.
        seed: seed of the labels that `scores` draws.
    """

    def __init__(self, config: PretrainedConfig, windows: Windows, temperature: float, seed: int) -> None:
        self.task = task_of(config)
        self.windows = windows
        self.temperature = temperature
        self.seed = seed
        labels = getattr(config, "num_labels", None)
        kind = getattr(config, "problem_type", None)
        sequence = self.task == "sequence classification"
        self.regression = sequence and (kind == "regression" or (kind is None and labels == 1))
        self.many_labels = sequence and kind == "multi_label_classification"

    def divergences(self, output: Any, start: int, teacher: Any) -> torch.Tensor:
        """The sum of the KL (or squared error) over the windows of a batch, which begins with ``start``."""
        total = torch.zeros(())
        pairs = zip(self._predictions(output, start), self._predictions(teacher, start), strict=True)
        for student, wanted in pairs:
            if self.regression:
                total = total + (student - wanted).square().mean()
                continue
            log_p, log_q = self._log_softmax(wanted), self._log_softmax(student)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            total = total + self.temperature**2 * kl.mean()
        return total

    def scores(self, output: Any, start: int, *_: Any) -> torch.Tensor:
        """The sum that replaces `divergences` while student and teacher are the same model.

        There the KL has its minimum, so its gradient vanishes and (1/2)(dKL/dm)^2 says nothing. But the term
        that it approximates, the second-order term of the KL, is known exactly there: the curvature is the
        Fisher information, so it is (1/2) E[(d log p_y / dm)^2] for labels y that the teacher draws. With one
        y for each of the R predictions the gradient of

            (g / sqrt(R)) sum over R of log softmax(z / g)_y

        has a square with that expectation, because scores have mean zero and labels are independent. For
        regression the sum is sqrt(2 / R) sum of e z with random signs e. Labels and signs depend on the seed
        and on the window's tokens, but not on the order of windows or on batches.
        """
        total = torch.zeros(())
        for row, values in enumerate(self._predictions(output, start), start):
            drawn = self._uniform(row, len(values)).to(values.device)
            if self.regression:
                total = total + math.sqrt(2 / len(values)) * (values * (2 * (drawn < 0.5) - 1)).sum()
                continue
            log_p = self._log_softmax(values)
            cumulative = log_p.detach().double().exp().cumsum(-1)
            labels = torch.searchsorted(cumulative, drawn[:, None] * cumulative[:, -1:])
            total = total + self.temperature / math.sqrt(len(values)) * log_p.gather(-1, labels).sum()
        return total

    def _predictions(self, output: Any, start: int) -> Iterator[torch.Tensor]:
        """Yield the predictions of every window: logits [R, classes], or numbers [R] (regression)."""
        answers = self.task == "question answering"
        count = len(output.start_logits if answers else output.logits)
        for row in range(count):
            mask = self.windows.mask[start + row]
            if answers:
                yield torch.stack([output.start_logits[row][mask], output.end_logits[row][mask]])
            elif self.regression:
                yield output.logits[row]
            elif self.many_labels:
                yield torch.stack([output.logits[row], torch.zeros_like(output.logits[row])], -1)
            elif self.task == "sequence classification":
                yield output.logits[row, None]
            else:
                yield output.logits[row][mask]

    def _log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits / self.temperature, -1)

    def _uniform(self, row: int, count: int) -> torch.Tensor:
        """Random numbers that depend on the seed and the window's tokens: float64 [count], from 0 to 1."""
        tokens = self.windows.tokens[row][self.windows.mask[row]].tolist()
        digest = hashlib.sha256(repr((self.seed, tokens)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(count, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Knowledge:
    """The knowledge in the units of a sublayer: float64 [units] each, on the CPU.

    Attributes:
        representational: K_rep, mean over real tokens of a^2, times mean over the outputs of W_out^2.
        predictive: K_pred, mean over windows of (1/2) (dKL/dm)^2, with one mask m per channel and window.

    Both are means over the channels of a head or neuron. The knowledge of a key-value head is the sum over
    its query heads, because its FLOPs are also the sum over them.
    """

    representational: torch.Tensor
    predictive: torch.Tensor


def measure_knowledge(
    tape: Tape, sublayers: Sequence[Sublayer], divergence: Divergence, teacher: Activations | None
) -> list[Knowledge]:
    """Measure the knowledge in the units of some sublayers of the student.

    Args:
        tape: the student, from the layer of the first sublayer on.
        sublayers: the sublayers to measure.
        divergence: the distance from the teacher.
        teacher: the teacher's hidden states behind its last layer; None if the student is the teacher.
    """
    windows = divergence.windows
    squares = [
        torch.zeros(sublayer.channels.numel(), dtype=torch.float64, device=tape.model.device)
        for sublayer in sublayers
    ]
    gradients = [torch.zeros_like(values) for values in squares]
    here: dict[int, dict[str, int]] = {}  # layer -> path of an output projection -> number of the sublayer
    for number, sublayer in enumerate(sublayers):
        here.setdefault(sublayer.index, {})[sublayer.path] = number

    def observers_of(layer: Layer) -> Mapping[str, Observer]:
        def look(number: int, path: str) -> Observer:
            matrix = weight(layer.linears[path]).double().square().mean(0)

            def add(seen: Seen) -> None:
                squares[number] += seen.real(seen.inputs).double().square().sum(0) * matrix

            return add

        return {path: look(number, path) for path, number in here.get(layer.index, {}).items()}

    @contextmanager
    def masks(layer: Layer, count: int) -> Iterator[Mapping[str, torch.Tensor]]:
        leaves = {}
        with ExitStack() as stack:
            for path, number in here.get(layer.index, {}).items():
                linear = layer.linears[path]
                shape, device = (count, 1, sublayers[number].channels.numel()), weight(linear).device
                leaves[path] = torch.ones(shape, device=device, requires_grad=True)
                stack.callback(_masked(linear, leaves[path]).remove)
            yield leaves

    def take(layer: Layer, _: int, found: Mapping[str, torch.Tensor]) -> None:
        for path, gradient in found.items():
            gradients[here[layer.index][path]] += 0.5 * gradient.double().square().sum((0, 1))

    tape.forward(observers_of)
    tape.differentiate(divergence.scores if teacher is None else divergence.divergences, teacher)
    tape.backward(masks, take)
    return [
        Knowledge(
            sublayer.heads * (square.cpu() / windows.num_tokens)[sublayer.channels].mean(1),
            sublayer.heads * (gradient.cpu() / len(windows))[sublayer.channels].mean(1),
        )
        for sublayer, square, gradient in zip(sublayers, squares, gradients, strict=True)
    ]


def _masked(linear: torch.nn.Module, mask: torch.Tensor) -> Any:
    """Multiply the inputs of a linear by ``mask`` [B, 1, channels] until the returned handle is removed."""

    def multiply(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (given,) = inputs  # OPT flattens the tokens of all windows before its MLP: [B * S, channels]
        return ((given.view(len(mask), -1, given.shape[-1]) * mask).view(given.shape),)

    return linear.register_forward_pre_hook(multiply)
