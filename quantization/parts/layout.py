"""Weight-only quantization: what every such method shares.

A method rounds the linears inside the layers. In which format each of them is stored, and the head and the
embedding, which are rounded to the nearest by every method, are settled here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from pydantic import Field, PositiveInt
from torch import nn

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.method import MethodOptions
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.table import FORMATS

Bits = Literal[2, 3, 4, 8]


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
    mix: bool = Field(
        False,
        description="give each linear its own bits by measured sensitivity, in no more bytes than 'bits' "
        "everywhere would take",
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
            width: CompressedTensorsFormat(width, size, options.symmetric, activation_bits)
            for width in formats
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
