"""The operators: their schemas and shape rules. Each backend implements them in a file of its own.

``torch.ops.compress.packed_linear`` is x Ŵᵀ + bias, where Ŵ = s · (q − z) stays packed. All backends take the
same canonical layout: the codes of an output row are a dense little-endian bit stream along the input axis
(see `compress.kernels.codes.packing`), int32 [out, ceil(in·bits/32)].
"""

from __future__ import annotations

import torch

from compress.kernels.reference import ops as reference

REFERENCE = "reference"
"""The name of the backend in plain torch."""

# Library.define costs half as much per call as custom_op. That matters: every token goes through 200 linears.
LIBRARY = torch.library.Library("compress", "DEF")
LIBRARY.define(
    "packed_linear(Tensor input, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
    "int group_size) -> Tensor"
)


@torch.library.register_fake("compress::packed_linear", lib=LIBRARY)
def _packed_linear_shape(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


LIBRARY.impl("packed_linear", reference.packed_linear, "CompositeExplicitAutograd")


def packed_linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """A linear layer with packed weights. It has no gradient; that is the business of the layers.

    Args:
        input: [..., in], floating point; the result has its dtype.
        packed: int32 [out, ceil(in·bits/32)].
        scales: [out, groups], floating point.
        zeros: uint8 [out, groups]; None stands for 2^(bits−1) everywhere.
        bias: [out] in the dtype of ``input``, or None.
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.

    Returns:
        [..., out].
    """
    return torch.ops.compress.packed_linear(input, packed, scales, zeros, bias, bits, group_size)


def backend_of(device: str | torch.device, bits: int) -> str:
    """The name of the backend that runs `packed_linear` for weights of ``bits`` bits on ``device``."""
    return REFERENCE
