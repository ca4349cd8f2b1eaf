"""The streaming engine: text goes through a model layer by layer, with one layer in memory.

    model = StreamedModel(checkpoint)
    dense = model.stream(calibration)                 # hidden states before layer 0
    for layer in model.walk(journal, dense):          # layer.module is in memory during the loop body only
        dense.advance(layer, observe={"mlp.down_proj": look})

Hidden states are float32. Up to a limit they are held in memory, above it in files. After every layer the
journal makes them durable, so that a walk that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from compress.anatomy import Anatomy
from compress.engine.activations import Activations
from compress.engine.at_inference import give_tokens
from compress.engine.checks import check_finite
from compress.engine.config import config_of
from compress.engine.head import Head
from compress.engine.journal import Journal
from compress.engine.skeleton import check_positions, skeleton
from compress.engine.stand_ins import StandIn, returns_tuple
from compress.engine.weights import Weights
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from compress.storage.sharded import refuse_sharded
from compress.system.memory import give_back_memory


class Seen(NamedTuple):
    """What a submodule computed for one batch of windows.

    Attributes:
        inputs: [B, S, in].
        output: [B, S, out].
        mask: bool [B, S] on the CPU, True for real tokens.
        start: number of the first window.
    """

    inputs: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor
    start: int

    def windows(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The real tokens of each window of ``values`` [B, S, C]: [tokens, C] each.

        Which these are is known on the CPU, so nothing waits for the device.
        """
        rows = (mask.nonzero()[:, 0].to(values.device) for mask in self.mask)
        return [window[real] for window, real in zip(values, rows, strict=True)]

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """The real tokens of ``values`` [B, S, C], window after window: [tokens, C]."""
        return values.flatten(0, 1) if bool(self.mask.all()) else torch.cat(self.windows(values))


Observer = Callable[[Seen], None]
"""Called once for every batch that goes through an observed submodule."""

BATCH_TOKENS = 4096
"""Tokens in a batch of windows, unless one window alone has more."""


@dataclass
class Layer:
    """One layer in memory.

    Attributes:
        index: position in the model, from 0.
        name: full name, such as ``model.layers.3``.
        module: the transformers module, float32.
        linears: path inside the layer -> module, in the order of the data flow.
        find: full name of a parameter -> its name in the checkpoint, see `Weights.find`.
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Module]
    find: Callable[[str], str | None] = str

    def stored(self, path: str, leaf: str = "weight") -> str | None:
        """The checkpoint's name of a parameter of the module at ``path``; None if it is not there."""
        return self.find(f"{self.name}.{path}.{leaf}")


