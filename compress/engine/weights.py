"""Load the weights of a model, or of parts of it, from a checkpoint into modules without memory, and free
them again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.anatomy import Anatomy, anatomy_of, weight
from compress.engine.adjusting import Measured
from compress.engine.checks import all_finite
from compress.errors import BadInput
from compress.kernels.codes.affine import AffineWeight
from compress.kernels.codes.floating import FloatWeight
from compress.kernels.codes.int8 import Int8Weight
from compress.kernels.codes.integer import QuantizedWeight
from compress.kernels.codes.nf4 import NF4Weight
from compress.kernels.codes.weight import LowBitWeight
from compress.kernels.layers.adapted import AdaptedLinear
from compress.kernels.layers.affine_linear import AffineLinear
from compress.kernels.layers.base import CodedLinear, LowBitLinear
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.float_linear import FloatLinear
from compress.kernels.layers.int8_linear import Int8Linear
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.kernels.layers.nf4_linear import NF4Linear
from compress.kernels.layers.stacked import StackedLinear
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import Format
from compress.storage.formats.stacks import StackFormat
from compress.storage.formats.table import Formats

LINEARS: dict[type[LowBitWeight], Callable[..., CodedLinear]] = {
    FloatWeight: FloatLinear,
    NF4Weight: NF4Linear,
    Int8Weight: Int8Linear,
    AffineWeight: AffineLinear,
}
"""The layers over weights that are not on an integer grid of groups."""


class Weights:
    """Puts the tensors of a checkpoint into the modules of a skeleton, and takes them out again.

    A linear that the checkpoint stores in few bits becomes a `PackedLinear` (or the layer of its number
    format), one stored in blocks a `StackedLinear`, and a packed token embedding a `PackedEmbedding`. So a
    quantized model runs through its kernels and never through a dequantized copy.

    Args:
        checkpoint: where the tensors are.
        model: a skeleton, as `skeleton` builds it.
        device: where weights go.
        dtype: of the weights that are not packed.

    Raises:
        BadInput: the architecture is not in the anatomy table, the quantization section is not one that this
            package reads, or the checkpoint has an adapter of something else than packed linears.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, device: str | torch.device, dtype: torch.dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype
        self.anatomy: Anatomy = anatomy_of(model.config)
        self.embedding = self.anatomy.in_model(self.anatomy.embeddings[0])
        self.packable = {self.embedding, self.anatomy.head} | {
            f"{self.anatomy.layer_name(index)}.{path}"
            for index in range(model.config.num_hidden_layers)
            for path in self.anatomy.linear_paths
        }
        self.tied = model.all_tied_weights_keys | {v: k for k, v in model.all_tied_weights_keys.items()}
        quantization = checkpoint.config.get("quantization_config")
        self.stacks = StackFormat.find(quantization)
        packed = quantization if self.stacks is None or quantization is None else quantization.get("outside")
        self.formats: Formats | None = Formats(packed) if packed else None
        self._check_adapter()

    def find(self, name: str) -> str | None:
        """The name that a parameter has in the checkpoint, or None if it is not there."""
        return next(iter(self.find_all(name)), None)

    def find_all(self, name: str) -> list[str]:
        """All names that a parameter has in the checkpoint, the one that is read first.

        Published files may have another name for the head. Of two tied parameters most hold one, some both.
        """
        names = [name, *([self.tied[name]] if name in self.tied else [])]
        head = f"{self.anatomy.head}."
        for full in [full for full in names if self.anatomy.head is not None and full.startswith(head)]:
            names += [f"{alias}.{full.removeprefix(head)}" for alias in self.anatomy.head_aliases]
        return [candidate for candidate in names if candidate in self.checkpoint]

    def check(self, model: PreTrainedModel) -> None:
        """Make sure, by names and shapes alone, that `fill` will find every parameter of the whole model.

        Raises:
            BadInput: the checkpoint lacks a parameter, or has one of another shape.
        """
        for full, parameter in model.named_parameters():
            module, _, leaf = full.rpartition(".")
            packed = module in self.packable and (self._packed(module) or self._stacked(module))
            if leaf == "weight" and packed and not self._stacked(module):
                self._check_packed(packed, model.get_submodule(module))
            if not packed and (stored := self.find(full)) is not None:
                _check_shape(stored, self.checkpoint.tensors[stored].shape, tuple(parameter.shape))
            elif not packed:
                raise self._lacks(full)
        for path, measured in model.named_modules():
            for leaf, buffer in measured.named_buffers() if isinstance(measured, Measured) else ():
                if (stored := self.find(f"{path}.{leaf}")) is None:
                    raise self._lacks(f"{path}.{leaf}")
                _check_shape(stored, self.checkpoint.tensors[stored].shape, tuple(buffer.shape))

    def fill(self, module: nn.Module, name: str, skip: tuple[nn.Module, ...] = ()) -> None:
        """Load all parameters of ``module`` and the modules inside it.

        Args:
            module: the model or a part of it.
            name: full name of the module; "" for the whole model.
            skip: modules whose own parameters are not loaded.

        Raises:
            BadInput: a tensor is missing, has another shape than config.json says, or holds NaN or infinity.
        """
        made: dict[int, nn.Parameter] = {}
        packed: dict[str, CodedLinear] = {}
        for path, child in list(module.named_modules()):
            full = ".".join(filter(None, (name, path)))
            if child in skip:
                continue
            if full in self.packable and (stored := self._packed(full)) is not None:
                if stored not in packed:
                    packed[stored] = self._read_packed(stored, full, child)
                self._replace(module, path, self._packed_module(packed[stored], full, child))
                continue
            if full in self.packable and (stored := self._stacked(full)) is not None:
                self._replace(module, path, self._stacked_linear(stored, full, child))
                continue
            for leaf, parameter in child.named_parameters(recurse=False):
                if parameter.device.type == "meta":
                    # A tied parameter is one object under several names. It must stay one.
                    if id(parameter) not in made:
                        value = self._read(f"{full}.{leaf}" if full else leaf, tuple(parameter.shape))
                        made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                    child._parameters[leaf] = made[id(parameter)]
            for leaf in child._buffers.keys() - child._non_persistent_buffers_set:
                if (stored := self.find(f"{full}.{leaf}")) is not None:
                    child._buffers[leaf] = self.checkpoint.read(stored).to(self.device)

    def empty(self, module: nn.Module) -> None:
        """Free the memory of all parameters of ``module`` and the modules inside it."""
        meta: dict[int, nn.Parameter] = {}
        # With duplicates: a tied head is also the table of the embedding, and is needed under its own name.
        modules = dict(module.named_modules(remove_duplicate=False))
        for path, child in modules.items():
            if isinstance(modules.get(path.rpartition(".")[0]), PackedEmbedding):
                continue
            if hasattr(child, "stands_for"):
                self._replace(module, path, child.stands_for)
                continue
            for leaf, parameter in child.named_parameters(recurse=False):
                if id(parameter) not in meta:
                    meta[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                child._parameters[leaf] = meta[id(parameter)]

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = self.find(name)
        if stored is None:
            raise self._lacks(name)
        tensor = self.checkpoint.read(stored)
        _check_shape(stored, tuple(tensor.shape), shape)
        if tensor.is_floating_point():
            if not all_finite(tensor):
                raise BadInput(f"The tensor '{stored}' holds NaN or infinite values.")
            tensor = tensor.to(self.dtype)
        return tensor.to(self.device)

    def _lacks(self, name: str) -> BadInput:
        """The error for a missing parameter, with what the user can do about it."""
        folder, advice = self.checkpoint.folder, ""
        layers = {self.anatomy.layer_index(name) for name in self.checkpoint.tensors} - {-1}
        if (index := self.anatomy.layer_index(name)) > max(layers, default=-1):
            return BadInput(
                f"config.json in '{folder}' asks for a layer {index}, but the files hold {len(layers)} "
                "layers; correct num_hidden_layers."
            )
        if self.anatomy.head is not None and name == f"{self.anatomy.head}.weight":
            advice = "; if the embedding is also the head, set tie_word_embeddings to true in config.json"
        return BadInput(f"The model in '{folder}' lacks the tensor '{name}'{advice}.")

    def _packed(self, full: str) -> str | None:
        """The name in the checkpoint of a packed module, or of the one it is tied to; None if neither is
        stored packed."""
        if self.formats is None:
            return None
        tied = self.tied.get(f"{full}.weight", "").removesuffix(".weight")
        for name in filter(None, (full, tied)):
            if (stored := self.find(f"{name}.{self.formats.marker}")) is not None:
                return stored.removesuffix(f".{self.formats.marker}")
        return None

    def _format_of(self, stored: str, module: nn.Module) -> Format:
        assert self.formats is not None
        return self.formats.of(stored, "Embedding" if isinstance(module, nn.Embedding) else "Linear")

    def _check_packed(self, stored: str, module: nn.Module) -> None:
        """Refuse (BadInput) a packed module that lacks a tensor, or has one of another dtype or shape."""
        out, width = weight(module).shape
        self._format_of(stored, module).check_stored(stored, (out, width), self.checkpoint.tensors)

    def _read_packed(self, stored: str, full: str, module: nn.Module) -> CodedLinear:
        """A linear without bias over the packed weight ``stored`` of a linear or an embedding."""
        form = self._format_of(stored, module)
        packed = form.read(stored, self.checkpoint.read)
        if (wanted := tuple(weight(module).shape)) != packed.shape:
            raise BadInput(f"'{full}' is {list(packed.shape)} where config.json asks for {list(wanted)}.")
        linear = self._linear_over(packed, form, full, isinstance(module, nn.Embedding))
        linear.storage = form
        return linear.to(self.device, self.dtype)

    def _linear_over(self, packed: LowBitWeight, form: Format, full: str, embedding: bool) -> CodedLinear:
        if not isinstance(packed, QuantizedWeight):
            return LINEARS[type(packed)](packed)
        if self.find(f"{full}{adapter.A}") is not None:
            return self._adapted(packed, full)
        if form.activation_bits is None or embedding:
            return PackedLinear.from_quantized(packed)
        linear = TokenQuantizedLinear.from_quantized(packed)
        linear.activation_bits = form.activation_bits
        return linear

    def _adapted(self, packed: QuantizedWeight, full: str) -> AdaptedLinear:
        """A linear over a packed weight, with the adapter that the checkpoint has for it."""
        settings, (rows, columns) = self.checkpoint.config[adapter.KEY], packed.shape
        adapted = AdaptedLinear.from_quantized(packed)
        adapted.adapt(
            self._read(f"{full}{adapter.A}", (settings["r"], columns)),
            self._read(f"{full}{adapter.B}", (rows, settings["r"])),
            adapter.scaling(settings),
        )
        return adapted

    def _check_adapter(self) -> None:
        """Refuse (BadInput) an adapter of anything but packed linears of the layers."""
        adapted = {adapter.linear_of(name) for name in self.checkpoint.tensors if adapter.is_adapter(name)}
        inside = self.packable - {self.embedding, self.anatomy.head} if adapted else set()
        packed = {self._packed(full) for full in inside if full is not None}
        for linear in sorted(adapted):
            if linear not in packed:
                raise BadInput(
                    f"The adapter has weights for '{linear}', which is not a packed linear of the layers."
                )

    def _packed_module(self, packed: LowBitLinear, full: str, module: nn.Module) -> nn.Module:
        """The module that takes the place of ``module``: ``packed`` with a bias, or an embedding over it."""
        new: LowBitLinear | PackedEmbedding = packed
        if isinstance(module, nn.Embedding):
            if not isinstance(packed, PackedLinear | AffineLinear):
                raise BadInput(
                    f"The embedding '{full}' is stored in a number format that only linears can have."
                )
            new = PackedEmbedding(packed, self.dtype, getattr(module, "embed_scale", None))
        elif (bias := self._read_bias(full, module)) is not None:
            packed.bias = bias
        packed.arrange()
        new._forward_hooks.update(module._forward_hooks)  # such as those that quantize keys and values
        object.__setattr__(new, "stands_for", module)
        return new

    def _stacked(self, full: str) -> str | None:
        """The name in the checkpoint of a linear that is stored in blocks, or None if it is not."""
        if self.stacks is None:
            return None
        stored = self.find(f"{full}.{self.stacks.marker}")
        return stored and stored.removesuffix(f".{self.stacks.marker}")

    def _stacked_linear(self, stored: str, full: str, linear: nn.Module) -> StackedLinear:
        assert self.stacks is not None
        out, width = weight(linear).shape
        new = self.stacks.module(stored, (out, width), self.checkpoint, self._read_bias(full, linear))
        new._forward_hooks.update(linear._forward_hooks)
        object.__setattr__(new, "stands_for", linear)
        new = new.to(self.device, self.dtype)
        new.arrange()
        return new

    def _read_bias(self, full: str, linear: nn.Module) -> torch.Tensor | None:
        if not isinstance(linear.bias, torch.Tensor):
            return None
        return self._read(f"{full}.bias", tuple(linear.bias.shape))

    @staticmethod
    def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, child)


def _check_shape(stored: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BadInput(
            f"The tensor '{stored}' has shape {list(found)} where config.json asks for {list(wanted)}."
        )
