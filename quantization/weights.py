"""Weight-only quantization of the linears inside the layers: what every such method shares."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from compress.checkpoint import DTYPES, Draft
from compress.errors import BadInput, CompressError
from compress.method import MethodOptions, StepReport
from compress.plan import ModelShape
from compress.quantization.formats import FORMATS, Format, format_of
from compress.quantization.quantizer import CHANNEL, QuantizedWeight


class WeightOptions(MethodOptions):
    """Which grid, how it is stored, and which linears are left alone."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    group_size: PositiveInt | Literal["channel"] = Field(
        128,
        description="inputs that share a scale; must divide the input dimensions; channel: a whole row",
    )
    symmetric: bool = Field(True, description="fixed zero points; otherwise each group stores its own")
    format: Literal["auto", "compressed-tensors", "gptq"] = Field(
        "auto",
        description="how to store the codes; auto: compressed-tensors at 4 and 8 bits, gptq at 2 and 3",
    )
    ignore: list[str] = Field(
        [], description="linears to keep: full names, globs, or regular expressions after 're:'"
    )


def plan_packed(shape: ModelShape, options: WeightOptions) -> ModelShape:
    """The shape of the model with its linears packed.

    Raises:
        BadInput: the model is quantized already, nothing is left to quantize, or a linear does not fit.
    """
    if "quantization_config" in shape.config:
        method = shape.config["quantization_config"].get("quant_method")
        raise BadInput(f"This model is already quantized ({method}); start from the model it was made of.")
    form = format_for(options)
    linears = shape.linears()
    outside = linears_outside(shape)
    skipped = ignored([*linears, *outside], options.ignore)
    quantized = [name for name in linears if name not in skipped]
    if not quantized:
        raise BadInput("The option 'ignore' leaves no linear to quantize.")
    packed = {}
    for name in quantized:
        if f"{name}.weight" not in shape.tensors:
            raise BadInput(f"The model lacks the tensor '{name}.weight'.")
        packed |= form.tensor_infos(name, linears[name], shape.tensors[f"{name}.weight"].dtype)
    config = dict(shape.config)
    config["quantization_config"] = form.quantization_config(
        quantized, [name for name in linears if name in skipped], outside
    )
    return shape.derive(config, remove=[f"{name}.weight" for name in quantized], add=packed)


class Packing:
    """Puts rounded linears into a draft as they were planned, and remembers how far they are off.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        errors: name -> squared error and squared norm of the weight (float64 [2]); a journal's state, so that
            a resumed run reports all linears.
    """

    def __init__(self, draft: Draft, options: WeightOptions, errors: dict[str, torch.Tensor]) -> None:
        self.draft = draft
        self.errors = errors
        self.before = ModelShape.of(draft.parent)
        self.planned = plan_packed(self.before, options)
        self.format: Format = format_of(self.planned.config["quantization_config"])

    def wants(self, stored: str) -> bool:
        """Whether the linear of a stored tensor ``NAME.weight`` is to be quantized."""
        return stored not in self.planned.tensors

    def scale_dtype(self, stored: str) -> torch.dtype:
        """The dtype of the scales of that linear."""
        return self.format.scale_dtype(DTYPES[self.before.tensors[stored].dtype])

    def write(self, stored: str, dense: torch.Tensor, rounded: QuantizedWeight) -> None:
        """Write a linear's packed tensors instead of its weight ``dense`` [out, in].

        Raises:
            CompressError: they do not read back as what was written.
        """
        name = stored.removesuffix(".weight")
        packed = self.format.tensors(name, rounded)
        if not self.format.read(name, packed.__getitem__).same_as(rounded):
            raise CompressError(f"The packed tensors of '{name}' do not read back as what was written.")
        self.draft.write(packed)
        self.draft.drop(stored)
        error = (rounded.dequantize() - dense).double().square().sum()
        self.errors[name] = torch.stack((error, dense.double().square().sum()))

    def finish(self) -> StepReport:
        """Set the draft's config.json, and sum up."""
        self.draft.config["quantization_config"] = self.planned.config["quantization_config"]
        return report(self.errors, self.format, self.before, self.planned)


def format_for(options: WeightOptions) -> Format:
    """The format that the options ask for."""
    name = options.format
    if name == "auto":
        name = "compressed-tensors" if options.bits in (4, 8) else "gptq"
    group_size = CHANNEL if options.group_size == "channel" else options.group_size
    return FORMATS[name](options.bits, group_size, options.symmetric)


def linears_outside(shape: ModelShape) -> list[str]:
    """Linears outside the layers: the head, and projections around the layers where there are any."""
    layers = f"{shape.anatomy.in_model(shape.anatomy.layers)}."
    return [
        name
        for name, module in shape.skeleton.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(layers)
    ]


def ignored(names: list[str], patterns: list[str]) -> set[str]:
    """The names that a pattern matches: a full name, a glob, or a regular expression after ``re:``.

    Regular expressions match from the beginning of the name, as in llm-compressor.

    Raises:
        BadInput: a pattern matches nothing, or is not a regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern[3:]) if pattern.startswith("re:") else None
        except re.error as error:
            raise BadInput(
                f"The pattern '{pattern}' in 'ignore' is not a regular expression: {error}."
            ) from None
        matched = {
            name for name in names if (expression.match(name) if expression else fnmatchcase(name, pattern))
        }
        if not matched:
            raise BadInput(
                f"The pattern '{pattern}' in 'ignore' matches no linear; they are named like {names[0]}."
            )
        found |= matched
    return found


def report(
    errors: dict[str, torch.Tensor], form: Format, before: ModelShape, planned: ModelShape
) -> StepReport:
    """Sum up the relative errors ||Ŵ − W|| / ||W|| of the linears, and the bits a weight takes."""
    relative = {name: float((error / norm).sqrt()) if norm else 0.0 for name, (error, norm) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    mean = sum(relative.values()) / len(relative)
    weights = sum(before.tensors[f"{name}.weight"].numel for name in relative)
    packed = sum(info.nbytes for name, info in planned.tensors.items() if name not in before.tensors)
    details = {
        "format": form.name,
        "linears": len(relative),
        "kept": planned.config["quantization_config"].get("ignore", []),
        "bits_per_weight": round(8 * packed / weights, 4),
        "relative_error": {"mean": mean, "max": relative[worst], "worst_linear": worst},
    }
    summary = (
        f"{len(relative)} linears at {details['bits_per_weight']:.2f} bits a weight with scales "
        f"({form.name}); relative weight error {mean:.1%} on average, {relative[worst]:.1%} at most"
    )
    return StepReport(summary, details)
