"""Weight-only quantization: what every such method shares.

A method rounds the linears inside the layers. In which format each of them is stored, and the head and the
embedding, which are rounded to the nearest by every method, are settled here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pydantic import Field, PositiveInt
from torch import nn

from compress.anatomy.roles import weight
from compress.errors import BadInput, CompressError
from compress.kernels.codes.integer import CHANNEL, QuantizedWeight, quantize_weight
from compress.method import MethodOptions, StepReport
from compress.pipeline.plan import ModelShape
from compress.storage.checkpoint import DTYPES, Draft
from compress.storage.formats.base import FORMATS, CompressedTensors, Format

if TYPE_CHECKING:
    from compress.engine.stream import Layer, StreamedModel

Bits = Literal[2, 3, 4, 8]
BLOCK = 1 << 22
"""Weights of a head or an embedding that are rounded, or compared, at a time."""


class WeightOptions(MethodOptions):
    """Which grid, how it is stored, and which linears are left alone."""

    bits: Bits = Field(4, description="bits of a weight")
    group_size: PositiveInt | Literal["channel"] = Field(
        64,
        description="inputs that share a scale; must divide the input dimensions; channel: a whole row",
    )
    symmetric: bool = Field(True, description="fixed zero points; otherwise each group stores its own")
    format: Literal["auto", "compressed-tensors", "gptq"] = Field(
        "auto",
        description="how to store the codes; auto: gptq for 2 or 3 bits everywhere, else compressed-tensors",
    )
    ignore: list[str] = Field(
        [], description="linears to keep: full names, globs, or regular expressions after 're:'"
    )
    set: dict[str, Bits] = Field(
        {},
        description="other bits for the linears that a pattern matches (as in ignore); the last match counts",
    )
    lm_head_bits: Bits | None = Field(
        None, description="round the head to the nearest with so many bits; kept if not given"
    )
    embedding_bits: Bits | None = Field(
        None, description="the same for the token embedding, which is one table with a tied head"
    )


@dataclass(frozen=True)
class Layout:
    """What of a model is packed, in which format, and what is not: full names of modules.

    Attributes:
        default: the format of the linears that no pattern of ``set`` matches.
        linears: name -> format of those inside the layers.
        around: the same of the head and the token embedding, or of the one table they share.
        kept: linears inside the layers that stay as they are.
        outside: linears outside the layers that do.
        copies: of the shared table, stored beside it, which go away.
    """

    default: Format
    linears: dict[str, Format]
    around: dict[str, Format]
    kept: list[str]
    outside: list[str]
    copies: list[str]


def plan_layout(shape: ModelShape, options: WeightOptions, activation_bits: int | None = None) -> Layout:
    """What the options ask for.

    Args:
        shape: of the model.
        options: of the weights.
        activation_bits: of the inputs of the linears inside the layers, where these are quantized, too.

    Raises:
        BadInput: the model is quantized already, nothing is left to quantize, a pattern matches nothing, or
            an option does not fit the model.
    """
    packed, skipped, outside = linears_to_pack(shape, options.ignore)
    linears = list(shape.linears())
    bits = dict.fromkeys(packed, options.bits)
    for names, other in zip(matches(linears, options.set, "set"), options.set.values(), strict=True):
        bits |= dict.fromkeys((name for name in names if name in bits), other)
    around, copies = around_bits(shape, options.lm_head_bits, options.embedding_bits)

    name = options.format
    if name == "auto":
        low = not around and set(bits.values()) in ({2}, {3})
        name = "gptq" if low else "compressed-tensors"
    size = CHANNEL if options.group_size == "channel" else options.group_size
    formats = {width: FORMATS[name](width, size, options.symmetric) for width in get_args(Bits)}
    inside = formats
    if activation_bits is not None:
        inside = {
            width: CompressedTensors(width, size, options.symmetric, activation_bits) for width in formats
        }
    anatomy = shape.anatomy
    packs_head = anatomy.head in around or (anatomy.tied and around)
    heads = {anatomy.head, *anatomy.head_aliases} if packs_head else set()
    if kept := [name for name in skipped if name in heads]:
        raise BadInput(f"The option 'ignore' keeps '{kept[0]}', and another gives it bits; drop one of them.")
    return Layout(
        default=formats[options.bits],
        linears={name: inside[width] for name, width in bits.items()},
        around={name: formats[width] for name, width in around.items()},
        kept=[name for name in linears if name not in bits],
        outside=[name for name in outside if name not in heads],
        copies=copies,
    )


def linears_to_pack(shape: ModelShape, ignore: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The linears inside the layers that are to be packed, those that ``ignore`` keeps, and all outside.

    Raises:
        BadInput: the model is quantized already, nothing is left to quantize, or a pattern matches nothing.
    """
    if "quantization_config" in shape.config:
        method = shape.config["quantization_config"].get("quant_method")
        raise BadInput(f"This model is already quantized ({method}); start from the model it was made of.")
    linears, outside = list(shape.linears()), linears_outside(shape)
    skipped = [name for names in matches([*linears, *outside], ignore, "ignore") for name in names]
    packed = [name for name in linears if name not in skipped]
    if not packed:
        raise BadInput("The option 'ignore' leaves no linear to quantize.")
    return packed, skipped, outside


