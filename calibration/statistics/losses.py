"""Next-token losses."""

from __future__ import annotations

import math
import sys

import torch
from torch import nn

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows


@torch.no_grad()
def next_token_loss(model: StreamedModel, windows: Windows) -> torch.Tensor:
    """Negative log-likelihood (nats, float64) of every real token given those before it: [tokens]."""
    stream = model.stream(windows)
    for layer in model.walk(None, stream):
        stream.advance(layer)
    losses = []
    with model.head() as head:
        for index, (tokens, mask) in enumerate(zip(windows.tokens, windows.mask, strict=True)):
            logits = head(stream.hidden.read(index, index + 1)).logits[0, :-1].float().cpu()
            loss = nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double()
            losses.append(loss[mask[1:] & mask[:-1]])
    return torch.cat(losses)


def next_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ln sum_v e^{z_v} - z_target for float32 logits [T, V] and targets [T]: float64 [T].

    Not log_softmax, whose float32 sum over a large vocabulary is wrong by more than two blocks may differ.
    """
    return logits.logsumexp(1).double() - logits.gather(1, targets[:, None])[:, 0].double()


def predicted(windows: Windows) -> torch.Tensor:
    """Whether the token at a position and the next one are real, so that its loss counts: bool [N, S - 1]."""
    return windows.mask[:, :-1] & windows.mask[:, 1:]


LN_LARGEST = math.log(sys.float_info.max)
