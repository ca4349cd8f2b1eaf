"""Read and set the weight of a linear as [out, in], whichever class holds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def weight(linear: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` or ``Conv1D`` as [out, in] (of an embedding: [tokens, width]).

    It is a view that shares memory with the parameter, without gradient.
    """
    stored = linear.weight
    assert isinstance(stored, Tensor)
    return stored.detach().T if isinstance(linear, Conv1D) else stored.detach()


def set_weight(linear: nn.Module, new: Tensor, bias: Tensor | None = None) -> None:
    """Replace the parameters of a linear by copies of ``new`` and ``bias``.

    The copies have the dtype and the device of the old weight. The linear may change its size.

    Args:
        linear: an ``nn.Linear`` or ``Conv1D``.
        new: the weight [out, in].
        bias: [out]; None keeps the old bias, if there is one.

    Raises:
        ValueError: the bias does not have one entry for each row of the weight.
    """
    old = linear.weight
    assert isinstance(old, Tensor)
    if bias is None and isinstance(linear.bias, Tensor):
        bias = linear.bias.detach()
    if bias is not None and bias.shape != new.shape[:1]:
        raise ValueError(f"a bias of {tuple(bias.shape)} does not fit a weight of {tuple(new.shape)}")

    def parameter(value: Tensor) -> nn.Parameter:
        value = value.detach().to(old).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(value, requires_grad=old.requires_grad)

    transposed = isinstance(linear, Conv1D)
    if bias is not None:
        linear.bias = parameter(bias)
    linear.weight = parameter(new.T if transposed else new)
    widths = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, width in zip(widths, new.shape, strict=True):
        setattr(linear, name, width)
