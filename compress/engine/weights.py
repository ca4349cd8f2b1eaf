"""Transformers models whose weights come and go: built without memory, filled and emptied part by part."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from compress.anatomy.roles import ROWS, Anatomy, anatomy_of, model_class, weight
from compress.engine import pruned as pruned_module
from compress.engine.key_values import KeyValueSettings, quantize_key_values
from compress.engine.pruned import reshape
from compress.errors import BadInput, CompressError, unknown
from compress.kernels.codes.floating import FloatWeight
from compress.kernels.codes.integer import QuantizedWeight
from compress.kernels.layers.adapted import AdaptedLinear
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.float_linear import FloatLinear
from compress.kernels.layers.int8_linear import Int8Linear
from compress.kernels.layers.linear import PackedLinear, TokenQuantizedLinear
from compress.kernels.layers.nf4_linear import NF4Linear
from compress.kernels.layers.stacked import StackedLinear
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import Formats
from compress.storage.formats.llm_int8 import Int8Weight
from compress.storage.formats.nf4 import NF4Weight
from compress.storage.formats.stacks import StackFormat

LowBitLinear = PackedLinear | FloatLinear | NF4Linear | Int8Linear
LINEARS = {FloatWeight: FloatLinear, NF4Weight: NF4Linear, Int8Weight: Int8Linear}
"""The layers over weights that are not on an integer grid of groups."""

# BERT's first checkpoints call the parameters of a LayerNorm so.
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

NOT_THE_ARCHITECTURE = ("quantization_config", "auto_map", adapter.KEY)
"""Sections of config.json about how weights are stored."""

PRUNED_TYPE = "pruned_"
PRUNED_CLASS = "Pruned"
"""What stands before the model type and the class names of a model whose layers differ, so that no program
takes it for the plain architecture."""

PRUNED_FILE = "modeling_pruned.py"
CLASSES = """

from transformers import {config}, {model}


class Pruned{config}({config}):
    model_type = "pruned_{model_type}"


