"""Names of dtypes, and where a stored tensor is."""

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
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASTABLE = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype (safetensors spelling, such as ``BF16``) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor lies: the key in a safetensors file, and the dtype it was stored with there."""

    file: str
    key: str
    stored_dtype: str


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares no memory with anything."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
