"""Transformers models that are built without memory for their weights."""

from __future__ import annotations

import sys

import torch
from transformers import PretrainedConfig, PreTrainedModel

from compress.anatomy import model_class
from compress.engine.key_values import KeyValueSettings, quantize_key_values
from compress.engine.pruned import reshape


def skeleton(config: PretrainedConfig, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model that a config describes, pruned or with quantized keys and values if the config says so.

    It is in evaluation mode. Its parameters are on the meta device and take no memory; its buffers that no
    checkpoint holds (rotary frequencies, embedding scales) are computed on ``device``.

    Raises:
        BadInput: the config does not name a class, or its section on keys and values is not valid.
    """
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if names:
                for name in names:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
                model._init_weights(module)
    if (pruned := getattr(config, "pruned", None)) is not None:
        reshape(model, pruned)
    if (settings := KeyValueSettings.of(config)) is not None:
        quantize_key_values(model, settings)
    model.requires_grad_(False)
    return model.eval()


def longest_input(model: PreTrainedModel) -> int:
    """The largest number of tokens that the model has positions for, or ``sys.maxsize`` if it has no limit.

    In RoBERTa and models like it the first positions, up to that of the padding, are never used.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - module.padding_idx - 1
    return longest
