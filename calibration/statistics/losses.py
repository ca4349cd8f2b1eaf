"""Next-token losses: the negative log-likelihood of each token given the tokens before it, in nats.

Two functions compute it, and differ in the last bits on purpose:

- `streamed_losses` takes the log-softmax in float32, like transformers does. Its mean over a text is what
  perplexity is made of, where the rounding errors of single tokens average out.
- `precise_losses` subtracts in float64. It is for comparing models that differ by one block, where these
  errors would be larger than the difference that is looked for.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import nn

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows


@torch.no_grad()
def streamed_losses(model: StreamedModel, windows: Windows) -> torch.Tensor:
    """The losses of a text, computed with one layer in memory.

    Args:
        model: a causal language model.
        windows: the text.

    Returns:
        float64 [tokens]: the losses at the `scored_positions`, window after window.

    Raises:
        BadInput: the text does not fit the model (see `StreamedModel.stream`).
        CompressError: a layer puts out NaN or infinite values.
    """
    stream = model.stream(windows)
    for layer in model.walk(None, stream):
        stream.advance(layer)
    losses = []
    with model.head() as head:
        for index, (tokens, counts) in enumerate(zip(windows.tokens, scored_positions(windows), strict=True)):
            logits = head(stream.hidden.read(index, index + 1)).logits[0, :-1].float()
            targets = tokens[1:].to(logits.device)
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none").double()[counts])
    return torch.cat(losses).cpu()


def precise_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The losses ln sum_v e^{z_v} - z_target, with the subtraction in float64.

    Args:
        logits: z, float32 [T, V].
        targets: the tokens that follow, int64 [T].

    Returns:
        float64 [T].
    """
    return logits.logsumexp(1).double() - logits.gather(1, targets[:, None])[:, 0].double()


def scored_positions(windows: Windows) -> torch.Tensor:
    """The positions whose loss counts, since they and the next one hold real tokens: bool [N, S - 1]."""
    return windows.mask[:, :-1] & windows.mask[:, 1:]


LN_LARGEST = math.log(sys.float_info.max)
"""The largest mean loss whose exponential, the perplexity, is a finite float64."""
