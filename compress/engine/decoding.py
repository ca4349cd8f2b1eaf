"""Decoding without Python for every layer: one native call runs all layers for a new token in each row.

`fuse` puts two hooks on the module that runs the layers. Everything around the layers (embeddings, masks,
rotary cosines and sines, the last norm, the head) stays transformers' own. When a step qualifies, the module
finds in place of its layers a few stand-ins that take what the layers would be given, and the last of them
runs all layers natively. Any other step, and any that turns out to be unusual, runs the layers themselves.

What is native is described by a plan (`compress.engine.decoder_plan`), which is made at the first step,
compared with the model at every step, and made again when anything in the layers has changed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from threading import get_ident
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from compress.anatomy import ROWS, Anatomy, anatomy_of
from compress.engine.at_inference import AtInference
from compress.engine.decoder_plan import DecoderPlan
from compress.engine.decoder_state import CacheState
from compress.engine.growing_cache import let_grow
from compress.engine.key_values import CACHE_NAMES, KeyValueSettings
from compress.kernels.cpu import decoder as native
from compress.kernels.cpu.library import library

log = logging.getLogger(__name__)

MOST_ROWS = 16
"""Rows of a batch up to which a step is native; with more, the layers spend their time in products anyway."""

HARMLESS = frozenset(("position_ids", "cache_position", "use_cache", *CACHE_NAMES))
"""Arguments of a layer that the native step need not look at."""


def fuse(model: PreTrainedModel) -> str | None:
    """Let a model on a CPU decode natively from now on, whatever is done to it later.

    Args:
        model: a decoder with or without a head, with linears of any kind.

    Returns:
        None; or, if it always decodes in the plain way, the reason in one sentence, which is logged too.
    """
    reason = _obstacle(model)
    if reason is not None:
        log.info("Decoding is not fused: %s", reason)
        return reason
    anatomy = anatomy_of(model.config)
    path, _, name = anatomy.layers.rpartition(".")
    runner = model.base_model.get_submodule(path)
    if fusion_of(model) is None:
        fusion = Fusion(anatomy, name)
        runner.register_forward_pre_hook(fusion.before, with_kwargs=True)
        runner.register_forward_hook(fusion.after, always_call=True)
    return None


def fusion_of(model: PreTrainedModel) -> Fusion | None:
    """What `fuse` has put on a model."""
    if getattr(ROWS.get(model.config.model_type), "kind", None) != "decoder":
        return None
    runner = model.base_model.get_submodule(anatomy_of(model.config).layers.rpartition(".")[0])
    owners = (getattr(hook, "__self__", None) for hook in runner._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Fusion)), None)


def _obstacle(model: PreTrainedModel) -> str | None:
    if getattr(ROWS.get(model.config.model_type), "kind", None) != "decoder":
        return f"Models of type {model.config.model_type} do not decode."
    if KeyValueSettings.of(model.config) is not None:
        return "The model quantizes its keys and values."
    if AtInference.of(model.config) is not None:
        return "The model unlearns at inference."
    if library() is None:
        return "There are no native kernels."
    anatomy = anatomy_of(model.config)
    layers = model.base_model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    return DecoderPlan(anatomy, model.config, layers).reason


class Fusion:
    """The hooks of one model.

    Args:
        anatomy: of the model.
        name: of the layers in the module that runs them.
    """

    def __init__(self, anatomy: Anatomy, name: str) -> None:
        self.anatomy, self.name = anatomy, name
        self.plan: DecoderPlan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "plan": None}  # it points to the memory of one model

    def forget(self) -> None:
        """Give up the plan, and with it the memory of weights that the model does not have any more."""
        self.plan = None

    def before(
        self, runner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the module that runs the layers: give it a cache that grows, and stand-ins for one step."""
        if torch.compiler.is_compiling():
            return None
        layers = runner._modules[self.name]
        assert isinstance(layers, nn.ModuleList)
        assert isinstance(runner, PreTrainedModel)
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        use_cache = kwargs.get("use_cache")
        if name is None and (runner.config.use_cache if use_cache is None else use_cache) and not args[1:]:
            name = next(name for name in CACHE_NAMES if name in inspect.signature(runner.forward).parameters)
            kwargs = {**kwargs, name: DynamicCache(config=runner.config)}
        if name is None or runner.training or not let_grow(kwargs[name], len(layers)):
            return args, kwargs
        if _is_one_step(args, kwargs) and not _is_watched(runner.config, kwargs):
            plan = self._current(runner.config, layers)
            if plan.reason is None:
                stand_ins = StandIns(layers, Step(plan, kwargs[name], layers))
                runner.__dict__.setdefault(self.name, stand_ins)  # not over those of another thread
        return args, kwargs

    def after(self, runner: nn.Module, *_: Any) -> None:
        """After it, whether it succeeded or not: take the stand-ins away."""
        found = runner.__dict__.get(self.name)
        if isinstance(found, StandIns) and found.owner == get_ident():
            del runner.__dict__[self.name]

    def _current(self, config: Any, layers: nn.ModuleList) -> DecoderPlan:
        plan = self.plan
        if plan is None or not plan.holds(config, layers):
            plan = self.plan = DecoderPlan(self.anatomy, config, layers)
            if plan.reason is not None:
                log.info("Decoding is not fused: %s", plan.reason)
        return plan


