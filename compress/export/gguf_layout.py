"""What a GGUF file of a model will hold: names, types and metadata, known before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.errors import BadInput
from compress.export.converted import Converted
from compress.export.gguf_codes import exact_type
from compress.export.gguf_types import Wanted, is_weight, types_of
from compress.export.huggingface import HuggingFace, HuggingFaceOptions, rounding_notes
from compress.export.model import ExportedModel
from compress.kernels.codes.gguf import TYPES, BlockType
from compress.kernels.layers.adapted import A
from compress.storage.gguf.architectures import (
    architecture_of,
    converted,
    extra_tensors,
    limits_of,
    row_order,
    tensor_names,
)
from compress.storage.gguf.tokenizer import tokenizer_metadata

HEAD, TABLE = "output.weight", "token_embd.weight"
FLOATS = {torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass
class Layout:
    """A planned GGUF file.

    Attributes:
        dense: the model with dense weights in float32.
        names: name in the checkpoint -> name in the file.
        kinds: name in the file -> type.
        shapes: name in the file -> shape.
        extra: name in the file -> tensor that the checkpoint does not have, float32.
        carried: name in the checkpoint -> name of the packed module whose codes are carried over.
        plain: names in the checkpoint of what nobody asked to round, so that it is told where 16 bits do.
        metadata: of the file.
        notes: what differs from the model, in sentences.
    """

    dense: Converted
    config: Any
    names: dict[str, str]
    kinds: dict[str, BlockType]
    shapes: dict[str, tuple[int, ...]]
    extra: dict[str, torch.Tensor]
    carried: dict[str, str]
    plain: set[str]
    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def rounded(self) -> dict[str, BlockType]:
        """Name in the checkpoint -> type, of the weights that are rounded to blocks."""
        return {
            name: self.kinds[theirs]
            for name, theirs in self.names.items()
            if self.kinds[theirs].dtype is None and name not in self.carried
        }

    def values(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint as the file has it, float32."""
        return converted(self.config, name, self.dense.read(name).float())

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that replaces one of the checkpoint, as the file has it."""
        return converted(self.config, name, tensor.float())

    def order(self, name: str, rows: int) -> torch.Tensor | None:
        """As `row_order`."""
        return row_order(self.config, name, rows)


def plan_layout(model: ExportedModel, types: str | None, weighted: bool) -> Layout:
    """Plan the file of a model.

    Args:
        model: what is exported.
        types: what the user asks for (see `Wanted`); None carries codes over and leaves the rest as it is.
        weighted: whether importances are known.

    Raises:
        BadInput: a GGUF file cannot hold this model, or the types do not fit it.
    """
    config = model.shape.pretrained_config
    architecture = architecture_of(config)
    dense, _ = HuggingFace().converted(model, HuggingFaceOptions(dtype="float32"))
    anatomy = model.shape.anatomy
    stored = [name for name in dense.tensors if not (anatomy.tied and name == f"{anatomy.head}.weight")]
    names = tensor_names(config, stored)
    probe = {name: torch.empty(dense.tensors[name].shape, device="meta") for name in names}
    shapes = {
        theirs: tuple(converted(config, name, probe[name]).shape) if probe[name].ndim < 3 else (0,)
        for name, theirs in names.items()
    }
    extra = extra_tensors(config)
    shapes |= {name: tuple(tensor.shape) for name, tensor in extra.items()}
    table = next(name for name, theirs in names.items() if theirs == TABLE)
    copied = architecture.head_is_needed and HEAD not in shapes
    if copied:
        shapes[HEAD] = shapes[TABLE]
    notes = [*rounding_notes(model), *limits_of(config)]
    carried: dict[str, str] = {}
    plain: set[str] = set()
    if types is None:
        kinds, carried, plain = _as_they_are(model, names, shapes, table, notes)
        number = 1
    else:
        wanted = Wanted.parse(types)
        kinds, number = types_of(wanted, shapes, config, weighted), wanted.number
        if copied:
            if wanted.named and kinds[HEAD] is not kinds[TABLE]:
                raise BadInput(
                    f"The head of this model is a copy of its token table, so '{HEAD}' and '{TABLE}' need "
                    "the same type."
                )
            kinds[TABLE] = kinds[HEAD]
        if model.packed or model.stacked:
            notes.append(
                "The weights, which are in few bits already, are rounded again to the types asked for."
            )
    name = Path(model.source.id).name or model.source.id
    metadata = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": number,
        "general.quantization_version": 2,
    }
    values = architecture.metadata(config)
    metadata |= {f"{architecture.name}.{key}": value for key, value in values.items()}
    tokenizer = tokenizer_metadata(model.source.folder, shapes[TABLE][0])
    notes.extend(tokenizer.notes)
    metadata |= tokenizer.values
    return Layout(dense, config, names, kinds, shapes, extra, carried, plain, metadata, notes)


def _as_they_are(
    model: ExportedModel,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    table: str,
    notes: list[str],
) -> tuple[dict[str, BlockType], dict[str, str], set[str]]:
    """Codes where a grid of blocks holds them, and 16 bits for the rest: the model's own dtype, or float16.

    Returns:
        The types, and `Layout.carried` and `Layout.plain`.
    """
    usual = TYPES[FLOATS.get(model.dtype, "F16")]
    kinds = {name: usual if is_weight(name, shape) else TYPES["F32"] for name, shape in shapes.items()}
    carried, others = {}, list(model.stacked)
    modules = {name.removesuffix(".weight"): name for name in names}
    for module, form in model.packed.items():
        name = modules.get(module, table)
        adapted = f"{module}{A}" in model.checkpoint
        kind = None if adapted else exact_type(form, model.size(module)[1])
        if kind is None:
            others.append(module)
        else:
            kinds[names[name]], carried[name] = kind, module
    unpacked = {modules.get(module, table) for module in others}
    if others:
        # Dense values of codes need more digits than float16 or bfloat16 have.
        kinds |= {names[name]: TYPES["F16"] for name in unpacked}
        notes.append(
            f"No type of GGUF has the grid of {len(others)} of the {len(others) + len(carried)} weights in "
            f"few bits, such as '{others[0]}'; they are stored in float16. With --types Q4_K_M, for "
            "instance, they are rounded again."
        )
    if HEAD in shapes and HEAD not in names.values():
        kinds[HEAD] = kinds[TABLE]
    return kinds, carried, names.keys() - carried.keys() - unpacked
