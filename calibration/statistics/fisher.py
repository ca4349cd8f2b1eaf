"""The diagonal Fisher information of the weights in the layers: how much the loss depends on each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from compress.engine.backward import Loss, Tape
from compress.engine.logits import first_output
from compress.engine.stream import Layer, StreamedModel
from compress.engine.windows import Windows
from compress.storage.writer import write_tensors


class Fisher:
    """F_ij, the mean over windows of the squared gradient of the window's loss with respect to W_ij.

    Measuring it takes two forward passes and one backward pass of the whole model, with one layer in memory.
    The results go into ``folder``, in one file per layer. If all of them are there, nothing is measured.

    Args:
        model: to differentiate.
        windows: of text.
        loss: of the output for one window; `text_loss` or `sampled_loss`.
        folder: for this model, these windows and this loss only.

    Raises:
        CompressError: a layer or a gradient has NaN or infinite values.
    """

    def __init__(self, model: StreamedModel, windows: Windows, loss: Loss, folder: Path) -> None:
        self.folder, self.device = folder, model.device
        if not self._file(0).exists():  # it is written last
            self._measure(model, windows, loss)

    def read(self, layer: Layer) -> Mapping[str, torch.Tensor]:
        """F of the linears in a layer: path -> float32 [out, in], on the device of the model.

        Each is read when it is asked for, and not kept.
        """
        return _Stored(self._file(layer.index), self.device)

    def _file(self, index: int) -> Path:
        return self.folder / f"fisher-{index:05d}.safetensors"

    def _measure(self, model: StreamedModel, windows: Windows, loss: Loss) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stream = model.stream(windows, self.folder, batch_tokens=1)  # one window a batch
        tape = Tape(model, stream, self.folder / "tape")
        sums: dict[str, torch.Tensor] = {}

        @contextmanager
        def leaves(layer: Layer, _: int) -> Iterator[Mapping[str, torch.Tensor]]:
            weights = {path: linear.get_parameter("weight") for path, linear in layer.linears.items()}
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
                for total in sums.values():
                    total.div_(len(windows))
                write_tensors(sums, self._file(layer.index))
                sums.clear()

        tape.forward()
        tape.differentiate(loss)
        tape.backward(leaves, take)


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, read one at a time."""

    def __init__(self, file: Path, device: str) -> None:
        self.file, self.device = file, device
        with safe_open(file, "pt") as opened:
            self.names = list(opened.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def text_loss(windows: Windows) -> Loss:
    """The mean negative log-likelihood (nats per token) of the text of a window, as in SqueezeLLM."""

    def loss(output: Any, start: int) -> torch.Tensor:
        real = windows.mask[start, 1:] & windows.mask[start, :-1]
        logits, targets = output.logits[0, :-1][real], windows.tokens[start, 1:][real]
        return F.cross_entropy(logits.float(), targets.to(logits.device))

    return loss


def sampled_loss(model: StreamedModel, windows: Windows, seed: int) -> Loss:
    """The negative log-likelihood of labels drawn from the model itself, one per token, summed over tokens.

    The mean square of its gradient is the Fisher information by definition, because products of the gradients
    of different tokens have the expectation 0. For outputs that are not distributions over a vocabulary
    (those of encoders) the labels are Gaussian around the output.

    Args:
        model: which draws the labels.
        windows: say which tokens are real.
        seed: of the labels.
    """
    causal = model.anatomy.kind == "decoder" and model.anatomy.head is not None

    def loss(output: Any, start: int) -> torch.Tensor:
        values = first_output(output)
        generator = torch.Generator().manual_seed(seed + start)  # each window has its own random numbers
        mask = windows.mask[start : start + 1].to(values.device)
        if causal:
            drawn = torch.multinomial(values[0].detach().float().softmax(-1).cpu(), 1, generator=generator)
            losses = F.cross_entropy(values[0].float(), drawn[:, 0].to(values.device), reduction="none")
            return losses[mask[0]].sum()
        noise = torch.randn(values.shape, generator=generator).to(values)
        return (values * noise)[mask if values.shape[:2] == mask.shape else slice(None)].sum()

    return loss


def expected_loss(information: torch.Tensor, residual: torch.Tensor, windows: Windows) -> float:
    """The loss that a changed weight Ŵ of one linear causes alone, to second order, in nats per token.

    Each token's divergence from the dense model is about 1/2 vec(R)^T F vec(R), with R = W - Ŵ and the Fisher
    information F of W, because the gradient itself vanishes at the dense model. Only the diagonal of F is
    used; the products of different entries that this leaves out are as often positive as negative.

    Args:
        information: the diagonal of F by `Fisher`, of a `sampled_loss` over the windows, [out, in].
        residual: R, [out, in].
        windows: say how many tokens there are.
    """
    total = (information.to(residual) * residual.square()).sum(dtype=torch.float64)
    return float(total) * len(windows) / (2 * windows.num_tokens)
