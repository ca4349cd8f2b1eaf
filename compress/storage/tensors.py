"""The names of dtypes, and what a checkpoint knows about a stored tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of safetensors -> dtypes."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CASTABLE = {"F64", "F32", "F16", "BF16"}
"""The dtypes that follow the dtype of the model; all others hold codes, scales or indices."""


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (in the spelling of safetensors, such as ``BF16``) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor is stored: a safetensors file, the key in it, and the dtype there."""

    file: str
    key: str
    stored_dtype: str


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares no memory with another tensor."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