def layout_of_one(shape: ModelShape, form: Format, ignore: list[str]) -> Layout:
    """All linears inside the layers in one format, and nothing around them.

    Raises:
        BadInput: as `linears_to_pack`.
    """
    linears, skipped, outside = linears_to_pack(shape, ignore)
    kept = [name for name in skipped if name not in outside]
    return Layout(form, dict.fromkeys(linears, form), {}, kept, outside, [])


def around_bits(
    shape: ModelShape, lm_head_bits: Bits | None, embedding_bits: Bits | None
) -> tuple[dict[str, Bits], list[str]]:
    """Bits of the head and the token embedding if they are to be packed, and copies of a shared table."""
    anatomy = shape.anatomy
    head, table = anatomy.head, anatomy.in_model(anatomy.embeddings[0])
    if lm_head_bits is not None and head is None:
        raise BadInput("This model has no projection to the vocabulary, so lm_head_bits cannot be given.")
    wanted = {head: lm_head_bits, table: embedding_bits}
    wanted = {name: bits for name, bits in wanted.items() if bits is not None}
    if not anatomy.tied or not wanted:
        return wanted, []
    if len(set(wanted.values())) > 1:
        raise BadInput(
            "The head and the embedding of this model are one table; give only one of lm_head_bits and "
            "embedding_bits, or the same to both."
        )
    stored = [name for name in (table, head) if f"{name}.weight" in shape.tensors]
    return dict.fromkeys(stored[:1], next(iter(wanted.values()))), stored[1:]


def plan_packed(shape: ModelShape, options: WeightOptions) -> ModelShape:
    """The shape of the model with its linears packed.

    Raises:
        BadInput: as `plan_layout`, or a linear does not fit its format.
    """
    return packed_shape(shape, plan_layout(shape, options))


def packed_shape(shape: ModelShape, layout: Layout) -> ModelShape:
    """The shape of the model with what ``layout`` names packed.

    Raises:
        BadInput: a linear does not fit its format.
    """
    config = dict(shape.config)
    config["quantization_config"] = layout.default.describe(
        layout.linears, layout.around, layout.kept, layout.outside
    )
    linears, packed = shape.linears(), {}
    for name, form in (layout.linears | layout.around).items():
        if (info := shape.tensors.get(f"{name}.weight")) is None:
            raise BadInput(f"The model lacks the tensor '{name}.weight'.")
        packed |= form.tensor_infos(name, linears.get(name, info.shape), info.dtype)
    gone = [*layout.linears, *layout.around, *layout.copies]
    return shape.derive(config, remove=[f"{name}.weight" for name in gone], add=packed)


