"""What a model is given in a forward pass: its tokens, and where they are in their texts."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


class Pass(threading.local):
    """The pass that is running in this thread.

    Attributes:
        tokens: ids of the new tokens [B, T]; None if the model was given embeddings, or nothing runs.
        positions: for each new token the number of real tokens before it in its text, int64 [B, T].
        real: bool [B, T], False for padding.
        cache: of the tokens before, as far as the caller gave one.
        keys: what was kept of the pass, if it is watched.
        watched: whether anything is kept of it.
    """

    tokens: Tensor | None = None
    positions: Tensor | None = None
    real: Tensor | None = None
    cache: Cache | None = None
    keys: Tensor | None = None
    watched: bool = False

    def __reduce__(self) -> tuple[type[Pass], tuple[()]]:
        return Pass, ()  # a copied model runs passes of its own

    def give(self, tokens: Tensor, real: Tensor) -> None:
        """A pass over whole texts.

        Args:
            tokens: ids [B, T].
            real: bool [B, T], False for padding.
        """
        self.tokens, self.real, self.cache = tokens, real, None
        self.positions = (real.cumsum(-1) - 1).clamp(min=0)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of a model that takes ``input_ids``: find all this in its arguments.

        Positions are those that the caller gives. Without them they follow from the attention mask, and
        without one from the length of the cache.
        """
        names = inspect.signature(module.forward).parameters
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self.tokens = given.get("input_ids")
        held = self.tokens if self.tokens is not None else given.get("inputs_embeds")
        self.positions = self.real = None
        self.cache = next((value for value in given.values() if isinstance(value, Cache)), None)
        if held is None:
            return
        shape, device = held.shape[:2], held.device
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        flat = mask.to(device) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.real = torch.ones(shape, dtype=torch.bool, device=device)
        if flat is not None:
            self.real = flat[:, -shape[1] :].bool()
        if isinstance(positions, Tensor) and positions.shape[-1] == shape[1]:
            self.positions = positions.to(device).expand(shape)
        elif flat is not None:
            self.positions = (flat.long().cumsum(-1) - 1).clamp(min=0)[:, -shape[1] :]
        else:
            before = 0 if self.cache is None else int(self.cache.get_seq_length())
            self.positions = torch.arange(before, before + shape[1], device=device).expand(shape)
