"""LLM-QAT (Findings of ACL 2024): trained with its quantizers in place, the model stays what it was."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from compress.engine.key_values import KEY, KeyValueSettings, quantize_key_values
from compress.engine.loading import assemble
from compress.engine.logits import streamed_logits
from compress.errors import BadInput, CompressError
from compress.kernels.codes.minmax import CUT, fake_quantize, quantize_channels
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.quantization.parts.distillation import Teacher, distil, last_hidden
from compress.quantization.parts.layout import Bits, Layout, WeightOptions, packed_shape, plan_layout
from compress.quantization.parts.packer import Packer
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.engine.windows import Windows
    from compress.method import StepContext

WeightBits = Literal[3, 4, 8]
"""Of MinMax weights; for 2 and 1 the paper has other quantizers."""

OFF = 16
"""Bits that mean: not quantized."""

PARITY = 1e-3
"""Largest KL divergence (nats a token) between the trained model and the one read back from packed codes.
Differences in the last bit move single codes of activations, so logits need not be equal bit for bit."""


class LLMQAT(Method):
    """Quantization-aware training without data: weights, activations and the key-value cache in few bits.

    The student is the model with a quantizer x̂ = s · round(x / s), s = (max|x| + 1e-6) / (2^(b−1) − 1), on

    - every linear's weight, one s an output channel (``weight_bits``);
    - every linear's input, one s a token, made anew at every call (``activation_bits``);
    - keys and values, one s a token, or a token and head (``kv_bits``; see `quantize_key_values`).

    Embeddings, the head, norms and attention probabilities are not quantized. The teacher is the model as it
    was. Training minimises KL(softmax(teacher) ‖ softmax(student)), the mean over all real tokens, with AdamW
    and a cosine schedule; gradients pass straight through round(), except where |x| >= 2 (``gradient_cut``).
    Without steps the result is round-to-nearest: the baseline. With ``--calibration generate`` the text is
    the model's own, as in the paper.

    What is written are packed codes, computed from the trained weights once more with the scales in the dtype
    they are stored in, and checked against the trained model.

    Unlike the other methods here this one holds the whole model in memory, in float32 and, with ``--train
    full``, four times (weights, gradients, two moments), because each step changes all layers. The teacher is
    not held: its hidden states behind the last layer are computed once, layer by layer, and kept (float32
    [N, S, D], on disk above a limit); its final norm and head make exact logits of them, a window at a time.
    """

    name = "llm-qat"
    family = "quantization"
    paper = Paper("LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", "2305.17888")

    class Options(MethodOptions):
        weight_bits: WeightBits = Field(4, description="bits of a weight")
        activation_bits: Literal[4, 6, 8, 16] = Field(8, description="bits of a linear's input; 16: as it is")
        kv_bits: Literal[4, 8, 16] = Field(4, description="bits of keys and values; 16: as they are")
        kv_scale: Literal["token", "head"] = Field(
            "token", description="what shares a scale: the keys of all heads of a token, or of one"
        )
        kv_position: Literal["before-rope", "after-rope"] = Field(
            "before-rope", description="whether keys are quantized before the rotary embedding or after it"
        )
        train: Literal["full", "lora"] = Field(
            "full", description="all weights, or low-rank updates of the linears' weights before rounding"
        )
        lora_rank: PositiveInt = Field(16, description="rank of the updates")
        epochs: PositiveInt = Field(1, description="how often training sees each window")
        steps: NonNegativeInt | None = Field(
            None, description="optimiser steps, in place of epochs; 0: round to nearest"
        )
        batch_size: PositiveInt = Field(8, description="windows in a step")
        learning_rate: PositiveFloat = Field(
            1e-4,
            description="at the beginning; it falls along a cosine. Published: 2e-5, for 100 times the steps",
        )
        gradient_cut: bool = Field(
            True, description="no gradient through values of magnitude 2 and more, as published"
        )
        max_gradient_norm: PositiveFloat = Field(1.0, description="gradients above this norm are scaled down")
        gradient_checkpointing: bool = Field(
            False, description="compute each layer again in the backward pass: less memory, a third more time"
        )
        ignore: list[str] = Field(
            [], description="linears to keep: full names, globs, or regular expressions after 're:'"
        )
        set: dict[str, WeightBits] = Field(
            {},
            description="other bits for the weights that a pattern matches (as in ignore); the last match "
            "counts",
        )
        lm_head_bits: Bits | None = Field(
            None, description="round the head, a row a scale, after the training; kept if not given"
        )
        embedding_bits: Bits | None = Field(None, description="the same for the token embedding")

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if shape.anatomy.kind != "decoder" or shape.anatomy.head is None:
            raise BadInput(
                "LLM-QAT distils next-token predictions, and this model makes none; use rtn or gptq for it."
            )
        planned = packed_shape(shape, layout_of(shape, options))
        return planned.derive(declare(planned.config, options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        windows = context.calibration
        batches = math.ceil(len(windows) / options.batch_size)
        steps = options.epochs * batches if options.steps is None else options.steps
        packer = Packer(context.draft, options, {}, layout_of)
        reference = last_hidden(model, context) if steps else None
        student = Student(model, packer, options, context)
        training: dict[str, Any] = {"steps": 0}
        if steps:
            with model.head() as head:
                teacher = Teacher(head, reference)
                training = distil(student, teacher, windows, steps, options, context)
        student.write(packer, context)
        report = packer.finish()
        student.take_tables(packer)
        context.draft.config = declare(context.draft.config, options)
        report.details |= {"training": training, "written_kl": check_written(student, context)}
        bits = f"W{options.weight_bits}A{options.activation_bits}KV{options.kv_bits}"
        how = "rounded to nearest without training"
        if steps:
            first, last = training["first_loss"], training["last_loss"]
            how = f"{steps} steps, loss {first:.4f} to {last:.4f} nats a token"
        report.summary = f"{bits}, {how}: {report.summary}"
        return report


def weight_options(options: LLMQAT.Options) -> WeightOptions:
    """What LLM-QAT's weights are in the terms of the other methods."""
    return WeightOptions(
        bits=options.weight_bits,
        group_size="channel",
        symmetric=True,
        format="compressed-tensors",
        ignore=options.ignore,
        set=options.set,
        lm_head_bits=options.lm_head_bits,
        embedding_bits=options.embedding_bits,
    )


