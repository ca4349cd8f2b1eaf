"""LLM-QAT (Findings of ACL 2024): a quantized model is trained to predict what the dense model predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from compress.calibration.text.settings import TextSize
from compress.engine.key_values import KEY, KeyValueSettings, quantize_key_values
from compress.engine.loading import assemble
from compress.engine.logits import streamed_logits
from compress.errors import BadInput, CompressError
from compress.kernels.codes.minmax import CUT, fake_quantize, quantize_channels
from compress.kernels.cpu.library import REFERENCE, using
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.distillation import Teacher, distil, teacher_hidden_states
from compress.quantization.parts.layout import Layout, packed_shape, plan_layout
from compress.quantization.parts.options import BitsOptions, IgnoreOptions, TableOptions, WeightOptions
from compress.quantization.parts.packer import Packer
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.engine.windows import Windows
    from compress.method import StepContext

MinMaxBits = Literal[3, 4, 5, 6, 7, 8]
"""Bits of MinMax weights; for 2 and 1 bits the paper has other quantizers."""

OFF = 16
"""This number of bits means: not quantized."""

PARITY = 1e-3
"""Largest KL divergence (nats per token) between the trained model and the one read back from packed codes.
Rounding errors can change single codes of activations, so logits need not be equal bit for bit."""


class LLMQAT(Method["LLMQAT.Options"]):
    """Train the model, without data, with its weights, activations and key-value cache in few bits.

    The student is the model with a quantizer x̂ = s · round(x / s), s = (max|x| + 1e-6) / (2^(b−1) − 1), on

    - every linear's weight, with one s for each output channel (``bits``);
    - every linear's input, with one s for each token, computed at every call (``activation_bits``);
    - keys and values, with one s for each token, or for each head of a token (``kv_bits``; see
      `quantize_key_values`).

    Embeddings, the head, norms and attention probabilities are not quantized in training. The teacher is the
    dense model. Training minimises KL(softmax(teacher) ‖ softmax(student)), the mean over all real tokens,
    with AdamW and a cosine schedule; gradients pass straight through round(), except where |x| >= 2
    (``gradient_cut``). Without steps the result is round-to-nearest, the baseline. With ``--calibration
    generate`` the text is the model's own, as in the paper.

    Packed codes are computed from the trained weights once more, with scales in the dtype they are stored in,
    and compared with the trained model.

    Unlike the other methods here, this one holds the whole model in memory, in float32 and, with ``--train
    full``, four times (weights, gradients, two moments), because each step changes all layers. The teacher is
    not in memory: its hidden states after the last layer are computed once, layer by layer, and kept (float32
    [N, S, D], on disk above a limit). Its final norm and head make exact logits of them, one window after
    another.
    """

    name = "llm-qat"
    family = "quantization"
    paper = Paper("LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", "2305.17888")
    text_size = TextSize(240, 128)

    class Options(IgnoreOptions, TableOptions, BitsOptions[MinMaxBits]):
        renamed: ClassVar[Mapping[str, str]] = {"weight_bits": "bits", "lora_rank": "rank"}

        activation_bits: Literal[4, 6, 8, 16] = Field(
            8, description="bits of the inputs of linears; 16: inputs are not quantized"
        )
        kv_bits: Literal[4, 8, 16] = Field(
            4, description="bits of keys and values; 16: they are not quantized"
        )
        kv_scale: Literal["token", "head"] = Field(
            "token", description="share one scale among all heads of a token, or give each head its own"
        )
        kv_position: Literal["before-rope", "after-rope"] = Field(
            "before-rope", description="quantize keys before or after the rotary embedding"
        )
        train: Literal["full", "lora"] = Field(
            "full",
            description="train all weights, or low-rank updates of the linears' weights before rounding",
        )
        rank: PositiveInt = Field(16, description="rank of the low-rank updates (--train lora)")
        epochs: PositiveInt = Field(1, description="number of passes over the calibration windows")
        steps: NonNegativeInt | None = Field(
            None, description="number of optimiser steps, in place of epochs; 0: only round to nearest"
        )
        batch_size: PositiveInt = Field(4, description="number of windows in a step")
        learning_rate: PositiveFloat = Field(
            3e-4,
            description="learning rate at the first step; it falls to 0 along a cosine. The paper takes "
            "2e-5, for 100 times as many steps",
        )
        gradient_cut: bool = Field(
            True, description="no gradient through values of magnitude 2 and more, as published"
        )
        max_gradient_norm: PositiveFloat = Field(
            1.0, description="gradients above this norm are scaled down to it"
        )
        gradient_checkpointing: bool = Field(
            False,
            description="compute each layer again in the backward pass: takes less memory and a third more "
            "time",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if shape.anatomy.kind != "decoder" or shape.anatomy.head is None:
            raise BadInput(
                "LLM-QAT distils next-token predictions, but this model makes none; use rtn or gptq instead."
            )
        planned = packed_shape(shape, layout_of(shape, options))
        return planned.derive(declare(planned.config, options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        windows = context.calibration
        batches = math.ceil(len(windows) / options.batch_size)
        steps = options.epochs * batches if options.steps is None else options.steps
        packer = Packer(context.draft, options, {}, layout_of)
        # The teacher comes first: the student then fills the memory.
        reference = teacher_hidden_states(model, context) if steps else None
        student = FakeQuantizedModel(model, packer, options, context)
        training: dict[str, Any] = {"steps": 0}
        if reference is not None:
            with model.head() as head:
                teacher = Teacher(head, reference)
                training = distil(student, teacher, windows, steps, options, context)
        student.write(packer, context)
        report = packer.finish()
        student.take_tables(packer)
        context.draft.config = declare(context.draft.config, options)
        report.details |= {"training": training, "written_kl": check_written(student, context)}
        bits = f"W{options.bits}A{options.activation_bits}KV{options.kv_bits}"
        how = "rounded to nearest without training"
        if steps:
            first, last = training["first_loss"], training["last_loss"]
            how = f"{steps} steps, loss {first:.4f} to {last:.4f} nats per token"
        report.summary = f"{bits}, {how}: {report.summary}"
        return report


def weight_options(options: LLMQAT.Options) -> WeightOptions:
    """The options of the other methods that describe LLM-QAT's weights."""
    return WeightOptions(
        bits=options.bits,
        group_size="channel",
        symmetric=True,
        format="compressed-tensors",
        ignore=options.ignore,
        set=dict(options.set),
        mix=False,
        lm_head_bits=options.lm_head_bits,
        embedding_bits=options.embedding_bits,
    )


