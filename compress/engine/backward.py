"""The way back through a streamed model: gradients with one layer in memory at a time.

    tape = Tape(model, stream, folder)
    tape.forward()                              # keeps the hidden states before every layer
    tape.differentiate(loss)                    # gradient of the loss with respect to the last ones
    tape.backward(leaves, take)                 # the layers from the last to the first

In the walk back each layer is run once more, from its stored input and with gradients, so a pass costs two
forwards and one backward, and the memory of one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from compress.engine import activations
from compress.engine.activations import Activations
from compress.engine.checks import check_finite
from compress.engine.stream import Layer, Observer, Stream, StreamedModel

Loss = Callable[..., torch.Tensor]
"""Called with the model's output for some windows, the number of the first and, where there is a reference,
the output for its hidden states: the sum of the windows' losses."""

Leaves = Callable[[Layer, int], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""Called with a layer and a number of windows: inside the ``with`` block the layer computes with the tensors
it gives, by a name of the caller's, and they require gradients."""

Take = Callable[[Layer, int, Mapping[str, torch.Tensor]], None]
"""Called with a layer, the number of the first window and the gradients of the leaves, for each batch."""


class Tape:
    """The hidden states before every layer from where a stream stands, and a gradient on its way back.

    Args:
        model: the layers that are walked.
        stream: the text, which stays where it is.
        folder: what is above the memory limit, taken all together, goes into files there.
        held: the layer the stream stands before, if the caller has it in memory and may have changed it;
            otherwise the stream stands at the beginning.

    Attributes:
        states: index of a layer -> hidden states before it; one more, behind the last layer.
        gradient: of the sum of the losses with respect to the states `backward` or `differentiate` came to.
    """

    def __init__(
        self, model: StreamedModel, stream: Stream, folder: Path | None = None, held: Layer | None = None
    ) -> None:
        self.model = model
        self.held = held
        self.begin = held.index if held is not None else 0
        self._stream = copy.copy(stream)
        indices = range(self.begin + 1, model.num_layers + 1)
        limit = activations.MEMORY_LIMIT // (len(indices) + 1)

        def room(name: str) -> Activations:
            return Activations(stream.hidden.shape, folder and folder / name, limit)

        self.states = {self.begin: stream.hidden} | {index: room(f"hidden-{index}") for index in indices}
        self.gradient = room("gradient")

    def forward(self, observe: Callable[[Layer], Mapping[str, Observer]] | None = None) -> None:
        """Send the text through all layers, showing what ``observe`` says of each (see `Stream.advance`).

        Raises:
            CompressError: a layer puts out NaN or infinite values.
        """
        for layer in self._layers(range(self.begin, self.model.num_layers)):
            self._stream.hidden = self.states[layer.index]
            self._stream.advance(layer, observe and observe(layer), into=self.states[layer.index + 1])

    def differentiate(self, loss: Loss, reference: Activations | None = None) -> float:
        """The sum of the losses of all windows; its gradient is where `backward` begins.

        Logits over a vocabulary are made for one window at a time.

        Args:
            loss: of the model's outputs.
            reference: hidden states behind the last layer of another model with the same head (a teacher),
                whose outputs the loss is given, too.
        """
        last = self.states[self.model.num_layers]
        count = len(self._stream.windows)
        size = 1 if self.model.anatomy.head is not None else self._stream.batch_size
        total = 0.0
        with self.model.head() as head:
            for start in range(0, count, size):
                stop = min(start + size, count)
                hidden = last.read(start, stop).to(self._stream.device).requires_grad_()
                others = [] if reference is None else [head(reference.read(start, stop))]
                with torch.enable_grad():
                    value = loss(head(hidden), start, *others)
                (gradient,) = torch.autograd.grad(value, hidden)
                self.gradient.write(start, gradient)
                total += value.item()
        self.gradient.flip()
        return total

    def backward(self, leaves: Leaves, take: Take) -> None:
        """Pull the gradient through the layers, the last one first, down to where the stream stands.

        Args:
            leaves: puts tensors into a layer.
            take: is shown their gradients. What belongs to one window only (one mask for each, say) has the
                gradient of that window's loss; what is shared (a weight) has the sum over the batch.

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
