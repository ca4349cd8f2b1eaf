"""Checkpoint formats of packed weights: names, layouts, config.json, and who can load them.

A format turns a `QuantizedWeight` into named tensors and back, bit for bit, and knows their dtypes and
shapes without data, so that a plan and a run cannot disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import QuantizedWeight
from compress.kernels.codes.packing import BITS
from compress.storage.tensors import TensorInfo

Get = Callable[[str], torch.Tensor]


class Format(ABC):
    """How quantized linears of one bit width, group size and symmetry are stored.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: values in a group along the input axis; −1: a whole row.
        symmetric: zero points are 2^(bits−1) and need not be stored.
    """

    activation_bits: int | None = None
    """Of the inputs of linears, which are then quantized per token; None leaves them as they are."""

    name: ClassVar[str]
    marker: ClassVar[str]
    """The tensor that every linear stored in this format has: ``{linear}.{marker}``."""

    def __init__(self, bits: int, group_size: int, symmetric: bool) -> None:
        if bits not in BITS:
            raise BadInput(f"Weights of {bits} bits are not supported; there are 2, 3, 4 and 8.")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    @abstractmethod
    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored with, for a weight stored as ``weight_dtype``."""

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """What the checkpoint holds in place of ``{name}.weight``: full tensor names -> tensors."""

    @abstractmethod
    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        """The names, dtypes and shapes of `tensors`, for a linear of ``shape`` (out, in).

        Raises:
            BadInput: a linear of this shape cannot be stored.
        """

    @abstractmethod
    def read(self, name: str, get: Get) -> QuantizedWeight:
        """The inverse of `tensors`.

        Args:
            name: of the linear, such as ``model.layers.0.mlp.up_proj``.
            get: gives the tensor of a full name.

        Raises:
            BadInput: the tensors do not fit together, or use a feature that is not read here.
        """

    @classmethod
    @abstractmethod
    def describe(
        cls,
        linears: Mapping[str, Self],
        around: Mapping[str, Self],
        skipped: Sequence[str] = (),
        outside: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The ``quantization_config`` entry of config.json.

        Args:
            linears: full name -> format of the packed linears inside the layers.
            around: the same of the head and the token embedding.
            skipped: linears inside the layers that stay as they are.
            outside: linears outside the layers (the head, input and output projections) that do.

        Raises:
            BadInput: this format cannot hold such a mixture.
        """

    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """`describe`, where all linears ``quantized`` are stored in this format."""
        return self.describe(dict.fromkeys(quantized, self), {}, skipped, outside)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    @classmethod
    @abstractmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Format]]:
        """What a ``quantization_config`` of this kind declares: targets (see `Formats.of`) and their format.

        Raises:
            BadInput: it uses a feature that is not read here.
        """

    def check(self, weight: QuantizedWeight) -> None:
        """Raises ValueError for a weight of another kind than this format's: a programming error."""
        mine = (self.bits, self.group_size, self.symmetric)
        given = (weight.bits, weight.group_size, weight.symmetric)
        if mine != given:
            raise ValueError(
                f"A format of (bits, group size, symmetric) {mine} was given a weight of {given}."
            )


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises BadInput if a stored tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise BadInput(f"The tensor '{name}' has shape {tuple(tensor.shape)} where {shape} was expected.")
