"""K-prune (ICLR 2024): heads and neurons pruned by the knowledge they hold, without retraining."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from compress.anatomy import Anatomy, layer_shapes, set_weight, task_of, weight
from compress.engine.activations import Activations
from compress.engine.backward import Tape
from compress.engine.stream import Layer, Observer, Seen, Stream, StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.pruning.parts.knowledge import Block, Divergence, blocks_of, measure
from compress.pruning.parts.width import Kept, finish, narrow, plan_widths, write_layer
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.method import StepContext


class KPrune(Method["KPrune.Options"]):
    """Prune the sublayers bottom-up, and repair each before the next (section 4).

    The sublayers l = 0 .. 2L-1 are the attention and the MLP of every layer, their units attention heads
    (under grouped-query attention: key-value heads with their query heads) and neurons. The budget B is the
    share of the layers' FLOPs that is to stay. With the dense model as the teacher T, for every l:

    1. Knowledge of every unit of the sublayers >= l in the student S, the model pruned so far:
       K_pred = mean over samples of (1/2) (dKL/dm)^2, where m is a mask on a channel of the unit and
       KL = g^2 KL(softmax(z_T / g) || softmax(z_S / g)); K_rep = mean over tokens of a^2, times mean W_out^2.
       Score = (lambda_rep K_rep + lambda_pred K_pred) / F, with F the unit's FLOPs; of heads mu times that.
       K is the mean over the channels of a head, and of a key-value head the sum over its query heads.
    2. Knowledge-preserving mask search: the lowest scores of all units of sublayers >= l are dropped until
       what is left fits B. This decides for sublayer l only; B is lowered by what stays of it.
    3. Knowledge-preserving weight tuning: W_out = argmin |A W - (X_T + Sub_T(X_T) - X_S - b)|^2 over the
       real tokens, with A the inputs of the kept channels in the student, X the residual stream before the
       sublayer (in post-norm models the sum is taken before the norm) and b the bias, which stays. From
       float64 Grams, with both streams in lockstep. A sublayer that nothing is left of adds nothing.

    Scores are of single units, so all heads of a layer can go where each of them could: a classifier that was
    to lose 80 % of its FLOPs lost all heads of its last layers, and said the same of every text. With
    ``min_heads`` of 1 it did not.

    Differences from the published code: gradients are squared for each sample on its own, so the batch size
    does not matter; padding is masked everywhere; every sublayer behind the first pruned one is tuned, pruned
    or not, but not at any price: each half of the calibration windows tells how strongly a W_out fitted to
    the other half should be held to its present value, from not at all (as published) to altogether. Plain
    least squares on fewer tokens than channels reproduces the teacher on them and nowhere else: on 1,024
    tokens of Brown it took the demo model to a perplexity of millions on Wikipedia. While nothing is pruned
    yet, S is T and the gradient of the KL is zero, so that the published K_pred of the first sublayer is
    nothing at all; here it is what (1/2) (dKL/dm)^2 stands for, the second-order term of the KL, known there
    by the Fisher information (see `Divergence.scores`). Decoders are pruned by the KL of their next-token
    predictions. Where a norm acts on a block's output before it is added (Gemma), tuning is refused: the
    target is not linear in W_out.
    """

    name = "kprune"
    family = "pruning"
    paper = Paper(
        "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models", "2308.03449"
    )

    class Options(MethodOptions):
        renamed: ClassVar[Mapping[str, str]] = {"ridge": "damping"}

        ratio: float = Field(ge=0, lt=1, description="share to remove of the FLOPs of all layers")
        lambda_rep: NonNegativeFloat = Field(2.5e-4, description="weight of representational knowledge")
        lambda_pred: NonNegativeFloat = Field(1.0, description="weight of predictive knowledge")
        mu: float = Field(64.0, gt=0, description="weight of a head's score relative to a neuron's")
        temperature: float = Field(2.0, gt=0, description="temperature of the softmax in the KL divergence")
        min_heads: NonNegativeInt = Field(
            0,
            description="every layer keeps at least this many key-value heads, whatever their scores; 0 is "
            "the published method",
        )
        tune: bool = Field(True, description="refit the output projections after pruning")
        damping: NonNegativeFloat | None = Field(
            None,
            description="how strongly the refit keeps the old weights: added to the diagonal of the Gram "
            "matrix of the inputs, as a share of its mean; 0 is the published method; by default it is "
            "chosen on held-out calibration windows",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        anatomy, config = shape.anatomy, shape.pretrained_config
        if options.tune and (obstacle := anatomy.refit_obstacle):
            raise BadInput(f"{obstacle} Use 'tune: false', or another method.")
        if anatomy.head is None and (anatomy.kind == "decoder" or task_of(config) is None):
            raise BadInput(
                "K-prune compares predictions: it prunes causal language models, and encoders with a head "
                "for sequence classification, token classification, question answering or masked words."
            )
        # Which units go is decided by data; this is an even spread, but for one neuron, as widths differ.
        before = layer_shapes(config)
        kept = [
            Kept(*(torch.arange(round(count * (1 - options.ratio))) for count in counts))
            for counts in ((layer.num_key_value_heads, layer.intermediate_size) for layer in before)
        ]
        if 0 < len(kept[0].neurons) < before[0].intermediate_size and len(kept) > 1:
            kept[0] = replace(kept[0], neurons=torch.arange(len(kept[0].neurons) + 1))
        return plan_widths(shape, kept)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        windows = context.calibration
        blocks = blocks_of(model.config, windows.tokens.shape[1])
        total = sum(block.total for block in blocks)
        journal = context.journal("prune")
        journal.state["budget"] = torch.tensor(total - round(options.ratio * total))
        pruning = Pruning(model, blocks, journal.state, options, context)
        for layer in model.walk(journal, pruning.dense, pruning.student, label="pruning"):
            held = pruning.prune(layer)
            pruning.student.advance(held)
            write_layer(context.draft, model, held)
        kept = [pruning.kept(index) for index in range(model.num_layers)]
        finish(context.draft, model, kept)
        left = sum(block.flops * len(pruning.units(block)) for block in blocks)
        dampings = {_key(block): journal.state.get(f"damping.{_key(block)}") for block in blocks}
        details = {
            "tokens": windows.num_tokens,
            "sequence_length": windows.tokens.shape[1],
            "flops_before": total,
            "flops_after": left,
            "heads": [len(units.groups) for units in kept],
            "neurons": [len(units.neurons) for units in kept],
            "dampings": {name: value.item() for name, value in dampings.items() if value is not None},
        }
        heads, neurons = sum(details["heads"]), sum(details["neurons"])
        how = (
            "refitted the output projections" if options.tune else "left the output projections as they were"
        )
        summary = (
            f"kept {heads} key-value heads and {neurons} neurons, {left / total:.1%} of the layers' FLOPs at "
            f"{details['sequence_length']} tokens, and {how}."
        )
        return StepReport(summary, details)


class Pruning:
    """One run of K-prune: the streams of the dense model and of the student in lockstep, before one layer.

    Args:
        model: the dense model.
        blocks: its sublayers bottom-up.
        state: of the journal: ``budget``, bool [units] for every block that has been pruned, and the damping
            of those that were tuned, -1 where the present values were better than any.
        options: of the method.
        context: calibration text, and room for files.
    """

    def __init__(
        self,
        model: StreamedModel,
        blocks: Sequence[Block],
        state: dict[str, torch.Tensor],
        options: KPrune.Options,
        context: StepContext,
    ) -> None:
        self.model, self.blocks, self.state, self.options, self.context = (
            model,
            blocks,
            state,
            options,
            context,
        )
        windows = context.calibration
        self.divergence = Divergence(model.config, windows, options.temperature, context.seed)
        self.teacher = self._teacher() if options.ratio else None
        self.dense, self.student = (
            model.stream(windows, context.folder / name) for name in ("dense", "student")
        )
        shape, room = self.dense.hidden.shape, context.folder / "targets"
        self.targets = {name: Activations(shape, room / name) for name in ("attention", "mlp")}
        self.scratch = Activations(shape, room / "scratch")
        self.halves = halves_of(windows)
        if options.ratio and options.tune and options.damping is None and len(windows) < 2:
            raise BadInput("With one calibration window none can be held out; use more, or give a damping.")

    def _teacher(self) -> Activations:
        """The dense model's hidden states behind its last layer."""
        stream = self.model.stream(self.context.calibration, self.context.folder / "teacher")
        for layer in self.model.walk(
            self.context.journal("teacher"), stream, label="running the dense model"
        ):
            stream.advance(layer)
        return stream.hidden

    def prune(self, layer: Layer) -> Layer:
        """The student's layer, pruned and tuned; the dense stream advances."""
        self.dense.advance(layer, observe_blocks(self.model.anatomy, self.dense, layer, self._keep_target))
        for target in self.targets.values():
            target.flip()
        held, tuned = replace(layer), {}
        for number, block in enumerate(self.blocks):
            if block.index != layer.index:
                continue
            mask = self.search(self.blocks[number:], held)
            self.state[_key(block)] = mask
            self.state["budget"] = self.state["budget"] - block.flops * mask.sum()
            if not mask.all():
                held = replace(layer)
                narrow(self.model, held, self.kept(layer.index))
                for path, matrix in tuned.items():
                    set_weight(held.linears[path], matrix)
            if self.options.tune and self.pruned and mask.any():
                tuned[block.path] = self.tune(held, block)
                set_weight(held.linears[block.path], tuned[block.path])
        return held

    def _keep_target(self, name: str, seen: Seen, residual: Tensor) -> None:
        self.targets[name].write(seen.start, residual + seen.output)

    @property
    def pruned(self) -> bool:
        """Whether the student has lost anything so far; as long as it has not, it is the teacher."""
        masks = (self.state[_key(block)] for block in self.blocks if _key(block) in self.state)
        return not all(mask.all() for mask in masks)

    def units(self, block: Block) -> Tensor:
        """Indices of the units of a block that stay; all while it is not pruned yet."""
        return self.state.get(_key(block), torch.ones(len(block.channels), dtype=torch.bool)).nonzero()[:, 0]

    def kept(self, index: int) -> Kept:
        """What stays of layer ``index``."""
        found = {block.name: self.units(block) for block in self.blocks if block.index == index}
        none = torch.arange(0)
        return Kept(found.get("attention", none), found.get("mlp", none))

    def search(self, blocks: Sequence[Block], held: Layer) -> Tensor:
        """Which units of the first of the ``blocks``, all that are not pruned yet, stay: bool [units]."""
        budget = int(self.state["budget"])
        if sum(block.total for block in blocks) <= budget:
            return torch.ones(len(blocks[0].channels), dtype=torch.bool)
        tape = Tape(self.model, self.student, self.context.folder / "tape", held)
        found = measure(tape, blocks, self.divergence, self.teacher if self.pruned else None)
        scores = []
        for block, known in zip(blocks, found, strict=True):
            total = (
                self.options.lambda_rep * known.representational + self.options.lambda_pred * known.predictive
            )
            if block.name == "attention":
                total *= self.options.mu
                total[total.topk(min(self.options.min_heads, len(total))).indices] = torch.inf
            scores.append(total / block.flops)
        return affordable(scores, [block.flops for block in blocks], budget)[0]

    def tune(self, held: Layer, block: Block) -> Tensor:
        """W_out refitted to the dense stream, as it will be stored: [out, kept channels].

        Raises:
            CompressError: it is not finite in the dtype the model is stored in.
        """
        linear = held.linears[block.path]
        present = weight(linear).double().T
        fits = [Fit(present), Fit(present)]

        def add(name: str, seen: Seen, residual: Tensor) -> None:
            if name != block.name:
                return
            a, start, mask = seen.inputs, seen.start, seen.mask
            target = self.targets[name].read(start, start + len(a)).to(a)
            for half, fit in enumerate(fits):
                chosen = mask & (self.halves[start : start + len(a), None] == half).to(mask.device)
                wanted = (target - residual)[chosen].double()
                if linear.bias is not None:
                    wanted -= linear.bias
                fit.add(a[chosen].double(), wanted)

        observers = observe_blocks(self.model.anatomy, self.student, held, add)
        self.student.advance(held, observers, into=self.scratch)
        damping = choose_damping(fits) if self.options.damping is None else self.options.damping
        self.state[f"damping.{_key(block)}"] = torch.tensor(-1 if damping is None else damping).double()
        fitted = present if damping is None else (fits[0] + fits[1]).solve(damping)
        stored = held.stored(block.path)
        new = fitted.T.to(DTYPES[self.model.checkpoint.tensors[stored].dtype])
        if not torch.isfinite(new).all():
            raise CompressError(
                f"The refitted '{block.path}' of layer {held.index} is not finite in the dtype of the model; "
                "use more calibration text, or tune: false."
            )
        return new.float()


