"""Round-to-nearest: the baseline every other weight quantizer is measured against."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from compress.anatomy import weight
from compress.checkpoint import DTYPES
from compress.errors import BadInput, CompressError
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.plan import ModelShape
from compress.quantization.formats import FORMATS, Format, format_of
from compress.quantization.quantizer import CHANNEL, quantize_weight

if TYPE_CHECKING:
    from compress.run import Run
    from compress.stream import StreamedModel


class RoundToNearest(Method):
    """Round every weight of the layers to the nearest point of a low-bit grid; no calibration.

    For each group of consecutive inputs of an output row, s and z follow from the smallest and the largest
    weight, and q = clamp(round(w / s) + z, 0, 2^b - 1) (see `quantize_weight`). Embeddings, the head, norms
    and biases are kept. What is written are the packed codes, in a format that other programs load; they are
    read back and compared at once.
    """

    name = "rtn"
    family = "quantization"
    paper = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        "1712.05877",
    )
    needs_calibration = False

    class Options(MethodOptions):
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

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if "quantization_config" in shape.config:
            method = shape.config["quantization_config"].get("quant_method")
            raise BadInput(
                f"This model is already quantized ({method}); start from the model it was made of."
            )
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

    def apply(self, model: StreamedModel, options: Options, run: Run) -> StepReport:
        before = ModelShape.of(model.checkpoint)
        planned = self.plan(before, options)
        form = format_of(planned.config["quantization_config"])
        # Kept in the journal, so that a resumed run reports all linears: squared error and squared norm.
        journal = run.journal("rounding")
        for layer in model.walk(journal, label=f"rounding to {options.bits} bits"):
            for path, linear in layer.linears.items():
                stored = model.weights.find(f"{layer.name}.{path}.weight")
                name = stored.removesuffix(".weight")
                if stored in planned.tensors:
                    continue
                dense = weight(linear)
                scale_dtype = form.scale_dtype(DTYPES[before.tensors[stored].dtype])
                rounded = quantize_weight(
                    dense, options.bits, form.group_size, options.symmetric, scale_dtype, name
                )
                packed = form.tensors(name, rounded)
                if not form.read(name, packed.__getitem__).same_as(rounded):
                    raise CompressError(
                        f"The packed tensors of '{name}' do not read back as what was written."
                    )
                run.draft.write(packed)
                run.draft.drop(stored)
                error = (rounded.dequantize() - dense).double().square().sum()
                journal.state[name] = torch.stack((error, dense.double().square().sum()))
        run.draft.config["quantization_config"] = planned.config["quantization_config"]
        return report(journal.state, form, before, planned)


def format_for(options: RoundToNearest.Options) -> Format:
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
