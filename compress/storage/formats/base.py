"""Formats: how a checkpoint stores linears in few bits.

A format does three things. It turns a low-bit weight into named tensors and back, bit for bit. It knows the
dtypes and shapes of these tensors without having data, so that a plan and a run cannot disagree. And it
writes and reads the ``quantization_config`` entry of config.json, which declares it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import QuantizedWeight
from compress.kernels.codes.packing import BITS
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.tensors import CASTABLE, TensorInfo

Get = Callable[[str], torch.Tensor]
"""Gives the tensor of a full name."""

Weight = TypeVar("Weight", bound=LowBitWeight)

INDICES = {"I32", "I64"}


class Format(ABC, Generic[Weight]):
    """How linears of one bit width, group size and symmetry are stored.

    Two formats are equal if they are of the same class and have the same settings.

    Args:
        bits: one of ``widths``.
        group_size: values in a group along the input axis; −1 for a whole row.
        symmetric: all zero points are 2^(bits−1) and need not be stored.

    Raises:
        BadInput: another number of bits.
    """

    name: ClassVar[str]
    """The format's ``quant_method`` in config.json."""

    marker: ClassVar[str]
    """The tensor that every linear stored in this format has: ``{linear}.{marker}``."""

    widths: ClassVar[tuple[int, ...]] = BITS
    """The numbers of bits that it has."""

    any_length: ClassVar[tuple[str, ...]] = ()
    """The ends of names of tensors whose length is not known before they are read."""

    activation_bits: int | None = None
    """Bits of the inputs of linears if these are quantized per token, else None."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of linears are rounded when these run."""
        return self.activation_bits is not None

    def __init__(self, bits: int, group_size: int, symmetric: bool) -> None:
        if bits not in self.widths:
            *others, last = map(str, self.widths)
            raise BadInput(
                f"The format {self.name} has no weights of {bits} bits; use {', '.join(others)} or {last}."
            )
        if not isinstance(group_size, int):
            raise BadInput(f"The format {self.name} has groups of whole numbers of values, not {group_size}.")
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    @abstractmethod
    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the scales of a weight of dtype ``weight_dtype`` are stored."""

    @abstractmethod
    def tensors(self, name: str, weight: Weight) -> dict[str, torch.Tensor]:
        """What the checkpoint holds in place of ``{name}.weight``: full names -> tensors.

        Raises:
            ValueError: the weight is not of this format's kind, which is a programming error.
            BadInput: a weight of this shape cannot be stored.
        """

    @abstractmethod
    def tensor_infos(self, name: str, shape: tuple[int, int], weight_dtype: str) -> dict[str, TensorInfo]:
        """The dtypes and shapes of `tensors` for a linear of ``shape`` (out, in).

        Args:
            name: full name of the linear.
            shape: (out, in).
            weight_dtype: of the original weight, in the spelling of safetensors such as ``BF16``.

        Raises:
            BadInput: a weight of this shape cannot be stored.
        """

    def check_stored(self, name: str, shape: tuple[int, int], stored: Mapping[str, TensorInfo]) -> None:
        """Make sure, by names, dtypes and shapes alone, that `read` finds the tensors of a linear.

        Args:
            name: full name of the linear.
            shape: (out, in).
            stored: full name -> dtype and shape, of all tensors of the checkpoint.

        Raises:
            BadInput: one is missing, or of another dtype or shape.
        """
        for key, wanted in self.tensor_infos(name, shape, "F32").items():
            if (found := stored.get(key)) is None:
                raise BadInput(f"'{name}' is packed, and lacks the tensor '{key}'.")
            # Programs differ in the dtypes of scales, and of indices, which have one axis.
            free = CASTABLE if wanted.dtype in CASTABLE else INDICES if len(wanted.shape) == 1 else set()
            if found.dtype not in {wanted.dtype, *free}:
                raise BadInput(f"The tensor '{key}' is {found.dtype} where {wanted.dtype} was expected.")
            if found.shape != wanted.shape and not key.endswith(self.any_length):
                raise BadInput(
                    f"The tensor '{key}' has shape {found.shape} where {wanted.shape} was expected."
                )

    @abstractmethod
    def read(self, name: str, get: Get) -> Weight:
        """The inverse of `tensors`.

        Args:
            name: full name of the linear, such as ``model.layers.0.mlp.up_proj``.
            get: gives the tensor of a full name.

        Raises:
            BadInput: the tensors do not fit together, or use a feature that is not supported.
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
            around: full name -> format of the head and the token embedding, where they are packed.
            skipped: linears inside the layers that are not packed.
            outside: linears outside the layers (the head, input and output projections) that are not packed.

        Raises:
            BadInput: this format cannot declare such a mixture.
        """

    @classmethod
    @abstractmethod
    def groups_of(cls, config: Mapping[str, Any]) -> list[tuple[list[str], Self]]:
        """What a ``quantization_config`` of this kind declares: lists of targets and the format of each.

        Targets are explained in `compress.storage.formats.table.Formats.of`.

        Raises:
            BadInput: it uses a feature that is not supported.
        """

    def quantization_config(
        self, quantized: Sequence[str], skipped: Sequence[str] = (), outside: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The result of `describe` if all linears ``quantized`` are stored in this format."""
        return self.describe(dict.fromkeys(quantized, self), {}, skipped, outside)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


class IntegerFormat(Format[Any]):
    """A format of integer codes with scales and zero points.

    Its weights are `QuantizedWeight`; GPTQ also has `AffineWeight`, where groups or zero points are others
    than config.json says.
    """

    def check(self, weight: QuantizedWeight) -> None:
        """Make sure that a weight is of this format's kind.

        Raises:
            ValueError: it is not.
        """
        mine = (self.bits, self.group_size, self.symmetric)
        given = (weight.bits, weight.group_size, weight.symmetric)
        if mine != given:
            raise ValueError(
                f"A format of (bits, group size, symmetric) {mine} was given a weight of {given}."
            )


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Make sure that a stored tensor has the right shape.

    Raises:
        BadInput: it has another one.
    """
    if tuple(tensor.shape) != shape:
        raise BadInput(f"The tensor '{name}' has shape {tuple(tensor.shape)} where {shape} was expected.")