def layout_of(shape: ModelShape, options: LLMQAT.Options) -> Layout:
    """The layout that the options ask for.

    Raises:
        BadInput: as in `plan_layout`.
    """
    return plan_layout(shape, weight_options(options), activation_bits(options))


def activation_bits(options: LLMQAT.Options) -> int | None:
    """Bits of the inputs of linears; None if they are not quantized."""
    return None if options.activation_bits == OFF else options.activation_bits


def declare(config: dict[str, Any], options: LLMQAT.Options) -> dict[str, Any]:
    """``config`` with the section of config.json that says how keys and values are quantized."""
    settings = key_value_settings(options)
    return config if settings is None else {**config, KEY: settings.section()}


def key_value_settings(options: LLMQAT.Options) -> KeyValueSettings | None:
    """How keys and values are quantized; None if they are not."""
    if options.kv_bits == 16:
        return None
    return KeyValueSettings(options.kv_bits, options.kv_scale, options.kv_position)


class LatentWeight(nn.Module):
    """The weight that a linear computes with, as a function of the weight that is trained.

    Args:
        weight: the stored parameter, [in, out] if ``transposed`` (Conv1D), else [out, in].
        transposed: see ``weight``.
        bits, scale_dtype, cut: of the quantizer.
        rank: of a low-rank update B A that is trained in place of the weight; None trains the weight itself.
        generator: draws A at random; B begins at 0.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        transposed: bool,
        bits: int,
        scale_dtype: torch.dtype,
        cut: float | None,
        rank: int | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.transposed, self.bits, self.scale_dtype, self.cut = transposed, bits, scale_dtype, cut
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        if rank is not None:
            rows, columns = weight.shape
            start = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.A = nn.Parameter(start.to(weight))
            self.B = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def latent(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight before rounding: [out, in]."""
        latent = stored if self.A is None or self.B is None else stored + self.B @ self.A
        return latent.T if self.transposed else latent

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        rounded = fake_quantize(self.latent(stored), self.bits, self.scale_dtype, self.cut)
        return rounded.T if self.transposed else rounded


