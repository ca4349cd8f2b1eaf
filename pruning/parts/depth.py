"""Remove whole layers from a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from compress.anatomy import without_layers
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.storage.draft import Draft

if TYPE_CHECKING:
    from compress.method import StepContext


class Cut(NamedTuple):
    """Layers to remove, and the layer before them, which takes the linear map that replaces them."""

    layer: int
    length: int

    @property
    def removed(self) -> range:
        """The numbers of the removed layers."""
        return range(self.layer + 1, self.layer + self.length + 1)


def layer_distances(
    model: StreamedModel, windows: Windows, n: int, context: StepContext, last_token: bool = False
) -> torch.Tensor:
    """The angular distance of the outputs of the layers i and i+n for every i.

    Args:
        model: the dense model.
        windows: the text.
        n: how many layers lie between, from 1 to num_layers - 1.
        context: takes the journal and the hidden states.
        last_token: whether only the last real token of each window counts, instead of all of them.

    Returns:
        float64 [num_layers - n], means over tokens, from 0 to 1.
    """
    count, length = windows.tokens.shape
    last = None
    if last_token:
        last, length = windows.mask.long().cumsum(1).argmax(1), 1
    stream = model.stream(windows, context.folder / "distances")
    journal = context.journal("distances")
    shape = (count, length, stream.hidden.shape[-1])
    # The outputs of the layers i-n to i, which take turns in n + 1 places.
    recent = [journal.activations(f"recent-{slot}", shape, model.device) for slot in range(n + 1)]
    journal.state["distances"] = torch.zeros(model.num_layers - n, dtype=torch.float64)
    for layer in model.walk(journal, stream, *recent, label="measuring distances"):
        stream.advance(layer)
        now, before = recent[layer.index % (n + 1)], recent[(layer.index - n) % (n + 1)]
        total, tokens = 0.0, 0
        for start, hidden, mask in stream.batches():
            stop = start + len(hidden)
            if last is not None:
                rows = torch.arange(len(hidden))
                hidden, mask = hidden[rows, last[start:stop], None], mask[rows, last[start:stop], None]
            now.write(start, hidden)
            if layer.index >= n:
                values = angular(before.read(start, stop)[mask], hidden[mask])
                total, tokens = total + float(values.sum()), tokens + len(values)
        now.flip()
        if layer.index >= n:
            journal.state["distances"][layer.index - n] = total / tokens
    return journal.state["distances"]


def angular(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """arccos(cos(a, b)) / pi of the rows of two [tokens, D]: float64 [tokens]."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1).acos() / math.pi


def choose_cuts(distances: torch.Tensor, transforms: int, n: int) -> list[Cut]:
    """Choose cuts of n layers that do not overlap, greedily by their distances.

    A cut that would leave no room for the others is passed over. Adjacent cuts are merged into one. Layer 0
    always stays.

    Args:
        distances: [num_layers - n]; entry i is the distance over layers i+1 to i+n.
        transforms: how many cuts; they fit if transforms * n < num_layers.
        n: how many layers each cut removes.
    """
    free = [False] + [True] * (len(distances) + n - 1)
    chosen: list[Cut] = []
    for layer in torch.argsort(distances, stable=True).tolist():
        cut = Cut(layer, n)
        without = [value and index not in cut.removed for index, value in enumerate(free)]
        still_to_come = transforms - len(chosen) - 1
        if all(free[index] for index in cut.removed) and 0 <= still_to_come <= _room(without, n):
            chosen.append(cut)
            free = without
    merged: list[Cut] = []
    for cut in sorted(chosen):
        if merged and merged[-1].removed[-1] == cut.layer:
            # The layer that would take this map is itself removed, so the map before it replaces both.
            merged[-1] = Cut(merged[-1].layer, merged[-1].length + cut.length)
        else:
            merged.append(cut)
    return merged


def _room(free: list[bool], n: int) -> int:
    """How many cuts of n consecutive free layers fit."""
    room = length = 0
    for value in free:
        length = length + 1 if value else 0
        if length == n:
            room, length = room + 1, 0
    return room


def plan_without_layers(shape: ModelShape, removed: Collection[int]) -> ModelShape:
    """The shape of the model without the layers ``removed``, with the others renumbered.

    Raises:
        BadInput: the model is quantized, or these layers cannot be removed (see `without_layers`).
    """
    if "quantization_config" in shape.config:
        raise BadInput("The model is quantized already, and packed layers cannot be pruned; prune first.")
    before = shape.pretrained_config.to_dict()
    after = without_layers(shape.pretrained_config, removed).to_dict()
    # Take over only what changes, so that config.json keeps the rest as it was written.
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    tensors = {new: shape.tensors[old] for old, new in _renamed(shape, removed, shape.tensors).items()}
    return ModelShape(shape.config | changed, tensors, shape.folder)


def remove_layers(draft: Draft, removed: Collection[int]) -> dict[str, str]:
    """Remove layers from a draft that still has all layers of its parent, changed or not.

    Returns:
        Old name -> new name of every tensor that is kept.

    Raises:
        BadInput: as `plan_without_layers`.
    """
    before = ModelShape.of(draft.parent)
    after = plan_without_layers(before, removed)
    renamed = _renamed(before, removed, draft.tensors)
    draft.rename(renamed)
    draft.config = after.config
    return renamed


def _renamed(shape: ModelShape, removed: Collection[int], names: Iterable[str]) -> dict[str, str]:
    """Old name -> new name of every one of the tensors ``names`` that is kept."""
    kept = [index for index in range(shape.num_layers) if index not in removed]
    number = {str(old): new for new, old in enumerate(kept)}
    prefix = shape.anatomy.in_model(shape.anatomy.layers) + "."
    renamed = {}
    for name in names:
        if not name.startswith(prefix):
            renamed[name] = name
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if index in number:
            renamed[name] = f"{prefix}{number[index]}.{rest}"
    return renamed
