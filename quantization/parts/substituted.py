"""A module that computes with other parameters, so that its output can be differentiated by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class Substituted(nn.Module):
    """``module``, computing with the tensors ``given`` in the place of the parameters of these names."""

    def __init__(self, module: nn.Module, given: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.module, self.given = module, given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.given, args, kwargs)
