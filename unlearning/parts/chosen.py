"""Train some linears of a model, or some rows of them, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.unlearning.parts.training import HowToTrain, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_linears(
    whole: PreTrainedModel, linears: Iterable[str], options: HowToTrain, seed: int
) -> nn.Module:
    """Mark the weights of some linears as trained, or low-rank updates of them.

    Args:
        whole: the model.
        linears: full names, such as ``model.layers.3.mlp.down_proj``.
        options, seed: as in `trainable`.

    Returns:
        The model itself, or peft's model around it.
    """
    chosen = {name: whole.get_submodule(name) for name in linears}
    trained = trainable(whole, chosen, options, seed)
    if options.train == "full":
        whole.requires_grad_(False)
        for linear in chosen.values():
            linear.get_parameter("weight").requires_grad_(True)
    return trained


def train_rows(
    whole: PreTrainedModel, rows: Mapping[str, Tensor], options: HowToTrain, seed: int
) -> nn.Module:
    """The same for some rows (outputs) of linears; the gradient of all others is 0 at every step.

    AdamW without weight decay does not move a weight whose gradients are all 0, and clipping counts only the
    gradients that are left.

    Args:
        whole: the model.
        rows: full name of a linear -> bool [out], True for rows that are trained.
        options, seed: as in `trainable`.
    """
    trained = train_linears(whole, rows, options, seed)
    lora = options.train == "lora"
    for name, kept in rows.items():
        # The low-rank update is B A, and its rows are those of B.
        linear = trained.get_submodule(f"base_model.model.{name}.lora_B.default" if lora else name)
        parameter = linear.get_parameter("weight")
        mask = kept[None] if isinstance(linear, Conv1D) else kept[:, None]
        parameter.register_hook(partial(torch.mul, mask.to(parameter)))
    return trained
