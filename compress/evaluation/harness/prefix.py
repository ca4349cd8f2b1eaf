"""The beginning that all prompts of a task share, such as its examples, is read once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compress.engine.key_values import CACHE_NAMES, KeyValueSettings

SHORTEST = 16
"""Tokens of a beginning that is worth keeping."""


class Prefix:
    """Keys and values of a shared beginning.

    Args:
        model: whose cache holds every token it has seen, so that it does not matter where padding lies.
        tokens: the beginning.
    """

    def __init__(self, model: PreTrainedModel, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens, device=model.device)
        self._name = next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)
        self._cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model.base_model(input_ids=self.tokens[None], use_cache=True, **{self._name: self._cache})

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Sequence[list[int]]) -> Self | None:
        """The beginning of some prompts, at least one token shorter than each; None if it is not worth it."""
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
        common = [tokens[0] for tokens in alike] if len(prompts) > 1 else []
        shared = common[: min(map(len, prompts), default=1) - 1]
        return cls(model, shared) if len(shared) >= SHORTEST and _keeps_all(model) else None

    def put_first(self, context: Tensor, mask: Tensor) -> dict[str, Any] | None:
        """Prompts with the beginning in front of their padding, which so has the same place in all rows.

        Args:
            context: prompts [B, T], padded on the left.
            mask: 1 where there is no padding [B, T].

        Returns:
            Arguments for ``generate``; None if a row does not begin so, because it was cut.
        """
        count, width = len(self.tokens), context.shape[1]
        rows, masks = context.clone(), mask.clone()
        for row, there, tokens in zip(rows, masks, context, strict=True):
            start = width - int(there.sum())
            if not torch.equal(tokens[start : start + count], self.tokens):
                return None
            row[count : count + start] = tokens[:start]
            row[:count] = self.tokens
            there[:count], there[count : count + start] = 1, 0
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        return {"input_ids": rows, "attention_mask": masks, self._name: cache}


def _keeps_all(model: PreTrainedModel) -> bool:
    """Whether attention sees all earlier tokens, and the cache holds them as they are."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    known = any(name in inspect.signature(model.forward).parameters for name in CACHE_NAMES)
    return plain and known and KeyValueSettings.of(config) is None and bool(model.can_generate())
