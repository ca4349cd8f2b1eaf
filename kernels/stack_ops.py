"""The operators on weights in blocks: products straight from their bits, which are read as they are stored.

``torch.ops.compress.plane_linear`` multiplies with nested codes, and ``factor_linear`` with the blocks of
BitStack (see `compress.kernels.layers.stacked`). The native kernels never store the whole weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.kernels.cpu import stacks as cpu
from compress.kernels.cpu.library import REFERENCE, kernel_name, library
from compress.kernels.cpu.linear import ACTIVATIONS, TYPES
from compress.kernels.cuda import library as cuda
from compress.kernels.cuda import linear as cuda_linear
from compress.kernels.cuda import stacks as cuda_stacks
from compress.kernels.ops import LIBRARY, expect
from compress.kernels.reference import stacks as reference

LIBRARY.define(
    "plane_linear(Tensor input, Tensor[] signs, Tensor scales, Tensor? bias, str activations) -> Tensor"
)
LIBRARY.define(
    "factor_linear(Tensor input, Tensor[] signs, Tensor[] left, Tensor[] right, Tensor? bias) -> Tensor"
)


def check_plane_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> None:
    """Make sure that the arguments of `plane_linear` fit together.

    Raises:
        ValueError: they do not.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"Activations are one of {', '.join(ACTIVATIONS)}, not '{activations}'.")
    if not 1 <= len(signs) <= cpu.MOST_PLANES - 1:
        raise ValueError(f"Nested codes have 1 to {cpu.MOST_PLANES - 1} blocks, not {len(signs)}.")
    if scales.dim() != 2 or not 1 <= scales.shape[1] <= max(1, input.shape[-1]):
        raise ValueError(
            f"There are no scales of the shape {tuple(scales.shape)} for {input.shape[-1]} columns."
        )
    out, plane = len(scales), (len(scales), -(-input.shape[-1] // 8))
    _expect_input(input)
    expect("signs", signs[0], (2, *plane), torch.uint8)
    for more in signs[1:]:
        expect("signs", more, plane, torch.uint8)
    expect("scales", scales, (out, scales.shape[1]), torch.float16)
    expect("bias", bias, (out,), *TYPES, input.dtype)


def check_factor_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> None:
    """Make sure that the arguments of `factor_linear` fit together.

    Raises:
        ValueError: they do not.
    """
    if not len(signs) == len(left) == len(right) >= 1:
        raise ValueError(f"{len(signs)}, {len(left)} and {len(right)} parts do not make up blocks.")
    if left[0].dim() != 2 or left[0].shape[1] < 1:
        raise ValueError(f"There is no left factor of the shape {tuple(left[0].shape)}.")
    width, (out, rank) = input.shape[-1], left[0].shape
    _expect_input(input)
    for plane, a, b in zip(signs, left, right, strict=True):
        expect("signs", plane, (out, -(-width // 8)), torch.uint8)
        expect("left", a, (out, rank), torch.float16)
        expect("right", b, (rank, width), torch.float16)
    expect("bias", bias, (out,), *TYPES, input.dtype)


def _expect_input(input: torch.Tensor) -> None:
    if not input.is_floating_point():
        raise ValueError(f"The input is {input.dtype}, not floating point.")
    if not input.shape[-1]:
        raise ValueError("The input has no columns.")


@torch.library.register_fake("compress::plane_linear", lib=LIBRARY)
def _plane_linear_shape(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    check_plane_linear(input, signs, scales, bias, activations)
    return input.new_empty((*input.shape[:-1], scales.shape[0]))


@torch.library.register_fake("compress::factor_linear", lib=LIBRARY)
def _factor_linear_shape(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    check_factor_linear(input, signs, left, right, bias)
    return input.new_empty((*input.shape[:-1], left[0].shape[0]))


def _plane_linear_cpu(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    native = library() if input.dtype in TYPES else None
    if native is None:
        check_plane_linear(input, signs, scales, bias, activations)
        return reference.plane_linear(input, signs, scales, bias, activations)
    tensors = (*signs, scales, bias)

    def describe() -> cpu.Linear:
        check_plane_linear(input, signs, scales, bias, activations)
        return cpu.planes(signs, scales, bias, input.shape[-1], activations, input.dtype)

    return cpu.multiply(native, input, tensors, activations, describe)


def _factor_linear_cpu(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    native = library() if input.dtype in TYPES else None
    if native is None:
        check_factor_linear(input, signs, left, right, bias)
        return reference.factor_linear(input, signs, left, right, bias)
    if len(signs) > (most := cpu.MOST_BLOCKS):
        below = _factor_linear_cpu(input.float(), signs[:most], left[:most], right[:most], bias)
        above = _factor_linear_cpu(input.float(), signs[most:], left[most:], right[most:], None)
        return (below + above).to(input.dtype)
    tensors = (*signs, *left, *right, bias)

    def describe() -> cpu.Linear:
        check_factor_linear(input, signs, left, right, bias)
        return cpu.factors(signs, left, right, bias, input.dtype)

    return cpu.multiply(native, input, tensors, "floating", describe)


def _plane_linear_cuda(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    given = (input, signs, scales, bias, activations)
    check_plane_linear(*given)
    if cuda_linear.can_multiply(input) and cuda_stacks.can_read_planes(signs, scales, input.shape[-1]):
        found = cuda.start(
            (input, *signs, scales, bias),
            lambda native, stream: cuda_stacks.multiply_planes(native, *given, stream),
        )
        if found is not None:
            return found
    return reference.plane_linear(*given)


def _factor_linear_cuda(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    given = (input, signs, left, right, bias)
    check_factor_linear(*given)
    if cuda_linear.can_multiply(input) and cuda_stacks.can_read_factors(signs, input.shape[-1]):
        found = cuda.start(
            (input, *signs, *left, *right, bias),
            lambda native, stream: cuda_stacks.multiply_factors(native, *given, stream),
        )
        if found is not None:
            return found
    return reference.factor_linear(*given)


LIBRARY.impl("plane_linear", reference.plane_linear, "CompositeExplicitAutograd")
LIBRARY.impl("plane_linear", _plane_linear_cpu, "CPU")
LIBRARY.impl("plane_linear", _plane_linear_cuda, "CUDA")
LIBRARY.impl("factor_linear", reference.factor_linear, "CompositeExplicitAutograd")
LIBRARY.impl("factor_linear", _factor_linear_cpu, "CPU")
LIBRARY.impl("factor_linear", _factor_linear_cuda, "CUDA")


def plane_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activations: str = "floating",
) -> torch.Tensor:
    """x Ŵᵀ + bias with Ŵ = s ⊙ Σ_j 2^-j S_j, without gradient.

    Args:
        input: [..., in], floating point; the result has its dtype.
        signs: one tensor of uint8 for each block, with one bit for each sign (see
            `compress.kernels.codes.packing.pack_signs`): S_0 and S_1 as [2, out, ceil(in/8)], then each S_j
            as [out, ceil(in/8)]; at most 7.
        scales: float16 [out, groups]. All groups but the last are ceil(in / groups) wide.
        bias: [out], or None.
        activations: ``floating``, or how inputs are rounded to int8 first, with a scale max|x| / 127 for each
            group of the weight (``int8-block``) or for each row (``int8-token``).

    Returns:
        [..., out].

    Raises:
        ValueError: the arguments do not fit together.
    """
    return torch.ops.compress.plane_linear(input, signs, scales, bias, activations)


def factor_linear(
    input: torch.Tensor,
    signs: Sequence[torch.Tensor],
    left: Sequence[torch.Tensor],
    right: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x Ŵᵀ + bias with Ŵ = Σ_i S_i ⊙ (a_i b_i), without gradient.

    Args:
        input: [..., in], floating point; the result has its dtype.
        signs: S of each block, uint8 [out, ceil(in/8)] (see `plane_linear`).
        left: a of each block, float16 [out, k].
        right: b of each block, float16 [k, in].
        bias: [out], or None.

    Returns:
        [..., out].

    Raises:
        ValueError: the arguments do not fit together.
    """
    return torch.ops.compress.factor_linear(input, signs, left, right, bias)


def backend_of_stacks(device: torch.device) -> str:
    """The name of the backend that multiplies with weights in blocks on ``device``."""
    return kernel_name() if device.type == "cpu" else cuda.kernel_name(device) or REFERENCE
