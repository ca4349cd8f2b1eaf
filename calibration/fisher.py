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

from compress.backward import Tape
from compress.calibration.windows import Windows
from compress.checkpoint import write_tensors
from compress.stream import Layer, StreamedModel


class Fisher:
    """F_ij, the mean over windows of the squared gradient of the window's loss with respect to W_ij.

    The loss of a window is its mean negative log-likelihood (nats a token), as in SqueezeLLM. One backward
    pass takes two forwards and a backward of the whole model, with one layer in memory; the results lie in
    ``folder``, a file a layer. They are not measured again if they are all there.

    Args:
        model: a causal language model.
        windows: of text.
        folder: of this model and these windows.
    """

    def __init__(self, model: StreamedModel, windows: Windows, folder: Path) -> None:
        self.folder = folder
        if not self._file(0).exists():  # the last one written
            self._measure(model, windows)

    def read(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Path of a linear -> F, float32 [out, in]."""
        return load_file(self._file(layer.index))

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"

    def _measure(self, model: StreamedModel, windows: Windows) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stream = model.stream(windows, self.folder, batch_tokens=1)  # one window a batch
        tape = Tape(model, stream, self.folder / "tape")
        sums: dict[str, torch.Tensor] = {}

        def loss(output: Any, start: int) -> torch.Tensor:
            real = windows.mask[start, 1:] & windows.mask[start, :-1]
            logits, targets = output.logits[0, :-1][real], windows.tokens[start, 1:][real]
            return F.cross_entropy(logits.float(), targets.to(logits.device))

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
                sums[path] = sums[path] + rows.square() if start else rows.square()
            if start == stream.starts[-1]:
                means = {path: total / len(windows) for path, total in sums.items()}
                write_tensors(means, self._file(layer.index))
                sums.clear()

        tape.forward()
        tape.differentiate(loss)
        tape.backward(leaves, take)