def layout_of(shape: ModelShape, options: LLMQAT.Options) -> Layout:
    """What is packed, and how; raises BadInput as `plan_layout`."""
    return plan_layout(shape, weight_options(options), activation_bits(options))


def activation_bits(options: LLMQAT.Options) -> int | None:
    return None if options.activation_bits == OFF else options.activation_bits


def declare(config: dict[str, Any], options: LLMQAT.Options) -> dict[str, Any]:
    """config.json with how keys and values are quantized."""
    return config if options.kv_bits == OFF else {**config, KEY: key_value_settings(options).section()}


def key_value_settings(options: LLMQAT.Options) -> KeyValueSettings:
    return KeyValueSettings(options.kv_bits, options.kv_scale, options.kv_position)


class LatentWeight(nn.Module):
    """The weight a linear computes with, as a function of the weight that is trained.

    Args:
        weight: the stored parameter, [in, out] if ``transposed`` (Conv1D), else [out, in].
        bits, scale_dtype, cut: of the quantizer.
        rank: of a low-rank update B A that is trained in the weight's place; None trains the weight itself.
        generator: of A, which is random; B begins at 0.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        transposed: bool,
        bits: int,
        scale_dtype: torch.dtype,
        cut: float | None,
        rank: int | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.transposed, self.bits, self.scale_dtype, self.cut = transposed, bits, scale_dtype, cut
        self.A = self.B = None
        if rank is not None:
            rows, columns = weight.shape
            start = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.A = nn.Parameter(start.to(weight))
            self.B = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def latent(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight before rounding: [out, in]."""
        latent = stored if self.A is None else stored + self.B @ self.A
        return latent.T if self.transposed else latent

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        rounded = fake_quantize(self.latent(stored), self.bits, self.scale_dtype, self.cut)
        return rounded.T if self.transposed else rounded


