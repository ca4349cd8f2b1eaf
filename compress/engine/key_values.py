"""Keys and values in few bits: quantized in every forward pass, and cached as codes.

`quantize_key_values` puts hooks on the attention blocks of a transformers model. After that

- a pass without a cache (training, evaluation, the streaming engine) computes with quantized keys and values;
- a cache holds packed integer codes and scales, and nothing in full precision, whether ``generate``, the
  model or the user (as an empty ``DynamicCache``) made it.

The quantizer is that of `compress.kernels.codes.minmax`. A token has one scale for its whole key vector and
one for its whole value vector (``token``), or one for each of their heads (``head``).

Where the native kernels of the CPU are in use, a few new tokens attend to the codes themselves. Everywhere
else the cached keys and values of a layer are dequantized in every pass.

Keys are quantized before the rotary embedding, as published, or after it. Codes from before it are rotated
when they are read, by the model's own function and with the cosines and sines that the model used, of which
the cache keeps one copy for all layers. So a pass with a cache computes with the same keys and values as a
pass without one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.anatomy import anatomy_of, projection_rows, sizes_of
from compress.errors import BadInput, CompressError
from compress.kernels.cache_ops import NATIVE_BITS, kv_attention, kv_quantize
from compress.kernels.codes.minmax import fake_quantize
from compress.kernels.cpu.library import library
from compress.kernels.reference.cache import dequantize, rotated

KEY = "quantized_kv_cache"
"""The section of config.json that says how keys and values are quantized. Other programs ignore it, and cache
them in full precision."""

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names of the cache among the arguments of transformers models; they differ by release and class."""


FEW_TOKENS = 8
"""The most new tokens that attend to codes. For more, dense products pay for dequantizing."""


@dataclass(frozen=True)
class KeyValueSettings:
    """How keys and values are quantized: the section `KEY` of config.json.

    Attributes:
        bits: of a code.
        scale: whether a token has one scale for its whole vector, or one for each head of it.
        position: whether keys are quantized before or after the rotary embedding.
    """

    bits: Literal[2, 3, 4, 8]
    scale: Literal["token", "head"] = "token"
    position: Literal["before-rope", "after-rope"] = "before-rope"

    @classmethod
    def of(cls, config: Any) -> KeyValueSettings | None:
        """The settings in a transformers config; None if it has no such section.

        Raises:
            BadInput: the section is not valid.
        """
        section = getattr(config, KEY, None)
        if section is None:
            return None
        allowed = {name: get_args(kind) for name, kind in get_type_hints(cls).items()}
        if not isinstance(section, Mapping) or any(
            section.get(name) not in values for name, values in allowed.items()
        ):
            raise BadInput(f"The section '{KEY}' of config.json must give {allowed}; it is {section}.")
        return cls(**{name: section[name] for name in allowed})

    def section(self) -> dict[str, Any]:
        """The section of config.json as JSON values."""
        return asdict(self)


def quantize_key_values(model: PreTrainedModel, settings: KeyValueSettings, cut: float | None = None) -> None:
    """Make a decoder compute with quantized keys and values, and cache them as codes, from now on.

    Args:
        model: on any device, the meta device included.
        settings: bits, scales and position.
        cut: limit of the straight-through gradient (see `fake_quantize`).
    """
    anatomy, config = anatomy_of(model.config), model.config
    layers = model.base_model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    blocks: list[AttentionBlock | None] = []
    for index, layer in enumerate(layers):
        linears = anatomy.linears(layer)
        if anatomy.key not in linears:  # attention was pruned away
            blocks.append(None)
            continue
        block = AttentionBlock(
            settings,
            layer.get_submodule(anatomy.attention),
            None if anatomy.key_norm is None else layer.get_submodule(anatomy.key_norm),
            sizes_of(config).head_dim,
            cut,
        )
        if settings.position == "before-rope":
            rows = projection_rows(config, index)
            for role in ("key", "value"):
                path = getattr(anatomy, role)
                linears[path].register_forward_hook(partial(block.quantize_output, role, rows[role]))
                block.projections.append(path.removeprefix(f"{anatomy.attention}."))
        blocks.append(block)
    # The module that runs the layers; it is not always the base model (OPT).
    runner = model.base_model.get_submodule(anatomy.layers.rpartition(".")[0])
    runner.register_forward_pre_hook(partial(_give_cache, blocks), with_kwargs=True)
    AttentionInterface.register("sdpa", _attention)


