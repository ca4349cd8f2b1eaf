"""A pretended CUDA device, for machines that have none.

Its tensors live in the memory of the host and report the device cuda:0. What a real device would refuse is
refused, such as an operator that is given tensors of both devices. What makes a program wait for a real one
is counted: copies between host and device, and values that the host asks for. So it finds tensors that are
on the wrong device, and loops that wait too often. It computes as the CPU does, attention included, for which
torch would take another kernel elsewhere; but not where gradients are wanted. It says nothing about speed.

    with pretended_cuda() as device:
        model.to("cuda")
        ...
        assert device.counts.to_host < 10

When the block ends, everything is as it was.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)

INSIDE_TORCH = "lazy"
"""What torch's own C++ code takes the tensors for: a device that needs no driver and no thread of its own."""

TOTAL_MEMORY = 1 << 34

INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
PUTTING = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
COPYING = {aten.copy_.default, aten._to_copy.default}
JOINING = {aten.cat.default, aten.stack.default}
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
"""Operators whose result the host needs before it can go on."""
DRAWING = {
    aten.normal_.default,
    aten.uniform_.default,
    aten.exponential_.default,
    aten.bernoulli_.float,
    aten.bernoulli.default,
    aten.multinomial.default,
    aten.rand.default,
    aten.randn.default,
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.native_dropout.default,
}
"""Operators that draw random numbers. Those of a device differ from those of the CPU."""


@dataclass
class Counts:
    """How often a program did what is slow, or differs, on a real device.

    Attributes:
        to_device, to_host: copies of whole tensors.
        waits: times the host waited for a value of the device, copies to the host included.
        drawn: random numbers drawn on the device.
    """

    to_device: int = 0
    to_host: int = 0
    waits: int = 0
    drawn: int = 0

    def reset(self) -> None:
        """Begin at zero again."""
        for field in fields(self):
            setattr(self, field.name, 0)


class Memory:
    """The bytes that the tensors of the device take, each storage once, and how many they may take."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.limit = TOTAL_MEMORY
        self._owners: Counter[int] = Counter()

    def hold(self, tensor: DeviceTensor) -> None:
        """Count the storage of a new tensor, for as long as a tensor lives that has it."""
        storage = tensor.held.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._owners[place]:
            if self.allocated + size > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._owners[place] += 1
        weakref.finalize(tensor, self._let_go, place, size).atexit = False

    def _let_go(self, place: int, size: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place]
            self.allocated -= size

    def reset_peak(self, _: Any = None) -> None:
        """Let the peak begin at what is allocated now."""
        self.peak = self.allocated


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device, around the tensor ``held`` in the memory of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    counts: ClassVar[Counts] = Counts()
    memory: ClassVar[Memory] = Memory()
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=INSIDE_TORCH,
            requires_grad=False,
        )
        made.held = held
        cls.memory.hold(made)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of a real tensor: itself where nothing changes."""
        named = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, _, form = torch._C._nn._parse_to(*args, **named)
        stays = (device is None or is_device(device)) and dtype in (None, self.dtype)
        return self if stays and form is None and not kwargs.get("copy") else super().to(*args, **kwargs)

    def tolist(self) -> Any:
        self.counts.waits += 1
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {})


class PretendedCuda(TorchDispatchMode):
    """Sends every operator through `carry_out`, those included that make a tensor on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            return carry_out(func, args, kwargs or {})


def is_device(device: Any) -> bool:
    """Whether tensors there are on the pretended device.

    Raises:
        RuntimeError: it is a second CUDA device.
    """
    device = None if device is None else torch.device(device)
    if device is None or device.type not in (CUDA.type, INSIDE_TORCH):
        return False
    if device.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return True


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operator as the device would: refuse what it refuses, count what it waits for."""
    given: list[torch.Tensor] = []

    def taken_out(tensor: torch.Tensor) -> torch.Tensor:
        given.append(tensor)
        return tensor.held if isinstance(tensor, DeviceTensor) else tensor

    inside, named = _changed_by(taken_out, (args, kwargs))
    there = any(isinstance(tensor, DeviceTensor) for tensor in given)
    device = kwargs.get("device")
    if not there and not is_device(device):
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)
    if func.namespace == "compress":  # our own operators are written in others, which have rules of their own
        return _ours(func)(*args, **kwargs)
    if there:
        check_devices(func, args, given)
    goes_there = there if device is None else is_device(device)
    count(func, args, kwargs, there, goes_there)
    if device is not None and goes_there:
        named["device"] = "cpu"
    with torch._C._DisableTorchDispatch():
        result = func(*inside, **named)
    if changed := _written(func, args, kwargs):
        return changed[0] if len(changed) == 1 else tuple(changed)
    return _changed_by(_put_in, result) if goes_there else result