def _is_one_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there is one new token in each row, and nothing but values is wanted of it."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((tensor for tensor in given if tensor is not None), None)
    return (
        type(tokens) is Tensor
        and tokens.ndim > 1
        and tokens.shape[1] == 1
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _is_watched(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the states between layers are asked for."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


class StandIns(list[nn.Module]):
    """The layers of a model, which show the thread that a step belongs to its stand-ins once.

    A thread that runs the same model at the same time sees the layers.
    """

    def __init__(self, layers: nn.ModuleList, step: Step) -> None:
        super().__init__(layers)
        self.owner = get_ident()
        self._step: Step | None = step

    def __iter__(self) -> Iterator[Any]:
        return iter(self._now())

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        return self._now() if index == slice(None, len(self), None) else super().__getitem__(index)

    def _now(self) -> list[Any]:
        step = self._step
        if step is None or self.owner != get_ident():
            return super().__getitem__(slice(None))
        self._step = None
        return [step] * step.plan.stand_ins


class Step:
    """Takes what the layers are given, one after the other, and runs all layers at the last stand-in.

    Args:
        plan: of the layers.
        cache: whose layers grow.
        layers: themselves, if the step turns out to be unusual.
    """

    def __init__(self, plan: DecoderPlan, cache: DynamicCache, layers: nn.ModuleList) -> None:
        self.plan, self.cache, self.layers = plan, cache, layers
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        if len(self.calls) < self.plan.stand_ins:
            return hidden
        made = self._native(hidden)
        return self._plain(hidden) if made is None else made

    def _plain(self, hidden: Any) -> Any:
        for layer, kind in zip(self.layers, self.plan.kinds, strict=True):
            args, kwargs = self.calls[self.plan.first[kind]]
            hidden = layer(hidden, *args, **kwargs)
        return hidden

    def _native(self, hidden: Tensor) -> Tensor | None:
        """The hidden states behind the last layer; None if the step is unusual, and nothing was changed."""
        plan, state = self.plan, CacheState.of(self.cache)
        rows = hidden.shape[0]
        if rows > MOST_ROWS or not plan.takes(hidden) or not state.ready(self.cache, plan, rows):
            return None
        given = (native.Given * len(plan.first))()
        for to, index in zip(given, plan.first, strict=True):
            args, kwargs = self.calls[index]
            named = {**dict(zip(plan.argument_names, args, strict=False)), **kwargs}
            if not _describe(to, named, hidden, state.length + 1, plan.head_dim):
                return None
        return state.run(self.cache, plan, hidden, given)


def _describe(to: native.Given, named: dict[str, Any], hidden: Tensor, tokens: int, head_dim: int) -> bool:
    """Describe mask and rotation of the layers of one kind; False if anything they are given is unusual."""
    mask, rotation = named.pop("attention_mask", None), named.pop("position_embeddings", None)
    if any(value not in (None, False) for name, value in named.items() if name not in HARMLESS):
        return False
    if mask is not None:
        if not _fits(mask, hidden, 4, (1, 1, tokens), (torch.bool, hidden.dtype)):
            return False
        to.mask_kind = native.BOOLEAN if mask.dtype is torch.bool else native.ADDITIVE
        to.mask, to.mask_stride = mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0
    if rotation is not None:
        cosines, sines = rotation
        width = cosines.shape[-1]
        same = cosines.shape == sines.shape and cosines.stride() == sines.stride() and not width % 2
        if not (same and width <= head_dim and _fits(cosines, hidden, 3, (1, width), (hidden.dtype,))):
            return False
        to.rotated, to.rotation_stride = width, cosines.stride(0) if cosines.shape[0] > 1 else 0
        to.cosines, to.sines = cosines.data_ptr(), sines.data_ptr()
    return True


def _fits(
    tensor: Any, hidden: Tensor, ndim: int, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> bool:
    """Whether it is a tensor [rows or 1, *shape] beside the hidden states whose last axis is dense."""
    return (
        type(tensor) is Tensor
        and tensor.ndim == ndim
        and tensor.dtype in dtypes
        and tensor.device == hidden.device
        and tensor.shape[0] in (1, hidden.shape[0])
        and tensor.shape[1:] == shape
        and (tensor.stride(-1) == 1 or shape[-1] == 1)
    )