class AttentionBlock:
    """Quantizes the keys and values of one attention block.

    Args:
        settings: bits, scales and position.
        attention: the transformers module.
        key_norm: its norm between the key projection and the rotary embedding, if it has one.
        head_dim: width of a head.
        cut: limit of the straight-through gradient.

    Attributes:
        projections: paths in the attention module of the linears whose outputs are quantized.
        cached: whether the pass that is running has a cache.
        codes: role -> packed codes and scales of the tokens in this pass, if keys are quantized before the
            rotary embedding.
        rotation: cosines and sines of these tokens, [B or 1, T, width] each.
        turns_halves: whether the rotary embedding pairs the halves of a vector; None while it is not known.
    """

    def __init__(
        self,
        settings: KeyValueSettings,
        attention: nn.Module,
        key_norm: nn.Module | None,
        head_dim: int,
        cut: float | None,
    ) -> None:
        self.settings, self.attention, self.key_norm = settings, attention, key_norm
        self.head_dim, self.cut = head_dim, cut
        self.cache_name = _name_in(inspect.signature(attention.forward).parameters)
        # Every architecture with rotary embeddings has a function of this name in its own module.
        self.rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        self.projections: list[str] = []
        self.cached = False
        self.codes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rotation: tuple[torch.Tensor, torch.Tensor] | None = None
        self.turns_halves: bool | None = None
        attention.register_forward_pre_hook(self._before, with_kwargs=True)

    @property
    def before_rope(self) -> bool:
        return self.settings.position == "before-rope"

    def grouped(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of tokens [B, T, heads, head_dim] -> [B, T, scales per token, values per scale]."""
        return vectors.flatten(-2).unsqueeze(-2) if self.settings.scale == "token" else vectors

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize [B, heads, T, head_dim] as a cache that remembers nothing: attention takes this object for
        one in a pass without a cache."""
        return self._fake(keys), self._fake(values)

    def quantize_output(
        self, role: str, rows: torch.Tensor, linear: nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        """A hook behind a projection, fused or not: quantize the ``rows`` [heads, head_dim] of its output."""
        rows = rows.to(output.device)
        vectors = self.grouped(output[..., rows])
        if self.cached:  # the cache takes these and looks at nothing that comes of the output
            self.codes[role] = kv_quantize(vectors.detach(), self.settings.bits)
            return output
        quantized = fake_quantize(vectors, self.settings.bits, cut=self.cut)
        return output.index_copy(-1, rows.flatten(), quantized.flatten(-2))

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Packed codes and scales, by role, of the keys and values [B, heads, T, head_dim] that a cache is
        given."""
        if self.before_rope:
            codes, self.codes = self.codes, {}
            return codes
        both = {"key": keys, "value": values}
        return {
            role: kv_quantize(self.grouped(states.transpose(1, 2)), self.settings.bits)
            for role, states in both.items()
        }

    def finish(self, keys: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Normalize and rotate keys read from codes: [B, T, heads, head_dim] -> [B, heads, T, head_dim]."""
        if self.before_rope and self.key_norm is not None:
            keys = self.key_norm(keys)
        keys = keys.transpose(1, 2)
        return keys if rotation is None or self.rotate is None else self.rotate(keys, keys, *rotation)[1]

    def attends_to_codes(
        self, states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> bool:
        """Whether the native kernels can compute the attention of new tokens with these states
        [B, heads, T, head_dim], whose keys are rotated by ``rotation``."""
        config = getattr(self.attention, "config", None)
        return (
            states.device.type == "cpu"
            and states.shape[-2] <= FEW_TOKENS
            and self.settings.bits in NATIVE_BITS
            and not (self.before_rope and self.key_norm is not None)
            and not self.attention.training
            and getattr(config, "_attn_implementation", None) == "sdpa"
            and (rotation is None or self._turns_halves(rotation[0]))
            and library() is not None
        )

    def _turns_halves(self, cosines: torch.Tensor) -> bool:
        """Whether the model's rotary embedding is the one of the kernels; tried out once."""
        if self.turns_halves is None:
            assert self.rotate is not None
            numbers = torch.linspace(-1, 2, self.head_dim + 2 * cosines.shape[-1])
            parts = numbers.split([self.head_dim, cosines.shape[-1], cosines.shape[-1]])
            states, angles = parts[0].view(1, 1, 1, -1), [part.view(1, 1, -1) for part in parts[1:]]
            theirs, ours = self.rotate(states, states, *angles)[1], rotated(states, angles[0], angles[1])
            self.turns_halves = theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-6)
        return self.turns_halves

    def _fake(self, states: torch.Tensor) -> torch.Tensor:
        vectors = states.transpose(1, 2)
        quantized = fake_quantize(self.grouped(vectors), self.settings.bits, cut=self.cut)
        return quantized.reshape(vectors.shape).transpose(1, 2)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for path in self.projections:
            hooks = module.get_submodule(path)._forward_hooks.values()
            if not any(getattr(hook, "func", None) == self.quantize_output for hook in hooks):
                raise CompressError(
                    f"This model quantizes the output of '{path}' for its cache, so no adapter can be put "
                    "around it; leave it out of target_modules."
                )
        self.cached = kwargs.get(self.cache_name) is not None
        if self.before_rope:
            self.rotation = kwargs.get("position_embeddings")
            if self.cached and self.rotate is not None and self.rotation is None:
                raise CompressError(
                    f"{type(self.attention).__name__} does not get its position embeddings, so cached keys "
                    "cannot be rotated; update transformers, or quantize keys after-rope."
                )
        elif not self.cached:
            kwargs = {**kwargs, self.cache_name: self}
        return args, kwargs


class Rotations:
    """Cosines and sines [B or 1, T, width] of the cached tokens, for all layers that rotate alike.

    Attributes:
        last: the cosines of the last forward pass, by which layers find the rotations they share.
        parts: cosines and sines of all cached tokens.
    """

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, torch.Tensor] | None = None

    def extended(self, rotation: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the rotation of this forward pass, unless another layer has done it; return all of them."""
        if self.parts is None:
            self.parts = rotation
        elif self.last is not rotation[0]:
            batch = max(len(self.parts[0]), len(rotation[0]))
            cosines, sines = (
                torch.cat([part.expand(batch, -1, -1) for part in pair], dim=1)
                for pair in zip(self.parts, rotation, strict=True)
            )
            self.parts = cosines, sines
        self.last = rotation[0]
        return self.parts

    def crop(self, length: int) -> None:
        """Forget the tokens after the first ``length``."""
        if self.parts is not None:
            self.parts = self.parts[0][:, :length], self.parts[1][:, :length]


class CodedStates:
    """The keys and values of all cached tokens of a layer, for one pass.

    Args:
        layer: the cache.
        heads: of keys and values.
        dtype: of the model.
        rotation: cosines and sines by which the keys are rotated; None if they are not.
    """

    def __init__(
        self,
        layer: QuantizedLayer,
        heads: int,
        dtype: torch.dtype,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.layer, self.heads, self.dtype, self.rotation = layer, heads, dtype, rotation

    def dense(self, role: str) -> torch.Tensor:
        """Keys or values [B, heads, T, head_dim]."""
        layer, block = self.layer, self.layer.block
        packed, scales = layer.packed[role], layer.scales[role]
        vectors = dequantize(packed, scales, self.heads, block.head_dim, block.settings.bits).to(self.dtype)
        return block.finish(vectors, self.rotation) if role == "key" else vectors.transpose(1, 2)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """The attention of queries [B, heads, T, head_dim]: [B, T, heads, head_dim]."""
        packed, scales = self.layer.packed, self.layer.scales
        cosines, sines = self.rotation or (None, None)
        return kv_attention(
            query,
            packed["key"],
            scales["key"],
            packed["value"],
            scales["value"],
            cosines,
            sines,
            mask,
            heads=self.heads,
            bits=self.layer.block.settings.bits,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        )


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls for attention, in place of its own function, which gets all that is dense."""
    if not isinstance(key, CodedStates):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return key.attend(query, attention_mask, kwargs.get("scaling")), None


class QuantizedLayer(DynamicLayer):
    """The cache of one attention block: packed codes and scales.

    With sliding attention all tokens are kept, and the mask hides those outside the window. So this cache can
    be longer than that of transformers, but attention sees the same tokens.

    Args:
        block: quantizes the keys and values that are cached.
        rotations: those of the whole cache; this layer finds its own among them.
    """

    def __init__(self, block: AttentionBlock, rotations: list[Rotations]) -> None:
        super().__init__()
        self.block, self.rotations = block, rotations
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        memo.setdefault(id(self.block), self.block)  # it is the model's, which fills this one
        memo[id(self)] = copied = self.__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def _forget(self) -> None:
        self.packed: dict[str, torch.Tensor] = {}
        self.scales: dict[str, torch.Tensor] = {}
        self.length = 0
        self.mine: Rotations | None = None
        self.rotations.clear()

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append new tokens [B, heads, T, head_dim], and return the keys and values of all cached tokens:
        dense, or as `CodedStates`."""
        block = self.block
        for role, (packed, scales) in block.take(key_states, value_states).items():
            if self.length:
                packed = torch.cat([self.packed[role], packed], dim=1)
                scales = torch.cat([self.scales[role], scales], dim=1)
            self.packed[role], self.scales[role] = packed, scales
        self.length += key_states.shape[-2]
        coded = CodedStates(self, key_states.shape[1], key_states.dtype, self._rotation())
        if block.attends_to_codes(key_states, coded.rotation):
            return coded, coded
        return coded.dense("key"), coded.dense("value")

    def _rotation(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        new = self.block.rotation
        if not self.block.before_rope or new is None or self.block.rotate is None:
            return None
        if self.mine is None:
            self.mine = next((known for known in self.rotations if known.last is new[0]), None)
            if self.mine is None:
                self.mine = Rotations()
                self.rotations.append(self.mine)
        return self.mine.extended(new)

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch for beam search. All beams of a prompt have the same positions, so the rotations
        stay as they are."""
        for held in (self.packed, self.scales):
            for role, tensor in held.items():
                held[role] = tensor.index_select(0, beam_idx.to(tensor.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: ``-n`` removes n of them, and a positive number keeps so many."""
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        self.length -= removed
        for held in (self.packed, self.scales):
            for role, tensor in held.items():
                held[role] = tensor[:, : self.length]
        if self.mine is not None:
            self.mine.crop(self.length)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise CompressError("A cache of quantized keys and values cannot be rearranged.")

    batch_repeat_interleave = batch_select_indices = _refuse


def _give_cache(
    blocks: list[AttentionBlock | None], model: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A hook before the base model: make the cache it is given, or would make, hold codes."""
    assert isinstance(model, PreTrainedModel)
    name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    use_cache = kwargs.get("use_cache")
    if name is None and (model.config.use_cache if use_cache is None else use_cache):
        name = _name_in(inspect.signature(model.forward).parameters)
        kwargs = {**kwargs, name: DynamicCache(config=model.config)}
    if name is not None:
        _hold_codes(kwargs[name], blocks)
    return args, kwargs


def _hold_codes(cache: Any, blocks: list[AttentionBlock | None]) -> None:
    """Give an empty ``DynamicCache`` the layers that store codes, unless it has them.

    Args:
        cache: what the model was given.
        blocks: one for each layer of the model; None where attention was pruned away.
    """
    if any(isinstance(layer, QuantizedLayer) for layer in getattr(cache, "layers", ())):
        return
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length():
        raise CompressError(
            "This model stores keys and values as low-bit codes; give it an empty DynamicCache, or none."
        )
    rotations: list[Rotations] = []
    cache.layers = [QuantizedLayer(block, rotations) if block else DynamicLayer() for block in blocks]
    cache.layer_class_to_replicate = None


def _name_in(parameters: Mapping[str, Any]) -> str:
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise CompressError("This release of transformers gives attention no cache under a known name.")
    return name
