"""Folding scales of input channels into the module that computes those channels, which is exact.

For linears W_i that read the same x, W_i x = (W_i diag(s)) (diag(s)^-1 x). If x comes from a norm, or
linearly from rows of another projection, 1/s goes into the parameters of that module, and the model computes
the same as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compress.anatomy import layer_shapes, projection_rows, set_weight, sizes_of, weight
from compress.engine.checks import all_finite
from compress.engine.stream import Layer, StreamedModel
from compress.errors import CompressError
from compress.storage.draft import Draft
from compress.storage.tensors import DTYPES


@dataclass(frozen=True)
class Fold:
    """The module that computes the input channels of some linears.

    Attributes:
        producer: path of the module inside the layer; it is a norm or a linear.
        rows: the outputs of the producer that become input channels, int64 [units].
        units: for each input channel, the index in ``rows`` of the output it comes from, int64 [in]. With
            grouped-query attention all query heads of a group share the rows of their value head, so they
            must share scales.
    """

    producer: str
    rows: torch.Tensor
    units: torch.Tensor


def fold_of(model: StreamedModel, index: int, paths: list[str]) -> Fold | None:
    """Where scales of the input channels of ``paths`` can go; these linears of a layer share their input.

    Returns:
        None if the scales can go nowhere: after a norm whose output the residual stream also reads (post-norm
        models), after a norm without weights, and after the activation function of an MLP without gate.
    """
    anatomy, config = model.anatomy, model.config
    if anatomy.attention_output in paths:
        shape, width = layer_shapes(config)[index], sizes_of(config).head_dim
        groups = shape.num_key_value_heads
        rows = projection_rows(config, index)["value"].flatten()
        units = torch.arange(groups * width).view(groups, 1, width)
        per_group = shape.num_attention_heads // max(groups, 1)
        return Fold(anatomy.value, rows, units.expand(-1, per_group, -1).flatten())
    if anatomy.down in paths:
        if anatomy.gate is None:
            return None
        rows = projection_rows(config, index)["up"]
        return Fold(anatomy.up, rows, torch.arange(len(rows)))
    norm = anatomy.attention_norm if anatomy.query in paths else anatomy.mlp_norm
    has_weight = model.weights.find(f"{anatomy.layer_name(index)}.{norm}.weight") is not None
    if not anatomy.norm_first or not has_weight:
        return None
    channels = torch.arange(sizes_of(config).hidden_size)
    return Fold(norm, channels, channels)


@torch.no_grad()
def fold(
    model: StreamedModel, layer: Layer, where: Fold, paths: list[str], scales: torch.Tensor
) -> torch.Tensor:
    """Multiply the input channels of ``paths`` by ``scales`` [units] > 0, and divide the producer by them.

    If the producer is a norm, the scales are first moved so that its new weight is exact in the dtype it is
    stored in, and set to 1 where its weight is 0.

    Returns:
        The scales of the input channels that were applied, float32 [in].
    """
    producer = layer.module.get_submodule(where.producer)
    bias = getattr(producer, "bias", None)
    if where.producer in layer.linears:
        matrix = weight(producer).clone()
        scales = scales.to(matrix)
        matrix[where.rows] /= scales[:, None]
        if bias is not None:
            bias = bias.clone()
            bias[where.rows] /= scales
        set_weight(producer, matrix, bias)
    else:
        offset, own = model.anatomy.norm_offset, producer.get_parameter("weight")
        old = own + offset
        new = (old / scales.to(old) - offset).to(_stored_dtype(model, layer, where.producer)).to(old)
        usable = (old != 0) & (new + offset != 0)
        scales = torch.where(usable, old / (new + offset), 1)
        producer.weight = nn.Parameter(torch.where(usable, new, own), requires_grad=False)
        if bias is not None:
            producer.bias = nn.Parameter(bias / scales, requires_grad=False)
    channels = scales[where.units]
    for path in paths:
        set_weight(layer.linears[path], weight(layer.linears[path]) * channels)
    return channels


def write_changed(draft: Draft, model: StreamedModel, layer: Layer, modules: set[str]) -> None:
    """Write the parameters of some modules of the layer into the draft, in the dtypes they are stored in.

    Weights that the draft no longer has, because they are packed, are left out.

    Raises:
        CompressError: a value is too large for its dtype.
    """
    for path in sorted(modules):
        for leaf, parameter in layer.module.get_submodule(path).named_parameters(recurse=False):
            stored = layer.stored(path, leaf)
            if stored is None or stored not in draft:
                continue
            value = parameter.detach().to(_stored_dtype(model, layer, path, leaf))
            if not all_finite(value):
                raise CompressError(
                    f"After scales were folded into '{stored}', it holds values too large for {value.dtype}."
                )
            draft.write({stored: value})


def _stored_dtype(model: StreamedModel, layer: Layer, path: str, leaf: str = "weight") -> torch.dtype:
    stored = layer.stored(path, leaf)
    assert stored is not None  # the layer was read from there
    return DTYPES[model.checkpoint.tensors[stored].dtype]