def check_devices(func: Any, args: Any, given: list[torch.Tensor]) -> None:
    """Refuse tensors of both devices, as CUDA does. Numbers (tensors without dimensions) may be on the CPU.

    Raises:
        RuntimeError: in the words of torch.
    """
    host = [tensor for tensor in given if not isinstance(tensor, DeviceTensor)]
    host = [tensor for tensor in host if tensor.device.type == "cpu"]
    if not host or func in COPYING:
        return
    first = args[0] if args else None
    if func in INDEXING | PUTTING:
        if not isinstance(first, DeviceTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        host = [values for values in args[2:3] if any(values is tensor for tensor in host)]
    writes = first if func._schema.is_mutable else None
    strict = (
        func in JOINING
        or func._schema.name.startswith("aten::_fused")
        or any(writes is tensor for tensor in host)
    )
    if any(strict or tensor.dim() for tensor in host):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func})"
        )


def count(func: Any, args: Any, kwargs: Mapping[str, Any], there: bool, goes_there: bool) -> None:
    """Count the copies, the waiting and the random numbers of an operator."""
    counts = DeviceTensor.counts
    to_host, to_device = 0, 0
    if func is aten._to_copy.default:
        to_host, to_device = there and not goes_there, not there and goes_there
    elif func is aten.copy_.default:
        target, source = (isinstance(tensor, DeviceTensor) for tensor in args[:2])
        to_host, to_device = source and not target, target and not source
    elif func in INDEXING | PUTTING:
        masks = [index for index in args[1] if index is not None]
        to_device = sum(not isinstance(index, DeviceTensor) for index in masks)
        number = func in PUTTING and args[2].numel() == 1  # then torch fills the places of a mask
        counts.waits += not number and any(index.dtype == torch.bool for index in masks)
    counts.to_host += to_host
    counts.to_device += to_device
    counts.waits += to_host + (func in WAITING)
    if func in DRAWING:
        counts.drawn += 1
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _changed_by(change: Callable[[torch.Tensor], Any], item: Any) -> Any:
    """What operators are given or return, with every tensor in it changed."""
    if isinstance(item, torch.Tensor):
        return change(item)
    if isinstance(item, (tuple, list)):
        return type(item)([_changed_by(change, part) for part in item])
    if isinstance(item, dict):
        return {name: _changed_by(change, part) for name, part in item.items()}
    return item


def _put_in(tensor: torch.Tensor) -> torch.Tensor:
    return DeviceTensor(tensor) if type(tensor) is torch.Tensor and tensor.device.type == "cpu" else tensor


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the operator wrote into, which are also what it returns."""
    if not func._schema.is_mutable or not func._schema.returns:
        return []
    changed = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for tensor in changed:
        if isinstance(tensor, DeviceTensor) and tensor.shape != tensor.held.shape:
            raise NotImplementedError(f"{func} changes a shape in place, which is not pretended.")
    return changed


def _ours(func: Any) -> Callable[..., torch.Tensor]:
    from compress.kernels.reference import cache, embedding, ops, stacks

    name = func._schema.name.partition("::")[2]
    return next(getattr(module, name) for module in (ops, stacks, embedding, cache) if hasattr(module, name))


class ByName(TorchFunctionMode):
    """Understands the few functions that no operator shows, because they look up the number of a device or
    make their values on the host first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            args = tuple(CUDA if _names_device(item) else item for item in args)
            kwargs = {name: CUDA if _names_device(item) else item for name, item in kwargs.items()}
        elif func is torch.Tensor.cuda:
            return args[0].to(CUDA)
        elif func in (torch.tensor, torch.as_tensor) and is_device(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(CUDA)
        elif func is scaled_dot_product_attention and not torch.is_grad_enabled():
            given = [*args, *kwargs.values()]
            if all(isinstance(item, DeviceTensor) for item in given if isinstance(item, torch.Tensor)):
                found = func(*map(_held, args), **{name: _held(item) for name, item in kwargs.items()})
                return DeviceTensor(found)
        return func(*args, **kwargs)


def _held(item: Any) -> Any:
    return item.held if isinstance(item, DeviceTensor) else item


def _names_device(item: Any) -> bool:
    return isinstance(item, (str, torch.device)) and is_device(item)


@contextmanager
def pretended_cuda() -> Iterator[SimpleNamespace]:
    """A CUDA device cuda:0 for the length of a ``with`` block.

    Yields:
        ``counts``: see `Counts`; ``memory``: see `Memory`.
    """
    counts, memory = Counts(), Memory()
    with ExitStack() as stack:
        for name, value in {
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "is_initialized": lambda: True,
            "get_device_name": lambda *_: "pretended CUDA device",
            "get_device_capability": lambda *_: (9, 0),
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (memory.limit - memory.allocated, memory.limit),
            "memory_allocated": lambda *_: memory.allocated,
            "max_memory_allocated": lambda *_: memory.peak,
            "reset_peak_memory_stats": memory.reset_peak,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Tensors made inside inference_mode cannot be wrapped; what it saves besides no_grad is time.
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        stack.enter_context(mock.patch.object(DeviceTensor, "counts", counts))
        stack.enter_context(mock.patch.object(DeviceTensor, "memory", memory))
        stack.enter_context(PretendedCuda())
        stack.enter_context(ByName())
        yield SimpleNamespace(counts=counts, memory=memory)
