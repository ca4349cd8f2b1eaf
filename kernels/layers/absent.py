"""What stands for a dense weight that is not there."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch

from compress.errors import CompressError


class AbsentWeight(torch.Tensor):
    """The face of a dense weight that is only held packed: its shape, dtype and device, and no values.

    So code that looks at ``linear.weight`` to see where and what a linear is (transformers, peft) can do so,
    and code that would compute with it, or write into it, is refused instead of being wrong.

    Args:
        shape: of the dense weight.
        dtype: in which the layer computes.
        device: where the layer is.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    @property
    def data(self) -> torch.Tensor:
        refuse()

    @data.setter
    def data(self, _: torch.Tensor) -> None:
        refuse()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentWeight({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        refuse()


def refuse() -> NoReturn:
    raise CompressError(
        "This weight is packed, and there is no dense copy of it that could be read, changed, resized or "
        "merged into; keep an adapter apart, or change the dense model and quantize that."
    )
