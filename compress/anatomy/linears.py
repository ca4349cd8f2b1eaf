"""The weight of a linear layer as [out, in], whichever class holds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight(linear: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` or ``Conv1D`` as [out, in]; a view, without gradient."""
    stored = linear.weight.detach()
    return stored.T if isinstance(linear, Conv1D) else stored


def set_weight(linear: nn.Module, new: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear the weight ``new`` [out, in], of any shape, and ``bias`` [out]; None keeps the old one.

    The parameters are replaced by copies in the dtype and on the device of the old weight.

    Raises:
        ValueError: the bias does not have one entry for each row of the weight.
    """
    if bias is None and linear.bias is not None:
        bias = linear.bias.detach()
    if bias is not None and bias.shape != new.shape[:1]:
        raise ValueError(f"a bias of {tuple(bias.shape)} does not fit a weight of {tuple(new.shape)}")

    def parameter(value: Tensor) -> nn.Parameter:
        value = value.detach().to(linear.weight).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(value, requires_grad=linear.weight.requires_grad)

    transposed = isinstance(linear, Conv1D)
    if bias is not None:
        linear.bias = parameter(bias)
    linear.weight = parameter(new.T if transposed else new)
    widths = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, width in zip(widths, new.shape, strict=True):
        setattr(linear, name, width)
