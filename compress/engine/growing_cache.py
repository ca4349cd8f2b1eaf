"""A cache of keys and values that grows in place, so that a new token costs its own bytes and no copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens that a new room has space for besides those it is made for, if half of these are fewer."""

Pair = tuple[Tensor, Tensor]


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` whose keys and values are the beginnings of larger tensors, its rooms.

    With sliding attention all tokens are kept, and the mask hides those outside the window, so attention sees
    the same tokens as in a cache of transformers. What others put into ``keys`` or ``values`` is never
    written to: the next token moves it to a new room.

    Attributes:
        length: tokens in it.
        rooms: keys and values [B, heads, capacity, head_dim] each, contiguous; None before the first token,
            and while it holds what others have put into it.
    """

    def __init__(self) -> None:
        self._forget()
        super().__init__()

    def _forget(self) -> None:
        self.length = 0
        self.rooms: Pair | None = None
        self._owner = 0
        self._held: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def keys(self) -> Tensor | None:
        """[B, heads, T, head_dim]."""
        return self._held[0] if self.rooms is None else self.rooms[0][:, :, : self.length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._put(keys, self.values)

    @property
    def values(self) -> Tensor | None:
        """[B, heads, T, head_dim]."""
        return self._held[1] if self.rooms is None else self.rooms[1][:, :, : self.length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._put(self.keys, values)

    def _put(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.rooms, self._held = None, (keys, values)
        self.length = 0 if keys is None or not keys.numel() else keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append new tokens [B, heads, T, head_dim], and return the keys and values of all cached tokens."""
        tracked = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if tracked or torch.compiler.is_compiling():  # autograd and the compiler want new tensors
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, count = self.length, key_states.shape[-2]
        rooms = self._room_for(key_states, value_states)
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[:, :, before : before + count] = states
        self.length = before + count
        return rooms[0][:, :, : self.length], rooms[1][:, :, : self.length]

    def reserve(self, count: int) -> Pair:
        """Rooms with space for ``count`` more tokens. There must be some already."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return self._room_for(
            keys[:, :, :1].expand(-1, -1, count, -1), values[:, :, :1].expand(-1, -1, count, -1)
        )

    def _room_for(self, keys: Tensor, values: Tensor) -> Pair:
        """Rooms that these states fit into behind the tokens that are there; old ones where possible."""
        rooms = self.rooms
        if rooms is None or not self._fits(rooms[0], keys) or not self._fits(rooms[1], values):
            rooms = self._larger(self.keys, keys), self._larger(self.values, values)
            self.rooms, self._held, self._owner = rooms, (None, None), id(self)
        return rooms

    def _fits(self, room: Tensor, states: Tensor) -> bool:
        return (
            self._owner == id(self)  # and not a shallow copy of a layer that writes there too
            and room.shape[2] >= self.length + states.shape[2]
            and _shape(room) == _shape(states)
            and (room.dtype, room.device) == (states.dtype, states.device)
            and (not room.is_inference() or torch.is_inference_mode_enabled())
        )

    def _larger(self, held: Tensor | None, states: Tensor) -> Tensor:
        total = self.length + states.shape[2]
        room = states.new_empty((*states.shape[:2], total + max(ROOM, total // 2), states.shape[3]))
        if held is not None and self.length:
            if _shape(held) != _shape(states):
                raise ValueError(
                    f"The cache holds keys and values of (rows, heads, width) {_shape(held)}, but was given "
                    f"{_shape(states)}; use a cache for each batch."
                )
            room[:, :, : self.length] = held
        return room

    def get_seq_length(self) -> int:
        """Tokens in it."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove < 0 and self.rooms is not None:
            self.length = max(0, self.length + tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


def _shape(states: Tensor) -> tuple[int, int, int]:
    """Rows, heads and width of keys or values."""
    return states.shape[0], states.shape[1], states.shape[3]


def let_grow(cache: Any, layers: int) -> bool:
    """Give an empty ``DynamicCache`` of a decoder layers that grow in place.

    Returns:
        Whether the cache has such layers now: False for any other cache, which stays as it is.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    if cache.layers and all(type(layer) is GrowingLayer for layer in cache.layers):
        return True
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not plain or cache.get_seq_length():
        return False
    cache.layers = [GrowingLayer() for _ in range(layers)]
    cache.layer_class_to_replicate = None
    return True
