"""The diagonal Fisher information of the weights in the layers: how much the loss depends on each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from compress.engine.backward import Loss, Tape
from compress.engine.logits import first_output
from compress.engine.stream import Layer, StreamedModel
from compress.engine.windows import Windows
from compress.storage.writer import write_tensors


class Fisher:
    """F_ij, the mean over windows of the squared gradient of the window's loss with respect to W_ij.

    One backward pass takes two forwards and a backward of the whole model, with one layer in memory; the
    results lie in ``folder``, a file a layer. They are not measured again if they are all there.

    Args:
        model: to differentiate.
        windows: of text.
        loss: of the output for one window; `text_loss` or `sampled_loss`.
        folder: of this model, these windows and this loss.
    """

    def __init__(self, model: StreamedModel, windows: Windows, loss: Loss, folder: Path) -> None:
        self.folder = folder
        if not self._file(0).exists():  # the last one written
            self._measure(model, windows, loss)

    def read(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Path of a linear -> F, float32 [out, in]."""
        return load_file(self._file(layer.index))

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"

    def _measure(self, model: StreamedModel, windows: Windows, loss: Loss) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stream = model.stream(windows, self.folder, batch_tokens=1)  # one window a batch
        tape = Tape(model, stream, self.folder / "tape")
        sums: dict[str, torch.Tensor] = {}

        @contextmanager
        def leaves(layer: Layer, _: int) -> Iterator[Mapping[str, torch.Tensor]]:
            weights: dict[str, nn.Parameter] = {path: linear.weight for path, linear in layer.linears.items()}
            for parameter in weights.values():
                parameter.requires_grad_(True)
            try:
                yield weights
            finally:
                for parameter in weights.values():
                    parameter.requires_grad_(False)

        def take(layer: Layer, start: int, gradients: Mapping[str, torch.Tensor]) -> None:
            for path, gradient in gradients.items():
                rows = gradient.T if model.anatomy.conv1d else gradient
                sums[path] = sums[path].addcmul_(rows, rows) if start else rows.square()
            if start == stream.starts[-1]:
                means = {path: total / len(windows) for path, total in sums.items()}
                write_tensors(means, self._file(layer.index))
                sums.clear()

        tape.forward()
        tape.differentiate(loss)
        tape.backward(leaves, take)


def text_loss(windows: Windows) -> Loss:
    """The mean negative log-likelihood of a window's own text (nats a token), as in SqueezeLLM."""

    def loss(output: Any, start: int) -> torch.Tensor:
        real = windows.mask[start, 1:] & windows.mask[start, :-1]
        logits, targets = output.logits[0, :-1][real], windows.tokens[start, 1:][real]
        return F.cross_entropy(logits.float(), targets.to(logits.device))

    return loss


def sampled_loss(model: StreamedModel, windows: Windows, seed: int) -> Loss:
    """The negative log-likelihood of labels that the model itself draws, one a token, summed over the tokens.

    The mean square of its gradient is the Fisher information as defined, since what is expected of products
    of different tokens' gradients is 0. Outputs that are no distributions over a vocabulary (encoders) take
    Gaussian labels around them.
    """
    causal = model.anatomy.kind == "decoder" and model.anatomy.head is not None

    def loss(output: Any, start: int) -> torch.Tensor:
        values = first_output(output)
        generator = torch.Generator().manual_seed(seed + start)  # of the window, whatever the batch
        mask = windows.mask[start : start + 1].to(values.device)
        if causal:
            drawn = torch.multinomial(values[0].detach().float().softmax(-1).cpu(), 1, generator=generator)
            losses = F.cross_entropy(values[0].float(), drawn[:, 0].to(values.device), reduction="none")
            return losses[mask[0]].sum()
        noise = torch.randn(values.shape, generator=generator).to(values)
        return (values * noise)[mask if values.shape[:2] == mask.shape else slice(None)].sum()

    return loss


def expected_loss(information: torch.Tensor, residual: torch.Tensor, windows: Windows) -> float:
    """How much loss the residual R = W - Ŵ of one linear causes alone, to second order: nats for each token.

    The divergence from the dense model is about 1/2 vec(R)^T F vec(R) for each token, with the Fisher
    information F of W, because the gradient itself vanishes at the dense model. Of F the diagonal is taken.
    What is left out, products of different entries, is as often positive as negative.

    Args:
        information: `Fisher` of a `sampled_loss` over the windows, [out, in].
        residual: [out, in].
        windows: say how many tokens there are.
    """
    total = (information.to(residual) * residual.square()).sum(dtype=torch.float64)
    return float(total) * len(windows) / (2 * windows.num_tokens)
