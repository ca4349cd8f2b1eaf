"""The operators: their schemas and shape rules. Each backend implements them in a file of its own.

``torch.ops.compress.packed_linear`` is x Ŵᵀ + bias, where Ŵ = s · (q − z), or s · table[q], stays packed. The
dtype of ``packed`` says how the codes lie:

- int32: in rows. The codes of an output row are a dense little-endian bit stream along the input axis (see
  `compress.kernels.codes.packing`). Every device multiplies with these, in plain torch.
- uint8, or float8_e4m3fn for numbers in E4M3: in strips of 16 rows (see `compress.kernels.cpu.layout`), which
  the native kernels of CPUs read.
"""

from __future__ import annotations

import torch

from compress.kernels.codes.packing import packed_width
from compress.kernels.cpu import ops as cpu
from compress.kernels.cpu.layout import STRIP, groups_of, strip_bytes, strips_of
from compress.kernels.cpu.library import REFERENCE, kernel_name
from compress.kernels.reference import ops as reference

ACTIVATIONS = ("floating", "int8-block", "int8-token")
"""How inputs are rounded before they are multiplied: not below their dtype; to int8 with one scale for each
group of the weight; to int8 with one scale for each token."""

# Library.define costs half as much per call as custom_op. That matters: every token goes through 200 linears.
LIBRARY = torch.library.Library("compress", "DEF")
LIBRARY.define(
    "packed_linear(Tensor input, Tensor packed, Tensor scales, Tensor? zeros, Tensor? table, Tensor? bias, "
    "int bits, int group_size, int out_features, str activations) -> Tensor"
)


@torch.library.register_fake("compress::packed_linear", lib=LIBRARY)
def _packed_linear_shape(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activations: str,
) -> torch.Tensor:
    _check(input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations)
    return input.new_empty((*input.shape[:-1], out_features))


def _check(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activations: str,
) -> None:
    """Raise a ValueError if the arguments of `packed_linear` do not fit together."""
    width, groups = input.shape[-1], groups_of(input.shape[-1], group_size)
    in_rows = packed.dtype == torch.int32
    strips = strips_of(out_features)
    codes = (
        (out_features, packed_width(width, bits))
        if in_rows
        else (strips, strip_bytes(width, bits, group_size))
    )
    per_group = (out_features, groups) if in_rows else (strips, groups, STRIP)
    if not 2 <= bits <= 8 or activations not in ACTIVATIONS or not input.is_floating_point():
        raise ValueError(f"There is no product of {input.dtype} and {bits} bits with {activations} inputs.")
    for name, tensor, shape, dtypes in (
        ("packed", packed, codes, (torch.int32, torch.uint8, torch.float8_e4m3fn)),
        ("scales", scales, per_group, (torch.float16, torch.bfloat16, torch.float32)),
        ("zeros", zeros, per_group, (torch.uint8,)),
        ("table", table, (2**bits,), (torch.float32,)),
        ("bias", bias, (out_features,), (input.dtype,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
            raise ValueError(
                f"'{name}' is {tensor.dtype} {list(tensor.shape)} where {' or '.join(map(str, dtypes))} "
                f"{list(shape)} was expected."
            )


def _packed_linear_cpu(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activations: str,
) -> torch.Tensor:
    """The native kernels where they are in use, for strips; else plain torch."""
    arguments = (input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations)
    if packed.dtype != torch.int32 and kernel_name() != REFERENCE and cpu.can_multiply(input.dtype):
        _check(*arguments)
        return cpu.packed_linear(*arguments)
    return reference.packed_linear(*arguments)


LIBRARY.impl("packed_linear", reference.packed_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _packed_linear_cpu, "CPU")


def packed_linear(
    input: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activations: str = "floating",
) -> torch.Tensor:
    """A linear layer with packed weights. It has no gradient; that is the business of the layers.

    Args:
        input: [..., in], floating point; the result has its dtype.
        packed: the codes: in rows, int32 [out, ceil(in·bits/32)], or in strips, [strips, bytes of a strip].
        scales: floating point, [out, groups]; of strips [strips, groups, 16].
        zeros: uint8 in the shape of ``scales``; None stands for 2^(bits−1) everywhere.
        table: float32 [2^bits], the numbers that codes stand for, in place of q − z.
        bias: [out] in the dtype of ``input``, or None.
        bits: 2 to 8.
        group_size: values in a group along the input axis; −1 for a whole row.
        out_features: rows of the weight.
        activations: how inputs are rounded, see `ACTIVATIONS`.

    Returns:
        [..., out].
    """
    return torch.ops.compress.packed_linear(
        input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations
    )


def backend_of(device: str | torch.device) -> str:
    """The name of the backend that runs linears over codes on ``device``."""
    return kernel_name() if torch.device(device).type == "cpu" else REFERENCE
