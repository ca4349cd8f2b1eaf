"""Everything behind the layers of a model: the last norm, and the projection to the vocabulary or another
head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Head:
    """Everything behind the layers of a model, in memory as long as `StreamedModel.head` is open.

    Args:
        model: the whole model, whose layers are replaced.
        path: of the projection to the vocabulary inside the model, for a model that has one.
        behind: called with the model or its base model and hidden states [B, S, D] after the last layer;
            returns the output for them.
    """

    def __init__(
        self, model: PreTrainedModel, path: str | None, behind: Callable[[nn.Module, torch.Tensor], Any]
    ) -> None:
        self._model, self._path, self._behind = model, path, behind

    def __call__(self, hidden: torch.Tensor) -> Any:
        """The model's output (``.logits`` [B, S, V] for a causal model) for hidden states [B, S, D] after the
        last layer; it can be differentiated with respect to hidden states that require gradients."""
        return self._behind(self._model, hidden)

    @torch.no_grad()
    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input [B, S, E] of the projection to the vocabulary for hidden states [B, S, D] after the last
        layer."""
        return self._behind(self._model.base_model, hidden).to_tuple()[0]

    @property
    def projection(self) -> nn.Module:
        """The projection to the vocabulary. Some models change its output, for instance by capping it."""
        assert self._path is not None
        return self._model.get_submodule(self._path)
