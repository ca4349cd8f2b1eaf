"""The logits of a model: streamed layer by layer, or taken out of what it returned."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from compress.engine.stream import Stream, StreamedModel
from compress.engine.windows import Windows
from compress.storage.checkpoint import Checkpoint


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, windows: Windows, device: str = "cpu") -> torch.Tensor:
    """The logits of a model on some windows, computed with one layer in memory.

    Args:
        checkpoint: the model.
        windows: token ids [N, S].
        device: where it computes.

    Returns:
        float32 on the CPU: [N, S, V] of a causal model, and the `first_output` of any other.

    Raises:
        BadInput: as `StreamedModel` and `StreamedModel.stream`.
        CompressError: a layer puts out NaN or infinite values.
    """
    model = StreamedModel(checkpoint, device)
    stream = model.stream(windows)
    for layer in model.walk(None, stream):
        stream.advance(layer)
    with model.head() as head:
        return torch.cat([first_output(head(hidden)).cpu() for _, hidden, _ in stream.batches()])


def last_logits(model: nn.Module, kept: int, **inputs: Any) -> torch.Tensor:
    """The logits of the last tokens of each sequence: [N, kept, V].

    Most models can be told to leave out the others, whose logits take time and memory where the vocabulary
    is large.

    Args:
        model: a causal model of transformers, or one of peft around it.
        kept: how many tokens.
        inputs: of the forward pass.
    """
    around: Any = getattr(model, "get_base_model", None)
    base: Any = model if around is None else around()
    fewer = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    logits: torch.Tensor = model(**inputs, **fewer).logits
    return logits[:, -kept:]


def first_output(output: Any) -> torch.Tensor:
    """The logits in what a transformers model returned, or the first tensor if it has no logits (the hidden
    states of a bare encoder, the start logits of a question answerer)."""
    return output["logits"] if "logits" in output else output[0]


@torch.no_grad()
def through_all_layers(model: StreamedModel, windows: Windows, label: str = "") -> Stream:
    """Take windows through all layers of a model, with one layer in memory.

    Args:
        model: the model.
        windows: token ids [N, S].
        label: text of the progress bar.

    Returns:
        A stream whose hidden states, float32 [N, S, D], are behind the last layer and before the final norm.

    Raises:
        BadInput: as `StreamedModel.stream`.
        CompressError: a layer puts out NaN or infinite values.
    """
    stream = model.stream(windows)
    for layer in model.walk(None, stream, label=label):
        stream.advance(layer)
    return stream
