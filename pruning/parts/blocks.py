"""Remove blocks from a model: an attention or an MLP with its norms; a layer without both is gone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch

from compress.anatomy import layer_shapes
from compress.engine.shape import ModelShape
from compress.engine.stream import Layer
from compress.pruning.parts.depth import plan_without_layers, remove_layers
from compress.pruning.parts.width import Kept, head_of_its_class, plan_widths, skipped
from compress.storage.draft import Draft

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, Part] = ("attention", "mlp")


class Block(NamedTuple):
    """The attention or the MLP of a layer, whose output is added to the hidden states."""

    layer: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part} {self.layer}"


def block_parameters(shape: ModelShape) -> dict[Block, int]:
    """The number of parameters of every block (its linears and norms), in the order of the data flow."""
    found = {}
    for index, module in enumerate(shape.skeleton.base_model.get_submodule(shape.anatomy.layers)):
        layer = Layer(index, shape.anatomy.layer_name(index), module, {})
        whole = _parameters(layer)
        widths = layer_shapes(shape.pretrained_config)[index]
        for part, width in zip(PARTS, (widths.num_attention_heads, widths.intermediate_size), strict=True):
            if width:
                with skipped(layer, shape.anatomy, part):
                    found[Block(index, part)] = whole - _parameters(layer)
    return found


def layer_parameters(shape: ModelShape) -> int:
    """The number of parameters of all layers together, without embeddings, final norm and head."""
    layers = shape.skeleton.base_model.get_submodule(shape.anatomy.layers)
    return sum(parameter.numel() for parameter in layers.parameters())


def _parameters(layer: Layer) -> int:
    return sum(parameter.numel() for parameter in layer.module.parameters())


def plan_without_blocks(shape: ModelShape, removed: Collection[Block]) -> ModelShape:
    """The shape of the model when the blocks ``removed`` are gone.

    A layer that loses both blocks is removed itself, unless it has norms behind its residual sums, or the
    index of a layer scales its attention. If only whole layers are removed, the result is the plain
    architecture.

    Raises:
        BadInput: the model is quantized, or these layers cannot be removed (see `plan_without_layers`).
    """
    gone = _empty_layers(shape, removed)
    after = plan_without_layers(shape, gone)
    kept = []
    for index, widths in enumerate(layer_shapes(shape.pretrained_config)):
        groups = 0 if Block(index, "attention") in removed else widths.num_key_value_heads
        neurons = 0 if Block(index, "mlp") in removed else widths.intermediate_size
        if index not in gone:
            kept.append(Kept(torch.arange(groups), torch.arange(neurons)))
    whole = all(block.layer in gone for block in removed)
    return after if whole else plan_widths(after, kept)


def remove_blocks(draft: Draft, removed: Collection[Block]) -> None:
    """Remove blocks from a draft that is equal to its parent; kept tensors stay in the parent's files.

    Raises:
        BadInput: as `plan_without_blocks`.
    """
    before = ModelShape.of(draft.parent)
    after = plan_without_blocks(before, removed)
    remove_layers(draft, _empty_layers(before, removed))
    for name, old in head_of_its_class(before, after).items():
        draft.alias(name, old)
    for name in draft.tensors.keys() - after.tensors.keys():
        draft.drop(name)
    draft.config = after.config


def _empty_layers(shape: ModelShape, removed: Collection[Block]) -> set[int]:
    # Norms behind residual sums act on their own, and an index that scales attention must not change.
    scaled = getattr(shape.pretrained_config, "scale_attn_by_inverse_layer_idx", False)
    if scaled or not shape.anatomy.norm_first:
        return set()
    left = {block.layer for block in block_parameters(shape).keys() - set(removed)}
    return {block.layer for block in removed} - left
