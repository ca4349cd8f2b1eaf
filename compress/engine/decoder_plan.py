"""The native description of a model's layers, and whether it still fits them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers import activations as hf

from compress.anatomy import Anatomy, layer_shapes, projection_rows, sizes_of
from compress.kernels.cpu import decoder as native
from compress.kernels.cpu.library import library
from compress.kernels.cpu.linear import TYPES
from compress.kernels.layers.native import native_linear

ACTIVATIONS: dict[type[nn.Module], int] = {
    hf.SiLUActivation: native.SILU,
    nn.SiLU: native.SILU,
    hf.GELUActivation: native.GELU,
    hf.GELUTanh: native.GELU_TANH,
    hf.NewGELUActivation: native.GELU_NEW,
    hf.FastGELUActivation: native.GELU_FAST,
    hf.QuickGELUActivation: native.GELU_QUICK,
    nn.ReLU: native.RELU,
}
PASSIVE = "transformers.utils.output_capturing"
"""Hooks of this module do nothing unless the states between layers are asked for."""


class Unfusable(Exception):
    """Why layers cannot run natively: a sentence."""


class Snapshot:
    """What layers consist of, to notice when anything is replaced, moved, hooked or wrapped.

    It is compared at every token, so it is made of few lists that Python compares without running our code.
    The memory of buffers is not looked at, because modules that move theirs replace them.
    """

    def __init__(self, config: PretrainedConfig, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.modules = list(layers.modules())
        self._parts = [part for m in self.modules for part in (m._modules, m._parameters, m._buffers) if part]
        self._values = [dict(part) for part in self._parts]
        self._sized = [
            part for m in self.modules for part in (vars(m), m._forward_hooks, m._forward_pre_hooks)
        ]
        self._sizes = list(map(len, self._sized))
        self._linears: list[Any] = [module for module in self.modules if hasattr(module, "activations")]
        self._activations = [linear.activations for linear in self._linears]
        self.parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        self.tensors = [
            *self.parameters,
            *(b for m in self.modules for b in m._buffers.values() if b is not None),
        ]
        self._pointers = list(map(Tensor.data_ptr, self.parameters))
        self._attention = config._attn_implementation

    def same(self, config: PretrainedConfig, layers: nn.ModuleList) -> bool:
        """Whether everything is as it was."""
        return (
            layers is self.layers
            and self._same_values()
            and list(map(len, self._sized)) == self._sizes
            and list(map(Tensor.data_ptr, self.parameters)) == self._pointers
            and [linear.activations for linear in self._linears] == self._activations
            and config._attn_implementation == self._attention
        )

    def _same_values(self) -> bool:
        try:
            return self._parts == self._values  # values that are the same object are not compared
        except (RuntimeError, TypeError):  # tensors that are not the same
            return False


class DecoderPlan:
    """The native description of the layers of one model, as they are now.

    Args:
        anatomy, config: of the model.
        layers: of the model.

    Attributes:
        reason: why these layers cannot run natively, in a sentence; None if they can. Only then the others
            are there.
        native: the description.
        library: that runs it.
        dtype: of hidden states, keys and values.
        head_dim: width of a head.
        cached: for each layer the heads and the width of the keys in its cache.
        kinds: for each layer the number of its kind. Layers of one kind are given the same mask and rotation.
        first: for each kind its first layer.
        stand_ins: layers from the first one on that cover all kinds.
        argument_names: of a layer after the hidden states, in the order of positions.
    """

    def __init__(self, anatomy: Anatomy, config: PretrainedConfig, layers: nn.ModuleList) -> None:
        self.reason: str | None = None
        self._snapshot = Snapshot(config, layers)
        self._kept: list[Any] = []
        self._anatomy, self._shapes = anatomy, layer_shapes(config)
        try:
            self._build(config, layers)
        except Unfusable as reason:
            self.reason = str(reason)

    def holds(self, config: PretrainedConfig, layers: nn.ModuleList) -> bool:
        """Whether nothing has changed since."""
        return self._snapshot.same(config, layers) and (self.reason is not None or self.library is library())

    def takes(self, hidden: Any) -> bool:
        """Whether these are hidden states of one token in each row, and no gradient is wanted of them."""
        return (
            type(hidden) is Tensor
            and hidden.dtype == self.dtype
            and hidden.shape[1:] == (1, self.native.width)
            and hidden.device.type == "cpu"
            and hidden.is_contiguous()
            and not (
                torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *self._snapshot.parameters))
            )
        )

    def _build(self, config: PretrainedConfig, layers: nn.ModuleList) -> None:
        if any(tensor.device.type != "cpu" for tensor in self._snapshot.tensors):
            raise Unfusable("Its weights are not on the CPU.")
        _check_modules(self._snapshot.modules)
        found = library()
        if found is None:
            raise Unfusable("There are no native kernels.")
        sizes = sizes_of(config)
        if len(layers) != len(self._shapes) or config.num_hidden_layers != len(layers):
            raise Unfusable("The model does not have as many layers as its config says.")
        self.library, self.head_dim = found, sizes.head_dim
        self.dtype = next(t.dtype for t in self._snapshot.tensors if t.is_floating_point())
        names = getattr(config, "layer_types", None) or ["all"] * len(layers)
        unique = list(dict.fromkeys(names))
        self.kinds = [unique.index(name) for name in names]
        self.first = [self.kinds.index(kind) for kind in range(len(unique))]
        self.stand_ins = max(self.first) + 1
        self.argument_names = list(inspect.signature(type(layers[0]).forward).parameters)[2:]
        self.cached = [
            (shape.num_key_value_heads, sizes.head_dim) if shape.num_attention_heads else (1, 1)
            for shape in self._shapes
        ]
        described = (native.Layer * len(layers))()
        for index, layer in enumerate(layers):
            self._describe(described[index], index, layer, config)
        self.native = native.Plan(len(layers), sizes.hidden_size, TYPES[self.dtype], described)

    def _describe(self, to: native.Layer, index: int, layer: nn.Module, config: PretrainedConfig) -> None:
        anatomy, shape = self._anatomy, self._shapes[index]
        to.kind, to.norm_first, to.parallel = self.kinds[index], anatomy.norm_first, anatomy.parallel_residual
        to.groups, to.width = self.cached[index]
        rows, hidden = projection_rows(config, index), sizes_of(config).hidden_size
        for name in ("attention_norm", "mlp_norm"):
            setattr(to, name, self._norm(layer, getattr(anatomy, name), hidden))
        if shape.num_attention_heads:
            self._describe_attention(to, layer, rows, hidden)
        if shape.intermediate_size:
            self._describe_mlp(to, layer, rows, hidden)

    def _describe_attention(
        self, to: native.Layer, layer: nn.Module, rows: dict[str, Tensor], hidden: int
    ) -> None:
        anatomy = self._anatomy
        attention: Any = layer.get_submodule(anatomy.attention)
        to.heads, to.scales_query = len(rows["query"]), anatomy.scales_query
        to.scaling = _number(attention, "scaling")
        to.softcap = (getattr(attention, anatomy.softcap) or 0) if anatomy.softcap else 0
        implementation = attention.config._attn_implementation
        to.eager = implementation == "eager"
        if implementation not in ("eager", "sdpa") or (to.softcap and not to.eager):
            raise Unfusable(f"Its attention is computed by '{implementation}'.")
        if to.eager and getattr(attention, "reorder_and_upcast_attn", False):
            raise Unfusable("Its attention is computed in float32 (reorder_and_upcast_attn).")
        roles = ("query", "key", "value")
        self._describe_inputs(to, layer, roles, rows, hidden, ("project", "project_bias", "projections"))
        self._describe_output(to, layer, anatomy.attention_output, rows["query"].numel(), hidden, "output")
        for name, width in (
            ("post_attention_norm", hidden),
            ("query_norm", self.head_dim),
            ("key_norm", self.head_dim),
        ):
            setattr(to, name, self._norm(layer, getattr(anatomy, name), width))

    def _describe_mlp(self, to: native.Layer, layer: nn.Module, rows: dict[str, Tensor], hidden: int) -> None:
        anatomy = self._anatomy
        to.neurons = len(rows["up"])
        module = layer.get_submodule(anatomy.activation)
        if type(module) not in ACTIVATIONS or type(getattr(module, "act", None)).__name__ == "method":
            raise Unfusable(f"There is no native activation '{type(module).__name__}'.")
        to.activation = ACTIVATIONS[type(module)]
        to.gate.linear = -1
        roles = ("up",) if anatomy.gate is None else ("gate", "up")
        self._describe_inputs(to, layer, roles, rows, hidden, ("input", "input_bias", "inputs"))
        self._describe_output(to, layer, anatomy.down, to.neurons, hidden, "down")
        to.post_mlp_norm = self._norm(layer, anatomy.post_mlp_norm, hidden)

    def _describe_inputs(
        self,
        to: native.Layer,
        layer: nn.Module,
        roles: Sequence[str],
        rows: dict[str, Tensor],
        hidden: int,
        names: tuple[str, str, str],
    ) -> None:
        """Linears that read the input of a block, and where the vectors of its roles are in their results."""
        linears, biases, count = names
        paths = [getattr(self._anatomy, role) for role in roles]
        unique = list(dict.fromkeys(paths))
        setattr(to, count, len(unique))
        for number, path in enumerate(unique):
            wanted = sum(
                rows[role].numel() for role, other in zip(roles, paths, strict=True) if other == path
            )
            linear, bias = self._linear(layer, path, (wanted, hidden))
            getattr(to, linears)[number], getattr(to, biases)[number] = linear, bias
        for role, path in zip(roles, paths, strict=True):
            setattr(to, role, _place(rows[role], unique.index(path)))

    def _describe_output(
        self, to: native.Layer, layer: nn.Module, path: str, columns: int, hidden: int, name: str
    ) -> None:
        linear, bias = self._linear(layer, path, (hidden, columns))
        setattr(to, name, linear)
        setattr(to, f"{name}_bias", bias)

    def _linear(self, layer: nn.Module, path: str, shape: tuple[int, int]) -> tuple[Any, int | None]:
        """A pointer to the native description of a linear [out, in], and the address of its bias."""
        module = layer.get_submodule(path)
        linear = native_linear(module, self.dtype)
        if linear is None:
            raise Unfusable(f"There is no native kernel for '{path}' ({type(module).__name__}).")
        if (linear.rows, linear.columns) != shape:
            raise Unfusable(f"'{path}' does not have the size that the config gives.")
        self._kept.append(linear)
        return native.LinearPointer(linear), self._vector(module.bias, shape[0])

    def _norm(self, layer: nn.Module, path: str | None, width: int) -> native.Norm:
        module = None if path is None else layer.get_submodule(path)
        if module is None or isinstance(module, nn.Identity):
            return native.Norm()
        epsilon, weight = _number(module, "variance_epsilon", "eps"), self._vector(module.weight, width)
        if type(module) is nn.LayerNorm:
            return native.Norm(native.LAYER_NORM, epsilon, 0, weight, self._vector(module.bias, width))
        kind, offset = type(module), self._anatomy.norm_offset
        if (
            not kind.__name__.endswith("RMSNorm")
            or not kind.__module__.startswith("transformers.")
            or not weight
        ):
            raise Unfusable(f"There is no native norm '{kind.__name__}'.")
        return native.Norm(native.RMS_OFFSET if offset else native.RMS, epsilon, offset, weight, None)

    def _vector(self, tensor: Any, length: int) -> int | None:
        """The address of a norm's weight or of a bias, if there is one."""
        if tensor is None:
            return None
        if tensor.dtype != self.dtype or tensor.shape != (length,) or not tensor.is_contiguous():
            raise Unfusable("Its norms and biases are not vectors of one dtype.")
        return tensor.data_ptr()


def _check_modules(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", "") != PASSIVE for hook in hooks) or "forward" in vars(module):
            raise Unfusable(f"Something watches or wraps a {type(module).__name__}.")


def _number(module: nn.Module, *names: str) -> float:
    """The first attribute of these names, which is a number."""
    value = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if not isinstance(value, float | int):
        raise Unfusable(f"{type(module).__name__} has no number '{names[0]}'.")
    return float(value)


def _place(rows: Tensor, linear: int) -> native.Place:
    """Where vectors are whose numbers are given: [vectors, width], or [width] for one."""
    rows = rows if rows.ndim > 1 else rows[None]
    start = int(rows[0, 0])
    stride = int(rows[1, 0]) - start if len(rows) > 1 else 0
    expected = start + stride * torch.arange(len(rows))[:, None] + torch.arange(rows.shape[1])
    if not torch.equal(rows, expected):
        raise Unfusable("The rows of its projections are not where they are expected.")
    return native.Place(linear, start, stride)
