"""Refit output projections (of attention and MLP) by least squares, so that a model follows the dense one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.anatomy import Anatomy, layer_shapes, set_weight, weight
from compress.engine.activations import Activations
from compress.engine.stream import Layer, Observer, Seen, Stream, StreamedModel
from compress.engine.windows import Windows
from compress.pruning.parts.blocks import PARTS, Part
from compress.pruning.parts.width import Kept, bias_of, narrow, write_layer
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.method import StepContext

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class Fit:
    """Least squares from Grams: the W that minimises |A W - Y|^2 + r mean_k |A_k|^2 |W - present|^2.

    Args:
        present: float64 [k, out], the value that W should stay near.
    """

    def __init__(self, present: Tensor) -> None:
        self.present = present
        self.gram = present.new_zeros(len(present), len(present))  # A^T A
        self.rest = torch.zeros_like(present)  # A^T (Y - A present)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """Add rows of A [rows, k] and Y [rows, out], float64."""
        self.gram.addmm_(inputs.T, inputs)
        self.rest.addmm_(inputs.T, wanted - inputs @ self.present)

    def __add__(self, other: Fit) -> Fit:
        both = Fit(self.present)
        both.gram, both.rest = self.gram + other.gram, self.rest + other.rest
        return both

    @property
    def regular(self) -> bool:
        """Whether W is unique without damping; it never is with fewer rows than channels."""
        scale = self.gram.diagonal().sqrt()
        factor, failed = torch.linalg.cholesky_ex(self.gram / scale.outer(scale))
        return not failed and bool(factor.diagonal().min().square() > self._tolerance)

    def solve(self, damping: float) -> Tensor:
        """W for r = ``damping``: float64 [k, out]. Of several solutions, the one nearest to ``present``."""
        if damping or self.regular:
            held = self.gram.clone()
            held.diagonal().add_(damping * self.gram.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(held)
            if not failed:
                return self.present + torch.cholesky_solve(self.rest, factor)
        values, vectors = torch.linalg.eigh(self.gram)
        seen = values > self._tolerance * values[-1]
        values, vectors = values[seen], vectors[:, seen]
        return self.present + vectors @ (vectors.T @ self.rest / values[:, None])

    def gain(self, matrix: Tensor) -> float:
        """How much smaller the squared error on these rows is with ``matrix`` than with ``present``."""
        change = matrix - self.present
        return float((change * (2 * self.rest - self.gram @ change)).sum())

    @property
    def _tolerance(self) -> float:
        return len(self.gram) * torch.finfo(self.gram.dtype).eps


def choose_damping(fits: Sequence[Fit]) -> float | None:
    """The one of `DAMPINGS` whose W, fitted to one half of the text, has the least error on the other half.

    The errors of both ways are added. No damping (0) is tried only if its solution is unique.

    Returns:
        The damping, or None if the present W is better than all others.
    """
    one, other = fits
    gains = {
        damping: other.gain(one.solve(damping)) + one.gain(other.solve(damping))
        for damping in DAMPINGS
        if damping or (one.regular and other.regular)
    }
    best = max(gains, key=gains.__getitem__)
    return best if gains[best] > 0 else None


def halves_of(windows: Windows) -> Tensor:
    """Split the windows: 0 or 1 for each, int64 [N], equally often, and independent of their order."""
    rows = [tokens[mask].tolist() for tokens, mask in zip(windows.tokens, windows.mask, strict=True)]
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))
    return torch.zeros(len(rows), dtype=torch.int64).scatter_(0, order, torch.arange(len(rows)) % 2)


Take = Callable[[str, Seen, Tensor], None]
"""Called with the name of a sublayer, what its output projection computed, and the residual stream before the
sublayer [B, S, D]."""


def observe_sublayers(anatomy: Anatomy, stream: Stream, layer: Layer, take: Take) -> dict[str, Observer]:
    """Observers for `Stream.advance` that show both sublayers of a layer to ``take``."""
    between: dict[int, Tensor] = {}  # the residual stream before the MLP

    def before(output: Tensor, start: int) -> Tensor:
        return stream.hidden.read(start, start + len(output)).to(output)

    def attention(seen: Seen) -> None:
        residual = before(seen.output, seen.start)
        if anatomy.norm_first:
            between[seen.start] = residual + seen.output
        take("attention", seen, residual)

    def norm(seen: Seen) -> None:
        between[seen.start] = seen.output

    def mlp(seen: Seen) -> None:
        residual = between.pop(seen.start) if seen.start in between else before(seen.output, seen.start)
        take("mlp", seen, residual)

    observers: dict[str, Observer] = {anatomy.attention_output: attention, anatomy.down: mlp}
    observers = {path: observer for path, observer in observers.items() if path in layer.linears}
    if not anatomy.norm_first:
        observers[anatomy.attention_norm] = norm
    return observers


def prune_and_follow(
    model: StreamedModel,
    kept: Mapping[int, Kept],
    removed: Collection[int],
    damping: float,
    context: StepContext,
) -> None:
    """Narrow layers, leave others out, and refit what stays so that the hidden states follow the dense ones.

    The text goes through the dense model T and the pruned model S in lockstep. With X the hidden states
    before a block, b the bias of its output projection W, which stays, and A the inputs of W in S,

        W = argmin |A W - (Y_T - X_S - b)|^2 + r |W - W_present|^2,   r = damping * mean diagonal of A^T A,

    where Y_T are the dense hidden states behind the block. For an MLP before layers that are left out they
    are those behind the last of these, so that it takes over what they did. Layers in front of the first
    change are not touched. Everything is written to ``context.draft``, with the names of the dense model.

    Args:
        model: the dense model, whose blocks simply add their outputs to the hidden states.
        kept: the units that stay, of every layer that is not ``removed``.
        removed: layers that are left out; not the first.
        damping: how strongly W keeps its present value.
        context: takes the result, and has the calibration text.

    Raises:
        CompressError: a new weight is not finite in the dtype the model is stored in.
    """
    first = _first_change(model, kept, removed)
    dense, pruned = (model.stream(context.calibration, context.folder / name) for name in ("dense", "pruned"))
    behind = Activations(dense.hidden.shape, context.folder / "behind-attention", device=model.device)

    def keep_target(name: str, seen: Seen, residual: Tensor) -> None:
        if name == "attention":
            behind.write(seen.start, residual + seen.output)

    for layer in model.walk(context.journal("pruning"), dense, pruned, label="pruning"):
        if layer.index in removed:
            continue
        dense.advance(layer, observe_sublayers(model.anatomy, dense, layer, keep_target))
        behind.flip()
        following = layer.index + 1
        while following in removed:
            with model.layer(following) as gone:
                dense.advance(gone)
            following += 1
        if layer.index >= first:
            held = replace(layer)
            narrow(model, held, kept[layer.index])
            for part, target in zip(PARTS, (behind, dense.hidden), strict=True):
                _refit(model, held, part, target, pruned, damping)
            layer = held
        pruned.advance(layer)
        write_layer(context.draft, model, layer)


def _first_change(model: StreamedModel, kept: Mapping[int, Kept], removed: Collection[int]) -> int:
    """The first layer that loses units, or that stands before a removed one; num_layers if there is none."""
    shapes = layer_shapes(model.config)
    narrowed = (index for index, units in kept.items() if units.shape(shapes[index]) != shapes[index])
    return min((*narrowed, *(index - 1 for index in removed)), default=model.num_layers)


def _refit(
    model: StreamedModel, layer: Layer, part: Part, target: Activations, stream: Stream, damping: float
) -> None:
    """Fit a block's output projection to the hidden states ``target`` behind it; nothing if it has none."""
    path = model.anatomy.attention_output if part == "attention" else model.anatomy.down
    if path not in layer.linears:
        return
    linear = layer.linears[path]
    fit, bias = Fit(weight(linear).double().T), bias_of(linear)

    def add(name: str, seen: Seen, residual: Tensor) -> None:
        if name == part:
            wanted = target.read(seen.start, seen.start + len(residual)).to(residual) - residual
            real = seen.real(wanted).double()
            fit.add(seen.real(seen.inputs).double(), real if bias is None else real - bias.double())

    observers = observe_sublayers(model.anatomy, stream, layer, add)
    if part == "attention":  # nothing behind it is needed
        observers.pop(model.anatomy.down, None)
    stream.look(layer, observers)
    stored = layer.stored(path)
    assert stored is not None
    dtype = DTYPES[model.checkpoint.tensors[stored].dtype]
    set_weight(linear, fit.solve(damping).T.to(dtype).float())
