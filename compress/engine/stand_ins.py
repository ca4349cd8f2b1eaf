"""Modules that take the place of a model's layers, so that the model's own code does all the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class StandIn(nn.Module):
    """Takes a layer's place, and has the layer's attributes for code that asks for them.

    Args:
        layer: whose place it takes.
        forward: called with the layer, the hidden states and everything else the layer is given.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_forward", forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self._layer, hidden, *args, **kwargs)


def returns_tuple(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> bool:
    """Whether the layer wraps its output in a tuple, found out by running it on the meta device."""

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    args, kwargs = tree_map(to_meta, ((hidden, *args), kwargs))
    return isinstance(layer(*args, **kwargs), tuple)