class Student:
    """The whole model in memory, in float32, with its quantizers and straight-through gradients.

    Attributes:
        model: the transformers model, in evaluation mode: no dropout, as in the published training.
        linears: stored name of a quantized linear's weight -> the module.
    """

    def __init__(
        self, model: StreamedModel, packer: Packer, options: LLMQAT.Options, context: StepContext
    ) -> None:
        self.names = model.weights
        self.model = assemble(model.checkpoint, context.device, torch.float32)
        cut = CUT if options.gradient_cut else None
        lora = options.train == "lora"
        self.model.requires_grad_(not lora)
        generator = context.generator()
        self.linears: dict[str, nn.Module] = {}
        for full in sorted(self.names.packable):
            stored = self.names.find(f"{full}.weight")
            if stored is None or not packer.wants(stored):  # the block is pruned away, or the linear kept
                continue
            linear = self.linears[stored] = self.model.get_submodule(full)
            latent = LatentWeight(
                linear.weight,
                isinstance(linear, Conv1D),
                packer.format_of(stored).bits,
                packer.scale_dtype(stored),
                cut,
                options.lora_rank if lora else None,
                generator,
            )
            parametrize.register_parametrization(linear, "weight", latent, unsafe=True)
            if options.activation_bits != OFF:
                linear.register_forward_pre_hook(partial(_quantize_input, options.activation_bits, cut))
        if options.kv_bits != OFF:
            quantize_key_values(self.model, key_value_settings(options), cut)
        if options.gradient_checkpointing:
            for layer in self.model.base_model.get_submodule(model.anatomy.layers):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logits(self, windows: Windows, rows: torch.Tensor) -> torch.Tensor:
        """[B, S, V] in float32."""
        device = self.model.device
        mask = windows.mask[rows].to(device)
        padding = {} if bool(mask.all()) else {"attention_mask": mask}
        return self.model(windows.tokens[rows].to(device), use_cache=False, **padding).logits.float()

    @torch.no_grad()
    def write(self, packer: Packer, context: StepContext) -> None:
        """Put packed codes into the draft, and what else was trained in the dtype it is stored in."""
        for stored, linear in self.linears.items():
            parts = linear.parametrizations.weight
            latent = parts[0].latent(parts.original).cpu()
            codes = quantize_channels(latent, parts[0].bits, parts[0].scale_dtype, stored)
            packer.write(stored, latent, codes)
        for name, parameter in self.model.named_parameters():
            if ".parametrizations." in name or not parameter.requires_grad:
                continue
            stored = self.names.find(name)
            value = parameter.to(DTYPES[context.draft.tensors[stored].dtype])
            context.draft.write({stored: value})
            parameter.copy_(value)  # so that the student is what was written

    @torch.no_grad()
    def take_tables(self, packer: Packer) -> None:
        """Take over a head and an embedding that were rounded in the end."""
        for name, form in packer.layout.around.items():
            rounded = form.read(name, packer.draft.read).dequantize()
            for own, parameter in self.model.named_parameters():
                if self.names.find(own) == f"{name}.weight":
                    parameter.copy_(rounded)


def _quantize_input(
    bits: int, cut: float | None, linear: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return (fake_quantize(inputs[0], bits, cut=cut), *inputs[1:])


@torch.no_grad()
def check_written(student: Student, context: StepContext) -> float:
    """KL(trained ‖ written) of one window in nats a token, the written model read back from its codes.

    Raises:
        CompressError: it is more than rounding explains.
    """
    first = torch.arange(len(context.calibration)) == 0
    window = context.calibration.select(first)
    mask = window.mask[0]
    trained = student.logits(window, torch.tensor([0]))[0].cpu()[mask].log_softmax(-1)
    written = streamed_logits(context.draft, window, context.device)[0][mask].log_softmax(-1)
    found = float((trained.exp() * (trained - written)).sum(-1).mean())
    if not found <= PARITY:
        raise CompressError(
            f"The packed codes do not compute what was trained (KL {found:.3g} nats a token); nothing was "
            "written."
        )
    return found