class Packing:
    """Puts rounded linears into a draft as they were planned, and remembers how far they are off.

    Linears are called by their stored tensors ``NAME.weight``.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        errors: name -> squared error and squared norm of the weight (float64 [2]); a journal's state, so that
            a resumed run reports all linears.
        layout_of: what says what the options ask for.
    """

    def __init__(
        self,
        draft: Draft,
        options: Any,
        errors: dict[str, torch.Tensor],
        layout_of: Callable[[ModelShape, Any], Layout] = plan_layout,
    ) -> None:
        self.draft = draft
        self.errors = errors
        self.before = ModelShape.of(draft.parent)
        self.layout = layout_of(self.before, options)
        self.planned = packed_shape(self.before, self.layout)
        self.format = self.layout.default

    def wants(self, stored: str) -> bool:
        """Whether a linear inside the layers is to be quantized."""
        return stored.removesuffix(".weight") in self.layout.linears

    def linears(self, model: StreamedModel, layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
        """Stored tensors of the linears of a layer that are to be quantized, and their weights [out, in]."""
        for path, linear in layer.linears.items():
            stored = model.weights.find(f"{layer.name}.{path}.weight")
            if self.wants(stored):
                yield stored, weight(linear)

    def format_of(self, stored: str) -> Format:
        """The format of a linear: how many bits it is to be given, in groups of how many, and whether
        symmetric."""
        return (self.layout.linears | self.layout.around)[stored.removesuffix(".weight")]

    def scale_dtype(self, stored: str) -> torch.dtype:
        """The dtype of the scales of that linear."""
        return self.format.scale_dtype(DTYPES[self.before.tensors[stored].dtype])

    def write(self, stored: str, dense: torch.Tensor, rounded: QuantizedWeight) -> None:
        """Write a linear's packed tensors instead of its weight ``dense`` [out, in].

        Raises:
            CompressError: they do not read back as what was written.
        """
        name, form = stored.removesuffix(".weight"), self.format_of(stored)
        packed = form.tensors(name, rounded)
        if not form.read(name, packed.__getitem__).same_as(rounded):
            raise CompressError(f"The packed tensors of '{name}' do not read back as what was written.")
        self.draft.drop(stored)
        self.draft.write(packed)
        sums = torch.zeros(2, dtype=torch.float64)
        blocks = dense.split(_rows(dense))
        for before, after in zip(blocks, rounded.split([len(block) for block in blocks]), strict=True):
            before = before.double()
            sums += torch.stack(((after.dequantize() - before).square().sum(), before.square().sum())).cpu()
        self.errors[name] = sums

    def finish(self) -> StepReport:
        """Round the head and the embedding if they are asked for, set the draft's config.json, and sum up.

        Raises:
            BadInput: they hold NaN or infinite weights.
        """
        for name, form in self.layout.around.items():
            dense = self.draft.read(f"{name}.weight")
            self.write(f"{name}.weight", dense, round_by_rows(dense, form, name))
        for name in self.layout.copies:
            self.draft.drop(f"{name}.weight")
        self.draft.config["quantization_config"] = self.planned.config["quantization_config"]
        return report(self.errors, self.layout, self.before, self.planned)


def round_by_rows(dense: torch.Tensor, form: Format, name: str) -> QuantizedWeight:
    """A head or an embedding [out, in], in the dtype it is stored with, rounded to the nearest some rows at a
    time.

    Raises:
        BadInput: it holds NaN or infinite weights.
    """
    scale_dtype = form.scale_dtype(dense.dtype)
    blocks = [
        quantize_weight(block, form.bits, form.group_size, form.symmetric, scale_dtype, name)
        for block in dense.split(_rows(dense))
    ]
    return QuantizedWeight.joined(blocks)


def _rows(weight: torch.Tensor) -> int:
    return max(1, BLOCK // weight.shape[1])


def linears_outside(shape: ModelShape) -> list[str]:
    """Linears outside the layers: the head, and projections around the layers where there are any."""
    layers = f"{shape.anatomy.in_model(shape.anatomy.layers)}."
    return [
        name
        for name, module in shape.skeleton.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(layers)
    ]


def matches(names: list[str], patterns: Iterable[str], option: str) -> list[list[str]]:
    """The names that each pattern matches: a full name, a glob, or a regular expression after ``re:``.

    Regular expressions match from the beginning of the name, as in llm-compressor.

    Raises:
        BadInput: a pattern of the ``option`` matches nothing, or is not a regular expression.
    """
    found = []
    for pattern in patterns:
        try:
            expression = re.compile(pattern[3:]) if pattern.startswith("re:") else None
        except re.error as error:
            raise BadInput(
                f"The pattern '{pattern}' in '{option}' is not a regular expression: {error}."
            ) from None
        matched = [
            name for name in names if (expression.match(name) if expression else fnmatchcase(name, pattern))
        ]
        if not matched:
            raise BadInput(
                f"The pattern '{pattern}' in '{option}' matches no linear; they are named like {names[0]}."
            )
        found.append(matched)
    return found


def report(
    errors: dict[str, torch.Tensor], layout: Layout, before: ModelShape, planned: ModelShape
) -> StepReport:
    """Sum up the relative errors ||Ŵ − W|| / ||W|| of what is packed, and the bits a weight takes."""
    relative = {name: float((error / norm).sqrt()) if norm else 0.0 for name, (error, norm) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    mean = fmean(relative.values())  # whatever their order, which a resumed run changes
    weights = sum(before.tensors[f"{name}.weight"].numel for name in relative)
    packed = sum(info.nbytes for name, info in planned.tensors.items() if before.tensors.get(name) != info)
    widths = Counter(form.bits for form in layout.linears.values())
    details = {
        "format": layout.default.name,
        "linears": len(layout.linears),
        "linears_by_bits": {str(bits): widths[bits] for bits in sorted(widths)},
        "outside_the_layers": {name: form.bits for name, form in layout.around.items()},
        "kept": [*layout.outside, *layout.kept],
        "bits_per_weight": round(8 * packed / weights, 4),
        "relative_error": {"mean": mean, "max": relative[worst], "worst_linear": worst},
    }
    around = "".join(f", {name} at {form.bits} bits" for name, form in layout.around.items())
    summary = (
        f"{len(layout.linears)} linears{around}: {details['bits_per_weight']:.2f} bits a weight with scales "
        f"({layout.default.name}); relative weight error {mean:.1%} on average, {relative[worst]:.1%} at most"
    )
    return StepReport(summary, details)
