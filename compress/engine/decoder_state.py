"""What a cache that grows looks like to the native step."""

from __future__ import annotations

import ctypes
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from compress.engine.decoder_plan import DecoderPlan
from compress.engine.growing_cache import GrowingLayer, Pair
from compress.kernels.cpu import decoder as native

NAME = "compress_state"
"""The attribute of a cache that holds its `CacheState`."""


class CacheState:
    """Pointers to the rooms of one cache, which stay valid until a layer moves to another room.

    Attributes:
        length: tokens in the cache.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rooms: list[Pair | None] = []
        self._cached: list[tuple[int, int]] | None = None
        self._capacity = 0
        self._step = native.Step()

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheState, ()  # pointers mean nothing in a copy

    @classmethod
    def of(cls, cache: DynamicCache) -> CacheState:
        """That of a cache, new if it has none."""
        return vars(cache).setdefault(NAME, cls())

    def ready(self, cache: DynamicCache, plan: DecoderPlan, rows: int) -> bool:
        """Make room for one more token.

        Returns:
            False if the cache is not one of this plan with as many rows, with all layers equally long.
        """
        layers: list[Any] = cache.layers
        lengths = [layer.length for layer in layers]
        self.length = lengths[0]
        if not self.length or lengths.count(self.length) != len(plan.kinds) or len(layers) != len(plan.kinds):
            return False
        rooms = [layer.rooms for layer in layers]
        known = len(rooms) == len(self._rooms) and all(map(is_, rooms, self._rooms))
        known &= self._cached is plan.cached  # of another plan, they may have another shape or dtype
        if not known or self.length >= self._capacity or self._step.rows != rows:
            return self._bind(layers, plan, rows)
        return True

    def _bind(self, layers: list[GrowingLayer], plan: DecoderPlan, rows: int) -> bool:
        rooms = [layer.reserve(1) for layer in layers]
        for (keys, values), (groups, width) in zip(rooms, plan.cached, strict=True):
            shape = (rows, groups, keys.shape[2], width)
            for room in (keys, values):
                if room.shape != shape or room.dtype != plan.dtype or room.device.type != "cpu":
                    return False
        count = len(rooms)
        self._rooms, self._cached = list(rooms), plan.cached
        self._capacity = min(keys.shape[2] for keys, _ in rooms)
        self._step = native.Step(
            rows=rows,
            keys=(ctypes.c_void_p * count)(*(keys.data_ptr() for keys, _ in rooms)),
            values=(ctypes.c_void_p * count)(*(values.data_ptr() for _, values in rooms)),
            capacity=(ctypes.c_int64 * count)(*(keys.shape[2] for keys, _ in rooms)),
        )
        return True

    def run(self, cache: DynamicCache, plan: DecoderPlan, hidden: Tensor, given: Any) -> Tensor:
        """Run the layers on hidden states [rows, 1, width], and count their tokens in the cache.

        Args:
            cache: for which this is `ready`.
            plan: of the layers.
            hidden: what `DecoderPlan.takes`.
            given: ``Given`` of each kind of layers.
        """
        output, step = torch.empty_like(hidden), self._step
        step.length, step.given = self.length, given
        step.input, step.output = hidden.data_ptr(), output.data_ptr()
        native.decode(plan.library, plan.native, step)
        for layer in cache.layers:
            layer.length += 1  # type: ignore[union-attr]
        return output
