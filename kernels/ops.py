"""The operators: their schemas and shape rules. Each backend implements them in a file of its own.

``torch.ops.compress.packed_linear`` is x Ŵᵀ + bias, where Ŵ = s · (q − z) or s · table[q] stays packed.
Weights come in one of two layouts, which dtype and shape of ``packed`` tell apart:

- int32: canonical rows. The codes of an output row are a dense little-endian bit stream along the input axis
  (see `compress.kernels.codes.packing`). All devices read it, in plain torch, by the
  CUDA kernels or by Triton. Codes of E4M3 are rows of float8_e4m3fn [out, in].
- uint8, or float8_e4m3fn for codes of E4M3: strips of 16 rows (see `compress.kernels.cpu.layout`), for the
  native kernels of the CPU. The reference reads them as well. No strips have the shape of rows.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.kernels.codes.packing import BITS, packed_width
from compress.kernels.cpu import linear as cpu
from compress.kernels.cpu.layout import STRIP, groups_of, strip_bytes, strips_of
from compress.kernels.cpu.library import REFERENCE, kernel_name, library
from compress.kernels.cuda import library as cuda
from compress.kernels.cuda import linear as cuda_linear
from compress.kernels.reference import ops as reference
from compress.kernels.triton import library as triton
from compress.kernels.triton import linear as triton_linear

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
    check_packed_linear(
        input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations
    )
    return input.new_empty((*input.shape[:-1], out_features))


def check_packed_linear(
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
    """Make sure that the arguments of `packed_linear` fit together.

    Raises:
        ValueError: they do not.
    """
    width = input.shape[-1]
    e4m3 = packed.dtype == torch.float8_e4m3fn
    if activations not in cpu.ACTIVATIONS:
        raise ValueError(f"Activations are one of {', '.join(cpu.ACTIVATIONS)}, not '{activations}'.")
    if bits not in BITS or (e4m3 and bits != 8) or (table is not None and bits not in (2, 4)):
        kind = "E4M3" if e4m3 else "integers" if table is None else "a table"
        raise ValueError(f"There are no codes of {bits} bits for {kind}.")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"A group has at least one column, not {group_size}; −1 stands for a whole row.")
    if table is not None and zeros is not None:
        raise ValueError("A table has no zero points.")
    groups, scale_types = groups_of(width, group_size), set(cpu.TYPES)
    if reference.in_rows(packed, width):
        if width % groups:
            raise ValueError(f"Groups of {group_size} do not divide rows of {width} columns.")
        if not e4m3:
            expect("packed", packed, (out_features, packed_width(width, bits)), torch.int32)
        per_group: tuple[int, ...] = (out_features, groups)
        scale_types |= {torch.uint8, torch.float8_e4m3fn}
    else:
        shape = (strips_of(out_features), strip_bytes(width, bits, group_size))
        expect("packed", packed, shape, torch.uint8, torch.float8_e4m3fn)
        per_group = (strips_of(out_features), groups, STRIP)
    expect("scales", scales, per_group, *scale_types)
    expect("zeros", zeros, per_group, torch.uint8)
    expect("table", table, (2**bits,), torch.float32)
    expect("bias", bias, (out_features,), *cpu.TYPES, input.dtype)
    if not input.is_floating_point():
        raise ValueError(f"The input is {input.dtype}, not floating point.")


def expect(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Make sure that a tensor, if there is one, has a shape and one of some dtypes.

    Raises:
        ValueError: it has not.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"'{name}' has the shape {tuple(tensor.shape)}, but {shape} fits the other arguments."
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"'{name}' is {tensor.dtype}, but should be {' or '.join(map(str, dtypes))}.")


def _packed_linear_cpu(input: torch.Tensor, packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    in_strips = not reference.in_rows(packed, input.shape[-1])
    native = library() if in_strips and input.dtype in cpu.TYPES else None
    if native is None:
        check_packed_linear(input, packed, *rest)
        return reference.packed_linear(input, packed, *rest)
    return cpu.product_of(check_packed_linear, input, packed, *rest)(input, native)


def _packed_linear_cuda(
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
    given = (input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations)
    check_packed_linear(*given)
    width = input.shape[-1]
    if cuda_linear.can_multiply(input) and cuda_linear.can_read(packed, scales, group_size, width, table):
        tensors = (input, packed, scales, zeros, table, bias)
        found = cuda.start(tensors, lambda native, stream: cuda_linear.multiply(native, *given, stream))
        if found is not None:
            return found
        found = triton.start(input.device, lambda: triton_linear.multiply(*given))
        if found is not None:
            return found
    return reference.packed_linear(*given)


LIBRARY.impl("packed_linear", reference.packed_linear, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear", _packed_linear_cpu, "CPU")
LIBRARY.impl("packed_linear", _packed_linear_cuda, "CUDA")


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
        packed: int32 [out, ceil(in·bits/32)], float8_e4m3fn [out, in], or [strips, bytes of a strip] in uint8
            or float8_e4m3fn. Strips and all that belongs to them must be contiguous.
        scales: floating point [out, groups], or [strips, groups, 16]. Those of rows may also be stored in
            bytes: float8_e4m3fn, or uint8 for exponents plus 127 (E8M0).
        zeros: uint8, in the shape of ``scales``; None stands for 2^(bits−1) everywhere.
        table: the numbers that the codes stand for, float32 [2^bits], for codes of 2 and 4 bits; or None.
        bias: [out] in the dtype of ``input``, or None.
        bits: of a code, from 2 to 8.
        group_size: columns that share a scale; −1 for a whole row. It divides ``in`` in canonical rows; in
            strips the last group may be shorter.
        out_features: out.
        activations: ``floating``, or how inputs are rounded to int8 first, with a scale max|x| / 127 for each
            group of the weight (``int8-block``) or for each row (``int8-token``).

    Returns:
        [..., out].

    Raises:
        ValueError: the arguments do not fit together.
    """
    return torch.ops.compress.packed_linear(
        input, packed, scales, zeros, table, bias, bits, group_size, out_features, activations
    )


def backend_of(device: str | torch.device) -> str:
    """The name of the backend that multiplies with codes on ``device``."""
    device = torch.device(device)
    return kernel_name() if device.type == "cpu" else backend_of_rows(device)


def backend_of_rows(device: torch.device) -> str:
    """The name of the backend that multiplies with canonical rows on ``device``."""
    return cuda.kernel_name(device) or (triton.TRITON if triton.usable(device) else REFERENCE)
