"""Where the codes of a quantized model go: which linears are packed, each in which format.

A method rounds the linears inside the layers. The head and the token embedding are rounded to the nearest
code by every method, if at all.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.quantization.parts.options import Bits, TableOptions, WeightOptions
from compress.storage.formats.base import Format
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.table import FORMATS
from compress.storage.tensors import TensorInfo

if TYPE_CHECKING:
    from compress.engine.stream import Layer


@dataclass(frozen=True)
class Layout:
    """What is packed, in which format, and what is not. All names are full names of modules.

    Attributes:
        default: the format of the linears that no pattern of ``set`` matches.
        linears: name -> format of the packed linears inside the layers.
        around: name -> format of the head and the token embedding, where they are packed. If both are one
            table, it has one entry.
        kept: linears inside the layers that stay as they are.
        outside: linears outside the layers that stay as they are.
        copies: tables that are stored a second time; these copies are dropped.
    """

    default: Format
    linears: dict[str, Format]
    around: dict[str, Format]
    kept: list[str]
    outside: list[str]
    copies: list[str]


def plan_layout(shape: ModelShape, options: WeightOptions, activation_bits: int | None = None) -> Layout:
    """The layout that the options ask for.

    Args:
        shape: of the model.
        options: of the weights.
        activation_bits: bits of the inputs of the linears inside the layers; None leaves inputs as they are.

    Raises:
        BadInput: the model is already quantized, no linear is left to quantize, a pattern matches nothing, or
            an option does not fit the model, such as the group size.
    """
    packed, skipped, outside = linears_to_pack(shape, options.ignore)
    linears = list(shape.linears())
    bits: dict[str, Bits] = dict.fromkeys(packed, options.bits)
    for names, width in zip(matches(linears, options.set, "set"), options.set.values(), strict=True):
        bits |= dict.fromkeys((name for name in names if name in bits), width)
    around, copies = around_bits(shape, options)

    anatomy = shape.anatomy
    table = anatomy.in_model(anatomy.embeddings[0])
    packs_head = anatomy.head in around or (anatomy.tied and around)
    heads = anatomy.heads if packs_head else ()
    if kept := [name for name in skipped if name in heads]:
        raise BadInput(
            f"The option 'ignore' keeps '{kept[0]}', but lm_head_bits or embedding_bits packs it; drop one "
            "of the two."
        )
    symmetric = options.symmetric
    if symmetric is None:
        one_width = not options.mix and len({*bits.values(), *around.values()}) == 1
        symmetric = not one_width and table not in around
    widths = {name: size[1] for name, (size, _) in stored_weights(shape, [*bits, *around]).items()}
    size, form = options.group_length(widths), FORMATS[options.format]
    used = {options.bits, *bits.values(), *around.values()}
    formats: dict[Bits, Format] = {width: form(width, size, symmetric) for width in used}
    inside = formats
    if activation_bits is not None:
        inside = {
            width: CompressedTensorsFormat(width, size, symmetric, activation_bits) for width in formats
        }
    return Layout(
        default=formats[options.bits],
        linears={name: inside[width] for name, width in bits.items()},
        around={name: formats[width] for name, width in around.items()},
        kept=[name for name in linears if name not in bits],
        outside=[name for name in outside if name not in heads],
        copies=copies,
    )


def layout_of_one(shape: ModelShape, form: Format, ignore: list[str]) -> Layout:
    """A layout with all linears inside the layers in one format. Head and embedding are kept.

    Raises:
        BadInput: as `linears_to_pack`.
    """
    linears, skipped, outside = linears_to_pack(shape, ignore)
    kept = [name for name in skipped if name not in outside]
    return Layout(form, dict.fromkeys(linears, form), {}, kept, outside, [])


def linears_to_pack(shape: ModelShape, ignore: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Sort the linears of a model by what happens to them.

    Returns:
        The linears inside the layers that are to be packed; all linears that ``ignore`` keeps; and all
        linears outside the layers.

    Raises:
        BadInput: the model is already quantized, no linear is left to quantize, or a pattern matches nothing.
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


def linears_outside(shape: ModelShape) -> list[str]:
    """The linears outside the layers: the head, and in some models projections around the layers."""
    layers = f"{shape.anatomy.in_model(shape.anatomy.layers)}."
    return [
        name
        for name, module in shape.skeleton.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(layers)
    ]


def around_bits(shape: ModelShape, options: TableOptions) -> tuple[dict[str, Bits], list[str]]:
    """Bits of the head and the token embedding.

    Returns:
        Full name -> bits of those that are to be packed; and the names of copies of a shared table, which are
        dropped when the table is packed.

    Raises:
        BadInput: the model has no head, or one table is to have two widths.
    """
    anatomy = shape.anatomy
    head, table = anatomy.head, anatomy.in_model(anatomy.embeddings[0])
    if options.lm_head_bits is not None and head is None:
        raise BadInput("This model has no projection to the vocabulary, so lm_head_bits cannot be given.")
    wanted: dict[str, Bits] = {}
    for name, bits in ((head, options.lm_head_bits), (table, options.embedding_bits)):
        if name is not None and bits is not None:
            wanted[name] = bits
    if not anatomy.tied or not wanted:
        return wanted, []
    if len(set(wanted.values())) > 1:
        raise BadInput(
            "The head and the embedding of this model are one table; give only one of lm_head_bits and "
            "embedding_bits, or the same value to both."
        )
    stored = [name for name in (table, head) if name is not None and f"{name}.weight" in shape.tensors]
    return dict.fromkeys(stored[:1], next(iter(wanted.values()))), stored[1:]


def plan_packed(shape: ModelShape, options: WeightOptions) -> ModelShape:
    """The shape of the model after its linears are packed.

    Raises:
        BadInput: as `plan_layout`, or a linear does not fit its format.
    """
    return packed_shape(shape, plan_layout(shape, options))


def packed_shape(shape: ModelShape, layout: Layout) -> ModelShape:
    """The shape of the model after everything that ``layout`` names is packed.

    Raises:
        BadInput: a linear does not fit its format.
    """
    config, names_of = dict(shape.config), shape.anatomy.names_of
    around = {each: form for name, form in layout.around.items() for each in names_of(name)}
    outside = [each for name in layout.outside for each in names_of(name)]
    config["quantization_config"] = layout.default.describe(layout.linears, around, layout.kept, outside)
    formats, packed = layout.linears | layout.around, dict[str, TensorInfo]()
    for name, (size, dtype) in stored_weights(shape, formats).items():
        packed |= formats[name].tensor_infos(name, size, dtype)
    gone = [*layout.linears, *layout.around, *layout.copies]
    return shape.derive(config, remove=[f"{name}.weight" for name in gone], add=packed)


def stored_weights(shape: ModelShape, names: Iterable[str]) -> dict[str, tuple[tuple[int, int], str]]:
    """Full name -> the shape (out, in) of a linear or an embedding, and the stored dtype of its weight.

    Raises:
        BadInput: the model lacks one of the weights.
    """
    linears = shape.linears()
    found = {}
    for name in names:
        if (info := shape.tensors.get(f"{name}.weight")) is None:
            raise BadInput(f"The model lacks the tensor '{name}.weight'.")
        out, width = linears.get(name, info.shape)  # Conv1D weights are stored as (in, out)
        found[name] = ((out, width), info.dtype)
    return found


def stored_linears(
    layer: Layer, wanted: Container[str], paths: Iterable[str] | None = None
) -> dict[str, str]:
    """Find the stored weights of linears of a layer.

    Args:
        layer: in memory.
        wanted: full names of the linears that count.
        paths: the linears to look at, by their paths inside the layer; None for all.

    Returns:
        Path inside the layer -> name of the stored tensor, ``NAME.weight``.
    """
    found = {path: layer.stored(path) for path in (layer.linears if paths is None else paths)}
    return {
        path: stored
        for path, stored in found.items()
        if stored is not None and stored.removesuffix(".weight") in wanted
    }


def matches(names: list[str], patterns: Iterable[str], option: str) -> list[list[str]]:
    """The names that each pattern matches.

    A pattern is a full name, a glob, or a regular expression after ``re:``. Regular expressions must match
    from the beginning of the name, as in llm-compressor.

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
