"""How the native kernels see a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.kernels.codes.floating import GROUP_SIZES
from compress.kernels.codes.nf4 import BLOCK_SIZE
from compress.kernels.cpu.linear import DENSE, TYPES, Linear, strips_linear
from compress.kernels.cpu.stacks import MOST_BLOCKS, MOST_PLANES, factors, planes
from compress.kernels.layers.float_linear import FloatLinear
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.kernels.layers.nf4_linear import NF4Linear
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackedLinear


def native_linear(module: nn.Module, dtype: torch.dtype) -> Linear | None:
    """The native description of a linear without its bias, which points to the memory of its tensors.

    Args:
        module: of any class.
        dtype: of its inputs.

    Returns:
        None if the kernels cannot do exactly what the layer does, where its weight is.
    """
    kind = type(module)
    if dtype not in TYPES:
        return None
    if isinstance(module, nn.Linear | Conv1D) and kind in (nn.Linear, Conv1D):
        weight = module.weight.detach()
        return _dense(weight.T if kind is Conv1D else weight, dtype)
    if isinstance(module, StackedLinear):
        return _stack(module, dtype)
    if not getattr(module, "in_strips", False):
        return None
    if isinstance(module, PackedLinear) and (
        kind is PackedLinear or (kind is TokenQuantizedLinear and module.activations == "int8-token")
    ):
        packed = (module.packed, module.scales, module.zeros, None)
        return _strips(module, packed, module.bits, module.group_size, dtype)
    if (
        isinstance(module, FloatLinear) and module.float_type != "fp8"
    ):  # else inputs are rounded to E4M3 before
        tensors = (module.codes, module.scales, None, module.table)
        return _strips(module, tensors, module.bits, GROUP_SIZES[module.float_type], dtype)
    if isinstance(module, NF4Linear):
        return _strips(module, (module.codes, module.kernel_scales, None, module.table), 4, BLOCK_SIZE, dtype)
    return None


def _dense(weight: Tensor, dtype: torch.dtype) -> Linear | None:
    """Describe a dense weight [out, in], which may be a transpose."""
    rows, columns = weight.shape
    if weight.dtype != dtype or weight.device.type != "cpu" or type(weight) is not Tensor:
        return None
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        return None
    return Linear(
        kind=DENSE,
        rows=rows,
        columns=columns,
        group=1 if weight.is_contiguous() else rows,
        scale_type=TYPES[dtype],
        type=TYPES[dtype],
        blocks=1,
        codes=(weight.data_ptr(),),
    )


def _stack(module: StackedLinear, dtype: torch.dtype) -> Linear | None:
    if module.device.type != "cpu" or not all(t.is_contiguous() for t in module.buffers()):
        return None
    if isinstance(module, PlaneStack) and len(module.blocks) < MOST_PLANES:
        scales, signs = module.stack()[0].part("scales"), module.parts_of("signs")
        return planes(signs, scales, None, module.in_features, module.activations, dtype)
    if isinstance(module, FactorStack) and len(module.blocks) <= MOST_BLOCKS:
        signs, left, right = (module.parts_of(name) for name in module.parts(0))
        return factors(signs, left, right, None, dtype)
    return None


def _strips(
    module: PackedLinear | FloatLinear | NF4Linear,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Linear | None:
    """Describe a weight in strips by its codes, scales, zero points and table."""
    codes, scales, zeros, table = tensors
    if scales is None or codes.device.type != "cpu":
        return None
    shape = module.out_features, module.in_features
    return strips_linear(
        codes, scales, zeros, table, None, bits, group_size, shape, module.activations, dtype
    )
