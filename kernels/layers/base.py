"""What all layers over low-bit weights have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import nn

from compress.kernels.codes.weight import LowBitWeight
from compress.kernels.cpu.layout import STRIP
from compress.kernels.cpu.library import kernel_name, library
from compress.kernels.cpu.pages import into_large_pages
from compress.kernels.layers.absent import AbsentWeight
from compress.kernels.ops import REFERENCE, backend_of_rows
from compress.kernels.reference.ops import linear_by_rows, row_slices


class Storage(Protocol):
    """How a checkpoint stores the weight of a layer (see `compress.storage.formats.base.Format`)."""

    @property
    def marker(self) -> str: ...
    def tensors(self, name: str, weight: Any) -> dict[str, torch.Tensor]: ...
    def read(self, name: str, get: Callable[[str], torch.Tensor]) -> LowBitWeight: ...


class LowBitLinear(nn.Linear, ABC):
    """``nn.Linear`` over a weight that stays in few bits and is not trained. Gradients flow to the inputs.

    A subclass registers the tensors of its weight as buffers and says how rows of it are dequantized. The
    state dict does not hold these, but what a checkpoint stores for them, because checkpoint formats have
    names and layouts of their own.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bias: [out], or None.
    """

    row_multiple = 1
    """The number of rows that are dequantized together is a multiple of this."""

    bias: torch.Tensor | None  # type: ignore[assignment]
    like: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which makes a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.register_buffer("like", torch.empty(0), persistent=False)  # empty: it only remembers the dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(tensor.device for name, tensor in self.named_buffers() if name not in ("bias", "like"))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Stands for the dense weight, for code that asks for its shape, dtype or device."""
        return AbsentWeight((self.out_features, self.in_features), self.like.dtype, self.device)

    @abstractmethod
    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        """Some rows of the weight: float32 [rows, in]."""

    @abstractmethod
    def to_storage(self, name: str) -> dict[str, torch.Tensor]:
        """What a checkpoint holds for the weight of this layer, called ``name``: full names -> tensors."""

    @abstractmethod
    def from_storage(self, name: str, get: Callable[[str], torch.Tensor]) -> None:
        """The inverse of `to_storage`; ``get`` gives the tensor of a full name, or raises KeyError.

        Raises:
            ValueError: the weight is of another kind or shape than that of this layer.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.to_storage(prefix.removesuffix(".")))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Not strict: the module class takes the tensors of the weight for unexpected ones.
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, False, missing_keys, unexpected_keys, error_msgs
        )
        try:
            self.from_storage(prefix.removesuffix("."), lambda key: state_dict[key].to(self.device))
        except KeyError as missing:
            missing_keys.append(missing.args[0])
        except ValueError as error:  # of another kind or shape
            error_msgs.append(str(error))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``, with a gradient for ``input`` only."""
        if torch.is_grad_enabled() and input.requires_grad:
            output = _Product.apply(input, self)
            assert isinstance(output, torch.Tensor)
            return output
        return self.product(input)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The result of `forward`, without gradient.

        A few rows of the weight are dequantized and multiplied at once, so the whole of it is never dense.
        """
        return linear_by_rows(input, self.out_features, self.dequantize_rows, self.bias, self.row_multiple)

    def row_slices(self, device: torch.device) -> Iterator[slice]:
        """The rows that are dequantized together on ``device``."""
        return row_slices(self.out_features, self.in_features, device, self.row_multiple)

    def arrange(self) -> None:
        """Lay the weight out as the native kernels read it, where they are in use; nothing if it lies so.

        What the layer represents, computes and stores stays the same.
        """

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in memory: all buffers but the bias."""
        return sum(tensor.nbytes for name, tensor in self.named_buffers() if name != "bias")

    @property
    def kernel(self) -> str:
        """The backend that runs this layer where it is."""
        return REFERENCE

    def details(self) -> dict[str, object]:
        """What the layer's representation names besides its size."""
        return {}

    def extra_repr(self) -> str:
        facts = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **self.details(),
            "bias": self.bias is not None,
        }
        return ", ".join(f"{name}={value}" for name, value in facts.items())


