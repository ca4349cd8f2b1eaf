"""Gradients of a streamed model, with one layer in memory.

    tape = Tape(model, stream, folder)
    tape.forward()                              # keeps the hidden states before every layer
    tape.differentiate(loss)                    # gradient of the loss with respect to the last ones
    tape.backward(leaves, take)                 # from the last layer to the first

On the way back each layer is run once more, from its stored input and with gradients. So a pass costs two
forward passes and one backward pass, and the memory of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from compress.engine.activations import Activations
from compress.engine.checks import check_finite
from compress.engine.stream import Layer, Observer, Stream, StreamedModel

Loss = Callable[..., torch.Tensor]
"""Called with the model's output for some windows, the number of the first window and, where there is a
reference, the output for its hidden states. Returns the sum of the windows' losses."""

Leaves = Callable[[Layer, int], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""Called with a layer and a number of windows. Inside the ``with`` block the layer computes with the tensors
that the block gives (name -> tensor, names as the caller likes), and they require gradients."""

Take = Callable[[Layer, int, Mapping[str, torch.Tensor]], None]
"""Called for each batch with a layer, the number of the first window and the gradients of the leaves."""


class Tape:
    """The hidden states before every layer that follows a stream, and a gradient on its way back.

    Args:
        model: the model whose layers are walked.
        stream: the text; it is not changed.
        folder: the states and the gradient go into files there if together they exceed the memory limit.
        held: the layer that comes next for the stream, if the caller has it in memory and may have changed
            it. Without it the stream must be at the beginning.

    Attributes:
        states: index of a layer -> hidden states before it; the last entry is those after the last layer.
        gradient: the gradient of the sum of the losses with respect to the hidden states at which
            `differentiate` or `backward` ended.
    """

    def __init__(
        self, model: StreamedModel, stream: Stream, folder: Path | None = None, held: Layer | None = None
    ) -> None:
        self.model = model
        self.held = held
        self.begin = held.index if held is not None else 0
        self._stream = copy.copy(stream)
        indices = range(self.begin + 1, model.num_layers + 1)

        def room(name: str) -> Activations:
            file, together = folder and folder / name, len(indices) + 1
            return Activations(stream.hidden.shape, file, together, stream.device)

        self.states = {self.begin: stream.hidden} | {index: room(f"hidden-{index}") for index in indices}
        self.gradient = room("gradient")

    def forward(self, observe: Callable[[Layer], Mapping[str, Observer]] | None = None) -> None:
        """Send the text through all layers, and keep the hidden states.

        Args:
            observe: called with each layer; returns what is observed there, as in `Stream.advance`.

        Raises:
            CompressError: a layer puts out NaN or infinite values.
        """
        for layer in self._layers(range(self.begin, self.model.num_layers)):
            self._stream.hidden = self.states[layer.index]
            self._stream.advance(layer, observe and observe(layer), into=self.states[layer.index + 1])

    def differentiate(self, loss: Loss, reference: Activations | None = None) -> float:
        """Compute the loss, and its gradient at the last hidden states, where `backward` begins.

        Logits over a vocabulary are made window by window, because they are large.

        Args:
            loss: of the model's outputs.
            reference: hidden states after the last layer of another model with the same head (a teacher). The
                loss is then given the outputs for them as well.

        Returns:
            The sum of the losses of all windows.
        """
        last = self.states[self.model.num_layers]
        count = len(self._stream.windows)
        size = 1 if self.model.anatomy.head is not None else self._stream.batch_size
        total = torch.zeros((), dtype=torch.float64)
        with self.model.head() as head:
            for start in range(0, count, size):
                stop = min(start + size, count)
                hidden = last.read(start, stop).to(self._stream.device).requires_grad_()
                others = [] if reference is None else [head(reference.read(start, stop))]
                with torch.enable_grad():
                    value = loss(head(hidden), start, *others)
                (gradient,) = torch.autograd.grad(value, hidden)
                self.gradient.write(start, gradient)
                total = total + value.detach().double()
        self.gradient.flip()
        return float(total)

    def backward(self, leaves: Leaves, take: Take) -> None:
        """Pull the gradient back through the layers, from the last one to where the stream is.

        Args:
            leaves: puts tensors into a layer.
            take: is given their gradients. A leaf that belongs to one window (a mask for each, say) has the
                gradient of that window's loss; one that is shared (a weight) has the sum over the batch.

        Raises:
            CompressError: a gradient is NaN or infinite.
        """
        for layer in self._layers(reversed(range(self.begin, self.model.num_layers))):
            for start in self._stream.starts:
                stop = min(start + self._stream.batch_size, len(self._stream.windows))
                hidden = self.states[layer.index].read(start, stop).to(self._stream.device).requires_grad_()
                with leaves(layer, stop - start) as given:
                    with torch.enable_grad():
                        output = self._stream.call(layer, start, hidden)
                    upstream = self.gradient.read(start, stop).to(output)
                    found = torch.autograd.grad(output, [hidden, *given.values()], upstream)
                check_finite(found[0], f"The backward pass of layer {layer.name}")
                self.gradient.write(start, found[0])
                take(layer, start, dict(zip(given, found[1:], strict=True)))
            self.gradient.flip()

    def _layers(self, indices: Iterable[int]) -> Iterator[Layer]:
        for index in indices:
            if self.held is not None and index == self.held.index:
                yield self.held
            else:
                with self.model.layer(index) as layer:
                    yield layer