def affordable(scores: Sequence[Tensor], flops: Sequence[int], budget: int) -> list[Tensor]:
    """Knowledge-preserving mask search: drop the units of lowest score until the others fit the budget.

    Args:
        scores: [units] of every block.
        flops: of one unit of every block.
        budget: FLOPs that all units together may cost.

    Returns:
        bool [units] for every block, True for what stays.
    """
    costs = torch.cat([torch.full((len(each),), cost) for each, cost in zip(scores, flops, strict=True)])
    order = torch.cat(list(scores)).argsort(stable=True)
    left = costs.sum() - torch.cat([costs.new_zeros(1), costs[order].cumsum(0)])
    keep = torch.ones(len(costs), dtype=torch.bool)
    keep[order[: int((left > budget).sum())]] = False
    return list(keep.split([len(each) for each in scores]))


DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class Fit:
    """Least squares from Grams: W minimising |A W - Y|^2 + r mean_k |A_k|^2 |W - present|^2.

    Args:
        present: float64 [k, out], where W is held to.
    """

    def __init__(self, present: Tensor) -> None:
        self.present = present
        self.gram = present.new_zeros(len(present), len(present))  # A^T A
        self.rest = torch.zeros_like(present)  # A^T (Y - A present)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        """More rows of A [rows, k] and Y [rows, out], float64."""
        self.gram.addmm_(inputs.T, inputs)
        self.rest.addmm_(inputs.T, wanted - inputs @ self.present)

    def __add__(self, other: Fit) -> Fit:
        both = Fit(self.present)
        both.gram, both.rest = self.gram + other.gram, self.rest + other.rest
        return both

    @property
    def regular(self) -> bool:
        """Whether there is only one W without a damping: never if there are fewer rows than channels."""
        scale = self.gram.diagonal().sqrt()
        factor, failed = torch.linalg.cholesky_ex(self.gram / scale.outer(scale))
        return not failed and bool(factor.diagonal().min().square() > self._tolerance)

    def solve(self, damping: float) -> Tensor:
        """W for r = ``damping``; without one, of several solutions the nearest to ``present``."""
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
        """By how much the squared error on these rows is smaller with ``matrix`` than with ``present``."""
        change = matrix - self.present
        return float((change * (2 * self.rest - self.gram @ change)).sum())

    @property
    def _tolerance(self) -> float:
        return len(self.gram) * torch.finfo(self.gram.dtype).eps


def choose_damping(fits: Sequence[Fit]) -> float | None:
    """Of DAMPINGS the one whose W, fitted to one half of the text, errs least on the other, both ways added.

    None if the present W is better than any. Without a damping only if that has one solution.
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
    """0 or 1 for each window, int64 [N], equally often, and the same in whatever order they come."""
    rows = [tokens[mask].tolist() for tokens, mask in zip(windows.tokens, windows.mask, strict=True)]
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))
    return torch.zeros(len(rows), dtype=torch.int64).scatter_(0, order, torch.arange(len(rows)) % 2)


Take = Callable[[str, Seen, Tensor], None]
"""Called with the name of a block, what its output projection computed, and the residual stream before the
block [B, S, D]."""


def observe_blocks(anatomy: Anatomy, stream: Stream, layer: Layer, take: Take) -> dict[str, Observer]:
    """Observers by which `Stream.advance` shows both blocks of a layer to ``take``."""
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


def _key(block: Block) -> str:
    return f"{block.name}.{block.index}"