class _Product(torch.autograd.Function):
    """x Ŵᵀ + bias with the gradient g Ŵ for x, for which Ŵ is dequantized again.

    So nothing dense is kept for the backward pass, and inputs that a layer rounds get the gradient of those
    that it was given, as in bitsandbytes.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: LowBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,), layer = gradients, ctx.layer
        total = gradient.new_zeros((*gradient.shape[:-1], layer.in_features), dtype=torch.float32)
        for rows in layer.row_slices(gradient.device):
            total += (gradient[..., rows] @ layer.dequantize_rows(rows).to(gradient.dtype)).float()
        return total.to(gradient.dtype), None


class CodedLinear(LowBitLinear):
    """A linear whose weight is one `LowBitWeight`.

    Its codes lie as they are stored, or, once `arrange` was called, as the native kernels read them: on a CPU
    in strips of 16 rows (see `compress.kernels.cpu.layout`), on a CUDA device in canonical rows.

    Attributes:
        storage: how the checkpoint stores the weight; without it the state dict does not hold the weight.
        in_strips: whether the codes lie in strips.
        in_rows: whether `to_rows` has put them into canonical rows.
        activations: how inputs are rounded before they are multiplied, where they lie so: "floating" (not
            below their dtype), "int8-block" (int8, one scale for each group of the weight) or "int8-token"
            (int8, one scale for each token).
    """

    row_multiple = STRIP

    storage: Storage | None = None
    in_strips = False
    in_rows = False
    activations = "floating"

    def arrange(self) -> None:
        if self.in_strips or self.in_rows:
            return
        if self.device.type == "cpu" and library() is not None:
            self.in_strips = self.to_strips()
            into_large_pages(*self.buffers())
        elif backend_of_rows(self.device) != REFERENCE:
            self.in_rows = self.to_rows()

    @property
    def kernel(self) -> str:
        if self.in_rows:
            return backend_of_rows(self.device)
        if not self.in_strips:
            return REFERENCE
        rounded = {"floating": "", "int8-block": " with int8 inputs", "int8-token": " with int8 tokens"}
        return kernel_name() + rounded[self.activations]

    @abstractmethod
    def to_strips(self) -> bool:
        """Put the codes into strips. False if the kernels cannot read this weight, which stays as it is."""

    def to_rows(self) -> bool:
        """Put the codes into canonical rows. False if they lie so, or if the kernels cannot read them."""
        return False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Strips are for the CPU, and a function may move the weight elsewhere.
        if arranged := self.in_strips or self.in_rows:
            self.fill(self.quantized())
        super()._apply(fn, recurse)
        if arranged:
            self.arrange()
        return self

    @abstractmethod
    def quantized(self, rows: slice = slice(None)) -> LowBitWeight:
        """The weight, or some consecutive rows of it, as codes and scales."""

    def dequantize_rows(self, rows: slice) -> torch.Tensor:
        return self.quantized(rows).dequantize()

    @abstractmethod
    def fill(self, weight: Any) -> None:
        """Take over a weight of the same kind and shape. Its codes lie in rows then.

        Raises:
            ValueError: it is of another kind or shape.
        """

    def to_storage(self, name: str) -> dict[str, torch.Tensor]:
        return {} if self.storage is None else self.storage.tensors(name, self.quantized())

    def from_storage(self, name: str, get: Callable[[str], torch.Tensor]) -> None:
        if self.storage is not None:
            get(f"{name}.{self.storage.marker}")  # KeyError if nothing is there
            arranged = self.in_strips or self.in_rows
            self.fill(self.storage.read(name, get))
            if arranged:
                self.arrange()


def restore_dtypes(module: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Undo a change of dtype of some of a module's buffers, which would round them again; their device stays.

    Args:
        module: has just been moved or cast.
        before: name -> the buffer as it was.
    """
    for name, tensor in before.items():
        moved = module.get_buffer(name)
        if moved.dtype != tensor.dtype:
            setattr(module, name, tensor.to(moved.device))


def check_same(layer: LowBitLinear, weight: LowBitWeight, mine: object, given: object) -> None:
    """Make sure that a weight fits a layer: in shape, and in one more setting.

    Raises:
        ValueError: it does not.
    """
    shape = (layer.out_features, layer.in_features)
    if (shape, mine) != (weight.shape, given):
        raise ValueError(f"A layer of {shape}, {mine} was given a weight of {weight.shape}, {given}.")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, which do not change when a module is cast to another dtype."""
    return tensor.contiguous().view(torch.uint8)
