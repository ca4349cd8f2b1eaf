"""What all layers over low-bit weights have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from compress.kernels.ops import REFERENCE
from compress.kernels.reference.ops import linear_by_rows, row_slices


class LowBitLinear(nn.Module, ABC):
    """``nn.Linear`` over a weight that stays in few bits, for inference.

    A subclass registers the tensors of its weight as buffers and says how rows of it are dequantized. Buffers
    are not part of the state dict, because checkpoint formats have names and layouts of their own.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bias: [out], or None.
    """

    row_multiple = 1
    """The number of rows that are dequantized together is a multiple of this."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @abstractmethod
    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        """Some rows of the weight: float32 [rows, in]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``.

        A few rows of the weight are dequantized and multiplied at once, so the whole of it is never dense.
        """
        return linear_by_rows(input, self.out_features, self.dequantize_rows, self.bias, self.row_multiple)

    def row_slices(self, device: torch.device) -> Iterator[slice]:
        """The rows that are dequantized together on ``device``."""
        return row_slices(self.out_features, self.in_features, device, self.row_multiple)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in memory: all buffers but the bias."""
        return sum(tensor.nbytes for name, tensor in self.named_buffers() if name != "bias")

    @property
    def kernel(self) -> str:
        """The backend that runs this layer where it is."""
        return REFERENCE

    def details(self) -> dict[str, object]:
        """What the layer's representation names besides its size."""
        return {}

    def extra_repr(self) -> str:
        facts = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **self.details(),
            "bias": self.bias is not None,
        }
        return ", ".join(f"{name}={value}" for name, value in facts.items())


def restore_dtypes(module: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Undo a change of dtype of some of a module's buffers, which would round them again; their device stays.

    Args:
        module: has just been moved or cast.
        before: name -> the buffer as it was.
    """
    for name, tensor in before.items():
        moved = module.get_buffer(name)
        if moved.dtype != tensor.dtype:
            setattr(module, name, tensor.to(moved.device))