class Stream:
    """Text on its way through a model: the hidden states before the layer that comes next.

    `StreamedModel.stream` makes them.

    Attributes:
        windows: the text.
        hidden: the hidden states [N, S, D].
        device: where layers compute.
        batch_size: windows in a batch.
        starts: the number of the first window of each batch.
        calls: first window of a batch -> for every layer what the model gives it besides hidden states.
    """

    def __init__(self, windows: Windows, hidden: Activations, batch_size: int, device: str) -> None:
        self.windows = windows
        self.device = device
        self.hidden = hidden
        self.starts = range(0, len(windows.tokens), batch_size)
        self.batch_size = batch_size
        self.calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def batches(
        self, starts: Iterable[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield (first window, hidden states [B, S, D], mask [B, S] on the CPU) for ``starts``, in order."""
        for start in self.starts if starts is None else starts:
            stop = min(start + self.batch_size, len(self.windows.tokens))
            yield start, self.hidden.read(start, stop), self.windows.mask[start:stop]

    def call(self, layer: Layer, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """``layer(hidden)`` on the stream's device, with the attention mask and positions of the model."""
        args, kwargs = self.calls[start][layer.index]
        rows = slice(start, start + len(hidden))
        give_tokens(layer.module, self.windows.tokens[rows], self.windows.mask[rows])
        return hidden_of(layer.module(hidden.to(self.device), *args, **kwargs))

    @torch.no_grad()
    def advance(
        self,
        layer: Layer,
        observe: Mapping[str, Observer] | None = None,
        into: Activations | None = None,
    ) -> None:
        """Set ``hidden`` to ``layer(hidden)``, and show what the observed submodules compute on the way.

        Args:
            layer: the layer in memory, changed or not.
            observe: path inside the layer ("" is the layer itself) -> observer.
            into: where the output goes instead; ``hidden`` then stays as it is.

        Raises:
            CompressError: the layer puts out NaN or infinite values.
        """
        target = self.hidden if into is None else into
        for start, hidden, mask in self.batches():
            with _hooks(layer, observe or {}, mask, start):
                output = self.call(layer, start, hidden)
            check_finite(output, f"Layer {layer.name}")
            target.write(start, output)
        target.flip()

    @torch.no_grad()
    def look(self, layer: Layer, observe: Mapping[str, Observer]) -> None:
        """Show what `advance` would show, and leave ``hidden`` as it is.

        The layer is left as soon as all observed submodules have run.
        """
        for start, hidden, mask in self.batches():
            waiting = set(observe)

            def show(path: str, waiting: set[str], seen: Seen) -> None:
                observe[path](seen)
                waiting.discard(path)
                if not waiting:
                    raise _SeenAll

            observers = {path: partial(show, path, waiting) for path in observe}
            with suppress(_SeenAll), _hooks(layer, observers, mask, start):
                self.call(layer, start, hidden)


class _SeenAll(Exception):
    """Leaves a layer's forward pass, because nothing behind it is needed."""


@contextmanager
def _hooks(layer: Layer, observe: Mapping[str, Observer], mask: torch.Tensor, start: int) -> Iterator[None]:
    with ExitStack() as stack:
        for path, observer in observe.items():
            stack.enter_context(_hook(layer.module.get_submodule(path), observer, mask, start))
        yield


@contextmanager
def _hook(module: nn.Module, observer: Observer, mask: torch.Tensor, start: int) -> Iterator[None]:
    def windowed(values: torch.Tensor) -> torch.Tensor:
        # OPT gives its MLP the tokens of all windows in one row, [B * S, D].
        return values.view(*mask.shape, -1) if values.ndim == 2 else values

    handle = module.register_forward_hook(
        lambda _, inputs, output: observer(
            Seen(windowed(inputs[0]), windowed(hidden_of(output)), mask, start)
        )
    )
    try:
        yield
    finally:
        handle.remove()


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returns: some architectures wrap them in a tuple with others."""
    return output[0] if isinstance(output, tuple) else output


class StreamedModel:
    """A model whose weights stay on disk: memory holds one layer, or the parts around the layers.

    Args:
        checkpoint: where the weights are.
        device: where layers and hidden states are computed.
        progress: called with a text and the share done (0 to 1) after each layer of a walk.

    Raises:
        BadInput: the architecture is not in the anatomy table, config.json is not valid, or the model is an
            ensemble that S3T trained.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        refuse_sharded(checkpoint.config, checkpoint.folder)
        self.checkpoint = checkpoint
        self.device = device
        self.progress = progress
        self.config = config_of(checkpoint)
        self.model = skeleton(self.config, device)
        self.weights = Weights(checkpoint, self.model, device, torch.float32)
        self.anatomy: Anatomy = self.weights.anatomy
        parent, _, leaf = self.anatomy.layers.rpartition(".")
        self._parent = self.model.base_model.get_submodule(parent)
        self._leaf = leaf
        self._layers = list(getattr(self._parent, leaf))
        setattr(self._parent, leaf, nn.ModuleList())
        self._returns_tuple: bool | None = None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """One layer in memory for the length of a ``with`` block."""
        name, module = self.anatomy.layer_name(index), self._layers[index]
        give_back_memory()
        self.weights.fill(module, name)
        try:
            yield Layer(index, name, module, self.anatomy.linears(module), self.weights.find)
        finally:
            self.weights.empty(module)

    def walk(
        self,
        journal: Journal | None,
        *streams: Stream | Activations,
        stop: int | None = None,
        label: str = "",
        share: Callable[[float], float] = lambda done: done,
    ) -> Iterator[Layer]:
        """Yield layers 0 to ``stop`` (without it all of them), each in memory during the loop body.

        After the body, ``journal`` makes ``streams``, ``journal.state`` and what was written to the draft
        durable. If it already knows finished layers, the walk starts behind them.

        Args:
            journal: makes the walk resumable; None if it need not be.
            streams: what the loop body changes from layer to layer.
            stop: the first layer that is not walked.
            label: the text that ``progress`` is told; without one it is told nothing.
            share: the share of the work that is done when a share of the layers is done, where layers differ
                or the walk is a part of the work that ``label`` names.

        Raises:
            DamagedWork: what the journal kept is cut short or gone.
        """
        stop = self.num_layers if stop is None else stop
        held = [item.hidden if isinstance(item, Stream) else item for item in streams]
        begin = 0
        if journal is not None:
            begin = journal.restore(held)
        tell = self.progress if label and self.progress is not None else lambda text, share: None
        tell(label, share(begin / max(stop, 1)))
        for index in range(begin, stop):
            with self.layer(index) as layer:
                yield layer
            if journal is not None:
                journal.commit(index + 1, held)
            tell(label, share((index + 1) / stop))

    @torch.no_grad()
    def stream(
        self, windows: Windows, folder: Path | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> Stream:
        """Start text on its way: embed it, and record what the model gives every layer besides hidden states.

        Args:
            windows: token ids [N, S] and mask.
            folder: hidden states above the memory limit go into files there.
            batch_tokens: tokens in a batch; results depend on it only by rounding.

        Raises:
            BadInput: there are token ids beyond the vocabulary, or the windows are longer than the model's
                table of positions.
        """
        if int(windows.tokens.max()) >= self.config.vocab_size:
            raise BadInput(
                "The text has token ids outside the model's vocabulary; use the tokenizer of this model."
            )
        count, length = windows.tokens.shape
        check_positions(self.model, length, "use a smaller seqlen (calibration) or context (evaluation)")
        batch_size = max(1, batch_tokens // length)
        stream: Stream | None = None
        padded = not bool(windows.mask.all())
        with self._outside(skip_head=True):
            calls_of: dict[int, list[Any]] = {}
            for start in range(0, count, batch_size):
                tokens = windows.tokens[start : start + batch_size].to(self.device)
                mask = windows.mask[start : start + batch_size].to(self.device) if padded else None
                types = windows.token_types
                types = None if types is None else types[start : start + batch_size].to(self.device)
                hidden, calls = self._embed(tokens, mask, types)
                if stream is None:
                    shape = (count, length, hidden.shape[-1])
                    store = Activations(shape, folder and folder / "hidden", device=self.device)
                    stream = Stream(windows, store, batch_size, self.device)
                # Without padding the model gives every batch of the same size the same mask and positions.
                stream.calls[start] = calls if padded else calls_of.setdefault(len(tokens), calls)
                stream.hidden.write(start, hidden)
        assert stream is not None  # there is at least one window
        stream.hidden.flip()
        return stream

    def _embed(
        self, tokens: torch.Tensor, mask: torch.Tensor | None, types: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Any]]:
        calls: list[Any] = []
        hidden: list[torch.Tensor] = []

        def record(given: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden.append(given)
            calls.append((args, kwargs))
            return given

        with self._stand_ins(self._layers, record):
            given = self._no_cache if types is None else {"token_type_ids": types}  # only encoders have types
            self.model.base_model(tokens, attention_mask=mask, **given)
        return hidden[0], calls

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Everything behind the layers, in memory for the length of a ``with`` block."""
        with self._outside(skip_embedding=True):
            yield Head(self.model, self.anatomy.head, self._behind)

    def _behind(self, model: nn.Module, hidden: torch.Tensor) -> Any:
        """The output of ``model`` (the whole one or its base model) for ``hidden`` after the last layer."""

        def replay(*_: Any, **__: Any) -> torch.Tensor:
            return hidden.to(self.device)

        embedding: Any = self.model.get_input_embeddings()
        dummy = torch.zeros((*hidden.shape[:2], embedding.embedding_dim), device=self.device)
        # One stand-in for all layers replaces the dummy by the real hidden states.
        with self._stand_ins(self._layers[:1], replay):
            return model(inputs_embeds=dummy, **self._no_cache)

    @property
    def _no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if self.anatomy.kind == "decoder" else {}

    @contextmanager
    def _outside(self, skip_head: bool = False, skip_embedding: bool = False) -> Iterator[None]:
        """Everything but the layers in memory."""
        embedding = self.model.base_model.get_submodule(self.anatomy.embeddings[0])
        head = self.model.get_submodule(self.anatomy.head) if self.anatomy.head else None
        skip: tuple[nn.Module, ...] = ()
        if skip_head and head is not None:
            skip = (head,)
        elif skip_embedding and head is not None and embedding is not head:
            skip = (embedding,)
        self.weights.fill(self.model, "", skip=skip)
        try:
            yield
        finally:
            self.weights.empty(self.model)

    @contextmanager
    def _stand_ins(self, layers: list[nn.Module], act: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Put stand-ins that call ``act`` in the place of the layers, for the length of a ``with`` block."""

        def forward(layer: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._returns_tuple is None:
                self._returns_tuple = returns_tuple(layer, hidden, args, kwargs)
            output = act(hidden, *args, **kwargs)
            return (output,) if self._returns_tuple else output

        stand_ins = nn.ModuleList(StandIn(layer, forward) for layer in layers)
        setattr(self._parent, self._leaf, stand_ins)
        try:
            yield
        finally:
            setattr(self._parent, self._leaf, nn.ModuleList())