class FakeQuantizedModel:
    """The student: the whole model, in memory and in float32, with straight-through quantizers.

    Attributes:
        names: finds the stored names of parameters.
        model: the transformers model, in evaluation mode: without dropout, as in the published training.
        linears: stored name of a quantized linear's weight -> the module.
        latents: the same name -> how the module's weight follows from the trained one.
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
        self.latents: dict[str, LatentWeight] = {}
        for full in sorted(filter(None, self.names.packable)):
            stored = self.names.find(f"{full}.weight")
            if stored is None or stored.removesuffix(".weight") not in packer.layout.linears:
                continue  # its block is pruned away, or the linear is kept
            linear = self.linears[stored] = self.model.get_submodule(full)
            latent = self.latents[stored] = LatentWeight(
                linear.get_parameter("weight"),
                isinstance(linear, Conv1D),
                packer.format_of(stored).bits,
                packer.scale_dtype(stored),
                cut,
                options.rank if lora else None,
                generator,
            )
            parametrize.register_parametrization(linear, "weight", latent, unsafe=True)
            if options.activation_bits != OFF:
                linear.register_forward_pre_hook(partial(_quantize_input, options.activation_bits, cut))
        if (settings := key_value_settings(options)) is not None:
            quantize_key_values(self.model, settings, cut)
        if options.gradient_checkpointing:
            for layer in self.model.base_model.get_submodule(model.anatomy.layers).children():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def logits(self, windows: Windows, rows: torch.Tensor) -> torch.Tensor:
        """Logits of the windows with the indices ``rows``: float32 [B, S, V]."""
        device = self.model.device
        mask = windows.mask[rows]
        padding = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
        return self.model(windows.tokens[rows].to(device), use_cache=False, **padding).logits.float()

    @torch.no_grad()
    def write(self, packer: Packer, context: StepContext) -> None:
        """Write packed codes to the draft, and all else that was trained in its stored dtype."""
        for stored, latent in self.latents.items():
            trained = self.linears[stored].get_parameter("parametrizations.weight.original")
            dense = latent.latent(trained).cpu()
            packer.write(stored, dense, quantize_channels(dense, latent.bits, latent.scale_dtype, stored))
        for name, parameter in self.model.named_parameters():
            if ".parametrizations." in name or not parameter.requires_grad:
                continue
            names = self.names.find_all(name)  # of tied tables, some files hold both
            assert names  # the model was read from there
            value = parameter.to(DTYPES[context.draft.tensors[names[0]].dtype])
            context.draft.write(dict.fromkeys(names, value))
            parameter.copy_(value)  # so that the student is what was written

    @torch.no_grad()
    def take_tables(self, packer: Packer) -> None:
        """Take over the head and the embedding that were rounded after the training."""
        for name, form in packer.layout.around.items():
            rounded = form.read(name, packer.draft.read).dequantize()
            for own, parameter in self.model.named_parameters():
                if self.names.find(own) == f"{name}.weight":
                    parameter.copy_(rounded)


def _quantize_input(
    bits: int, cut: float | None, linear: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook that quantizes what a linear is given."""
    return (fake_quantize(inputs[0], bits, cut=cut), *inputs[1:])


@torch.no_grad()
def check_written(student: FakeQuantizedModel, context: StepContext) -> float:
    """KL(trained ‖ written) of the first window, nats per token. The written model is read from its codes.

    Both run in plain torch: where inputs, keys and values are rounded to few bits, the smallest difference
    between the sums of two kernels becomes another code, layer after layer.

    Raises:
        CompressError: the divergence is larger than rounding explains.
    """
    windows = context.calibration
    window = windows.select(torch.arange(len(windows)) == 0)
    mask = window.mask[0]
    trained = student.logits(window, torch.tensor([0]))[0].cpu()[mask].log_softmax(-1)
    with using(REFERENCE):
        written = streamed_logits(context.draft, window, context.device)[0][mask].log_softmax(-1)
    found = float((trained.exp() * (trained - written)).sum(-1).mean())
    if not found <= PARITY:
        raise CompressError(
            f"The packed codes do not compute what was trained (KL {found:.3g} nats per token); nothing was "
            "written."
        )
    return found