class Pruned{model}({model}):
    config_class = Pruned{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        reshape(self, config.pruned)
"""


def config_of(checkpoint: Checkpoint) -> PretrainedConfig:
    """The transformers config of a checkpoint, without its quantization section.

    Raises:
        BadInput: the model type is missing, unknown to transformers, or its values do not validate.
    """
    values = {k: v for k, v in checkpoint.config.items() if k not in NOT_THE_ARCHITECTURE}
    model_type = values.pop("model_type", None)
    if "pruned" in values and isinstance(model_type, str):
        model_type = model_type.removeprefix(PRUNED_TYPE)
        names = values.get("architectures") or []
        values["architectures"] = [name.removeprefix(PRUNED_CLASS) for name in names]
    if not isinstance(model_type, str):
        raise BadInput(f"{checkpoint.folder / 'config.json'} names no model_type.")
    if model_type not in CONFIG_MAPPING:
        raise unknown("model type", model_type, CONFIG_MAPPING.keys())
    try:
        config = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # transformers raises its validators' own types here
        reason = " ".join(str(error).split())
        raise BadInput(
            f"{checkpoint.folder / 'config.json'} is not a valid {model_type} config: {reason}"
        ) from None
    if _lacks_vocabulary_head(config, checkpoint):
        config.architectures = [MODEL_MAPPING[type(config)].__name__]
    return config


def _lacks_vocabulary_head(config: PretrainedConfig, checkpoint: Checkpoint) -> bool:
    """Whether an encoder's config names a vocabulary head that its files do not hold.

    Published sentence encoders keep the class they were pretrained as in their config.
    """
    if config.model_type not in ROWS or ROWS[config.model_type].kind != "encoder":
        return False
    head = anatomy_of(config).head
    return head is not None and not any(
        name.startswith(f"{head.partition('.')[0]}.") for name in checkpoint.tensors
    )


def mark_pruned(
    values: Mapping[str, Any], config: PretrainedConfig, pruned: dict[str, Any]
) -> dict[str, Any]:
    """config.json of a model whose layers differ, from that of the plain one (``values``, ``config``)."""
    model = model_class(config)
    classes = vars(modeling_auto).items()  # to list all of transformers takes half a second
    autos = sorted(
        name for name, auto in classes if name.startswith("AutoModel") and _builds(auto, config, model)
    )
    module = PRUNED_FILE.removesuffix(".py")
    return {
        **values,
        "model_type": f"{PRUNED_TYPE}{config.model_type}",
        "architectures": [f"{PRUNED_CLASS}{model.__name__}"],
        "auto_map": {"AutoConfig": f"{module}.{PRUNED_CLASS}{type(config).__name__}"}
        | dict.fromkeys(autos, f"{module}.{PRUNED_CLASS}{model.__name__}"),
        "pruned": pruned,
    }


def _builds(auto: Any, config: PretrainedConfig, model: type[PreTrainedModel]) -> bool:
    """Whether an AutoModel class makes a ``model`` of this config."""
    mapping = getattr(auto, "_model_mapping", None)  # its truth value would import every model there is
    return mapping is not None and type(config) in mapping and mapping[type(config)] is model


def modeling_source(config: PretrainedConfig) -> str:
    """The file by which transformers alone loads a model whose layers differ."""
    names = {"config": type(config).__name__, "model": model_class(config).__name__}
    text = Path(pruned_module.__file__).read_text(encoding="utf-8")
    return text + CLASSES.format(model_type=config.model_type, **names)


def skeleton(config: PretrainedConfig, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model of a config, in evaluation mode, with every parameter on the meta device (no memory) and
    every non-persistent buffer (rotary frequencies, embedding scales) computed on ``device``."""
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if names:
                for name in names:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
                model._init_weights(module)
    if (pruned := getattr(config, "pruned", None)) is not None:
        reshape(model, pruned)
    if (settings := KeyValueSettings.of(config)) is not None:
        quantize_key_values(model, settings)
    model.requires_grad_(False)
    return model.eval()


class Weights:
    """Puts the tensors of a checkpoint into the modules of a skeleton, and takes them out again.

    Linears that the checkpoint stores packed become `PackedLinear` modules, those it stores in blocks
    `StackedLinear` ones, and a packed token embedding a `PackedEmbedding`, so a quantized model runs through
    its kernels and never through a dequantized copy.
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
        self.base_prefix = f"{model.base_model_prefix}."
        quantization = checkpoint.config.get("quantization_config")
        self.stacks = StackFormat.find(quantization)
        packed = quantization if self.stacks is None else quantization.get("outside")
        self.formats: Formats | None = Formats(packed) if packed else None
        self._check_adapter()

    def find(self, name: str) -> str | None:
        """The checkpoint's spelling of a parameter name, or None if it is not there.

        Published files differ from their class in the base model's prefix, in the name of the head and in old
        names of norms, and keep one of two tied parameters.
        """
        names = [name, self.tied.get(name, name)]
        head = f"{self.anatomy.head}."
        if self.anatomy.head is not None and name.startswith(head):
            names += [f"{alias}.{name.removeprefix(head)}" for alias in self.anatomy.head_aliases]
        names += [name.replace(new, old) for new, old in OLD_NAMES.items() if name.endswith(new)]
        for spelling in names:
            for candidate in (spelling, self.base_prefix + spelling, spelling.removeprefix(self.base_prefix)):
                if candidate in self.checkpoint:
                    return candidate
        return None

    def fill(self, module: nn.Module, name: str, skip: tuple[nn.Module, ...] = ()) -> None:
        """Load all parameters below ``module``, whose full name is ``name`` ("" for the whole model).

        Raises:
            BadInput: a tensor is missing, has another shape than config.json says, or holds NaN or infinity.
        """
        made: dict[int, nn.Parameter] = {}
        packed: dict[str, LowBitLinear] = {}
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
                    # A tied parameter is one object under several names, and stays one.
                    if id(parameter) not in made:
                        value = self._read(f"{full}.{leaf}" if full else leaf, tuple(parameter.shape))
                        made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                    child._parameters[leaf] = made[id(parameter)]
            for leaf in child._buffers.keys() - child._non_persistent_buffers_set:
                if (stored := self.find(f"{full}.{leaf}")) is not None:
                    child._buffers[leaf] = self.checkpoint.read(stored).to(self.device)

    def empty(self, module: nn.Module) -> None:
        """Give the memory of all parameters below ``module`` back."""
        meta: dict[int, nn.Parameter] = {}
        # With duplicates: a tied head is also the table of the embedding, and has to go under its own name.
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
            raise BadInput(f"The model in '{self.checkpoint.folder}' lacks the tensor '{name}'.")
        tensor = self.checkpoint.read(stored)
        if tuple(tensor.shape) != shape:
            raise BadInput(
                f"The tensor '{stored}' has shape {list(tensor.shape)} where config.json asks for "
                f"{list(shape)}."
            )
        if tensor.is_floating_point():
            if not all_finite(tensor):
                raise BadInput(f"The tensor '{stored}' holds NaN or infinite values.")
            tensor = tensor.to(self.dtype)
        return tensor.to(self.device)

    def _packed(self, full: str) -> str | None:
        """The stored spelling of a packed module's name, or of the one it is tied to; None if neither is
        stored packed."""
        if self.formats is None:
            return None
        tied = self.tied.get(f"{full}.weight", "").removesuffix(".weight")
        for name in filter(None, (full, tied)):
            if (stored := self.find(f"{name}.{self.formats.marker}")) is not None:
                return stored.removesuffix(f".{self.formats.marker}")
        return None

    def _read_packed(self, stored: str, full: str, module: nn.Module) -> LowBitLinear:
        """The packed weight ``stored`` of a linear or an embedding, without a bias."""
        form = self.formats.of(stored, "Embedding" if isinstance(module, nn.Embedding) else "Linear")
        packed = form.read(stored, self.checkpoint.read)
        if (wanted := tuple(weight(module).shape)) != packed.shape:
            raise BadInput(f"'{full}' is {list(packed.shape)} where config.json asks for {list(wanted)}.")
        if not isinstance(packed, QuantizedWeight):
            return LINEARS[type(packed)](packed).to(self.device)
        if f"{full}{adapter.A}" in self.checkpoint:
            return self._adapted(packed, full).to(self.device)
        if form.activation_bits is None or isinstance(module, nn.Embedding):
            return PackedLinear.from_quantized(packed).to(self.device)
        linear = TokenQuantizedLinear.from_quantized(packed).to(self.device)
        linear.activation_bits = form.activation_bits
        return linear

    def _adapted(self, packed: QuantizedWeight, full: str) -> AdaptedLinear:
        """A packed linear with its adapter."""
        settings, (rows, columns) = self.checkpoint.config[adapter.KEY], packed.shape
        adapted = AdaptedLinear.from_quantized(packed)
        adapted.adapt(
            self._read(f"{full}{adapter.A}", (settings["r"], columns)),
            self._read(f"{full}{adapter.B}", (rows, settings["r"])),
            adapter.scaling(settings),
        )
        return adapted

    def _check_adapter(self) -> None:
        """Raises BadInput for an adapter of anything but packed linears of the layers."""
        inside = self.packable - {self.embedding, self.anatomy.head}
        for name in filter(adapter.is_adapter, self.checkpoint.tensors):
            linear = adapter.linear_of(name)
            if linear not in inside or self._packed(linear) is None:
                raise BadInput(
                    f"The adapter has weights for '{linear}', which is no packed linear of the layers."
                )

    def _packed_module(self, packed: LowBitLinear, full: str, module: nn.Module) -> nn.Module:
        """What takes the place of ``module``, which has that weight."""
        new: LowBitLinear | PackedEmbedding = packed
        if isinstance(module, nn.Embedding):
            new = PackedEmbedding(packed, self.dtype, getattr(module, "embed_scale", None))
        elif module.bias is not None:
            packed.bias = self._read(f"{full}.bias", tuple(module.bias.shape))
        new._forward_hooks.update(module._forward_hooks)  # such as those that quantize keys and values
        object.__setattr__(new, "stands_for", module)
        return new

    def _stacked(self, full: str) -> str | None:
        """The stored spelling of the name of a linear in blocks, or None if it is not stored so."""
        stored = self.stacks and self.find(f"{full}.{self.stacks.marker}")
        return stored and stored.removesuffix(f".{self.stacks.marker}")

    def _stacked_linear(self, stored: str, full: str, linear: nn.Module) -> StackedLinear:
        bias = None if linear.bias is None else self._read(f"{full}.bias", tuple(linear.bias.shape))
        new = self.stacks.module(stored, tuple(weight(linear).shape), self.checkpoint, bias).to(self.device)
        object.__setattr__(new, "stands_for", linear)
        return new

    @staticmethod
    def _replace(module: nn.Module, path: str, child: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, child)


def longest_input(model: PreTrainedModel) -> int:
    """Tokens the model has positions for; RoBERTa and its like lose two of theirs to padding."""
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - module.padding_idx - 1
    return longest


def first(output: Any) -> torch.Tensor:
    """The hidden states a layer returned: some architectures wrap them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Mostly one pass: only a sum that is not asks for more."""
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Raises CompressError if ``hidden`` holds NaN or infinity."""
    if not all_finite(hidden):
        raise CompressError(
            f"{where} puts out NaN or infinite values: the model is broken or overflows there."
        )
