"""K-prune (ICLR 2024): prune heads and neurons by the knowledge they hold, without retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from compress.anatomy import set_weight, task_of, weight
from compress.calibration.text.settings import TextSize
from compress.engine.activations import Activations
from compress.engine.backward import Tape
from compress.engine.stream import Layer, Seen, StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.budget import affordable, at_least, planned, steps_of
from compress.pruning.parts.knowledge import Divergence, Sublayer, measure_knowledge, sublayers_of
from compress.pruning.parts.options import WidthMultiple
from compress.pruning.parts.refit import Fit, choose_damping, halves_of, observe_sublayers
from compress.pruning.parts.width import Kept, bias_of, finish, narrow, plan_widths, write_layer
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.method import StepContext


class KPrune(Method["KPrune.Options"]):
    """Prune the sublayers bottom-up, and repair each one before the next (section 4).

    The sublayers l = 0 .. 2L-1 are the attention and the MLP of every layer. Their units are attention heads
    (with grouped-query attention: key-value heads with their query heads) and neurons. The budget B is the
    number of FLOPs that all layers together keep. With the dense model as the teacher T, for every l:

    1. Knowledge of every unit of the sublayers >= l in the student S, the model pruned so far:
       K_pred = mean over samples of (1/2) (dKL/dm)^2, where m is a mask on a channel of the unit and
       KL = g^2 KL(softmax(z_T / g) || softmax(z_S / g)); K_rep = mean over tokens of a^2, times mean W_out^2.
       The score of a unit is (lambda_rep K_rep + lambda_pred K_pred) / F, with F its FLOPs, and for heads mu
       times that. K of a head is the mean over its channels, and K of a key-value head the sum over its query
       heads.
    2. Knowledge-preserving mask search: the units of sublayers >= l with the lowest scores are dropped until
       the others fit B. This decides for sublayer l only; then B is lowered by the FLOPs of its kept units.
    3. Knowledge-preserving weight tuning: W_out = argmin |A W - (X_T + Sub_T(X_T) - X_S - b)|^2 over the
       real tokens, with A the inputs of the kept channels in the student, X the residual stream before the
       sublayer (in post-norm models the sum is taken before the norm) and b the bias, which stays. It is
       solved from float64 Grams, while the text goes through both models in lockstep. A sublayer without
       units adds nothing.

    Units are scored one by one, so a layer can lose all its heads although each of them alone was expendable.
    At high ratios this breaks a model, so ``min_heads`` keeps one head in every layer; 0 is the published
    method.

    Differences from the published code: units are dropped in bundles, so that widths stay multiples that
    quantization can use (``width_multiple: 1`` drops them one by one); gradients are squared for each sample
    separately, so the batch size does not matter; padding is masked everywhere; every sublayer behind the
    first pruned one is tuned, even if it is not pruned itself. The tuning is damped: W_out is fitted to each
    half of the calibration windows and checked on the other half, which decides how strongly it keeps its old
    value, from not at all (as published) to entirely. Otherwise, on fewer tokens than channels, least squares
    would reproduce the teacher on these tokens and fail on all other text. While nothing is pruned yet, S is
    T and the gradient of the KL is zero, so the published K_pred of the first sublayer is zero; here the
    second-order term of the KL, which (1/2) (dKL/dm)^2 approximates, is computed from the Fisher information
    instead (see `Divergence.scores`). Decoders are pruned by the KL of their next-token predictions. Models
    with a norm on a block's output before it is added (Gemma) are not tuned, because the target is not linear
    in W_out.
    """

    name = "kprune"
    family = "pruning"
    paper = Paper(
        "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models", "2308.03449"
    )
    text_size = TextSize(8, 512)

    class Options(WidthMultiple):
        renamed: ClassVar[Mapping[str, str]] = {"ridge": "damping"}

        ratio: float = Field(ge=0, lt=1, description="share to remove of the FLOPs of all layers")
        lambda_rep: NonNegativeFloat = Field(2.5e-4, description="weight of representational knowledge")
        lambda_pred: NonNegativeFloat = Field(1.0, description="weight of predictive knowledge")
        mu: float = Field(64.0, gt=0, description="weight of a head's score relative to a neuron's")
        temperature: float = Field(2.0, gt=0, description="temperature of the softmax in the KL divergence")
        min_heads: NonNegativeInt = Field(
            1,
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
                "K-prune compares predictions, so it needs a causal language model, or an encoder with a "
                "head for sequence classification, token classification, question answering or masked words."
            )
        # The text decides which units go, and so does the number of tokens, on which the FLOPs of heads
        # depend. With one token heads are cheapest, so what is too much then is always too much.
        sublayers = sublayers_of(config, 1)
        steps = _steps(sublayers, options)
        return plan_widths(
            shape, planned(sublayers, steps, options.ratio, options.min_heads, shape.num_layers)
        )

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        windows = context.calibration
        assert windows is not None  # the method needs calibration
        sublayers = sublayers_of(model.config, windows.tokens.shape[1])
        steps = _steps(sublayers, options)
        total = sum(sublayer.total for sublayer in sublayers)
        journal = context.journal("prune")
        journal.state["budget"] = torch.tensor(total - round(options.ratio * total))
        pruning = Pruning(model, windows, sublayers, steps, journal.state, options, context)
        # Gradients go back from the last layer to the present one, so a layer takes as long as are left.
        walk = model.walk(
            journal, pruning.dense, pruning.student, label="pruning", share=lambda done: 1 - (1 - done) ** 2
        )
        for layer in walk:
            held = pruning.prune(layer)
            pruning.student.advance(held)
            write_layer(context.draft, model, held)
        kept = [pruning.kept(index) for index in range(model.num_layers)]
        finish(context.draft, model, kept)
        left = sum(sublayer.flops * len(pruning.units(sublayer)) for sublayer in sublayers)
        dampings = {_key(sublayer): journal.state.get(f"damping.{_key(sublayer)}") for sublayer in sublayers}
        heads, neurons = [len(units.groups) for units in kept], [len(units.neurons) for units in kept]
        details = {
            "tokens": windows.num_tokens,
            "sequence_length": windows.tokens.shape[1],
            "flops_before": total,
            "flops_after": left,
            "heads": heads,
            "neurons": neurons,
            "dampings": {name: value.item() for name, value in dampings.items() if value is not None},
        }
        how = (
            "refitted the output projections" if options.tune else "left the output projections as they were"
        )
        summary = (
            f"kept {sum(heads)} key-value heads and {sum(neurons)} neurons, {left / total:.1%} of the "
            f"layers' FLOPs at {windows.tokens.shape[1]} tokens, and {how}."
        )
        return StepReport(summary, details)


def _steps(sublayers: Sequence[Sublayer], options: KPrune.Options) -> list[int]:
    """How many units of each sublayer go together.

    Raises:
        BadInput: the heads that every layer keeps take more than the ratio leaves.
    """
    steps = steps_of(sublayers, options)
    total = sum(sublayer.total for sublayer in sublayers)
    least = sum(
        at_least(sublayer, step, options.min_heads) * sublayer.flops
        for sublayer, step in zip(sublayers, steps, strict=True)
    )
    if least > (1 - options.ratio) * total:
        raise BadInput(
            f"A ratio of {options.ratio:g} is too much: the {options.min_heads} key-value heads that every "
            f"layer keeps take {least / total:.1%} of the FLOPs; use a smaller ratio, min_heads or "
            "width_multiple."
        )
    return steps


class Pruning:
    """K-prune at work: the text goes through the dense model and the student in lockstep.

    Args:
        model: the dense model.
        windows: the calibration text.
        sublayers: the sublayers of the model, bottom-up.
        steps: for every sublayer how many units go together.
        state: of the journal: ``budget``, bool [units] for every sublayer that has been pruned, and the
            damping of those that were tuned, -1 where the present values were better than any.
        options: options of the method.
        context: seed, folder and journals.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Windows,
        sublayers: Sequence[Sublayer],
        steps: Sequence[int],
        state: dict[str, torch.Tensor],
        options: KPrune.Options,
        context: StepContext,
    ) -> None:
        self.model, self.windows, self.sublayers, self.steps = model, windows, sublayers, steps
        self.state, self.options, self.context = state, options, context
        self.divergence = Divergence(model.config, windows, options.temperature, context.seed)
        self.teacher = self._teacher() if options.ratio else None
        self.dense, self.student = (
            model.stream(windows, context.folder / name) for name in ("dense", "student")
        )
        shape, room = self.dense.hidden.shape, context.folder / "targets"
        names = ("attention", "mlp", "scratch")
        held = {name: Activations(shape, room / name, device=model.device) for name in names}
        self.scratch = held.pop("scratch")
        self.targets = held
        self.halves = halves_of(windows)
        if options.ratio and options.tune and options.damping is None and len(windows) < 2:
            raise BadInput("With one calibration window none can be held out; use more, or set damping.")

    def _teacher(self) -> Activations:
        """The dense model's hidden states behind its last layer."""
        stream = self.model.stream(self.windows, self.context.folder / "teacher")
        for layer in self.model.walk(
            self.context.journal("teacher"), stream, label="running the dense model"
        ):
            stream.advance(layer)
        return stream.hidden

    def prune(self, layer: Layer) -> Layer:
        """Advance the dense stream, and return the student's layer, pruned and tuned."""
        self.dense.advance(layer, observe_sublayers(self.model.anatomy, self.dense, layer, self._keep_target))
        for target in self.targets.values():
            target.flip()
        held = replace(layer)
        tuned: dict[str, Tensor] = {}
        for number, sublayer in enumerate(self.sublayers):
            if sublayer.index != layer.index:
                continue
            mask = self.search(number, held)
            self.state[_key(sublayer)] = mask
            self.state["budget"] = self.state["budget"] - sublayer.flops * mask.sum()
            if not mask.all():
                held = replace(layer)
                narrow(self.model, held, self.kept(layer.index))
                for path, matrix in tuned.items():
                    set_weight(held.linears[path], matrix)
            if self.options.tune and self.pruned and mask.any():
                tuned[sublayer.path] = self.tune(held, sublayer)
                set_weight(held.linears[sublayer.path], tuned[sublayer.path])
        return held

    def _keep_target(self, name: str, seen: Seen, residual: Tensor) -> None:
        self.targets[name].write(seen.start, residual + seen.output)

    @property
    def pruned(self) -> bool:
        """Whether the student has lost a unit so far; until then it is the same model as the teacher."""
        masks = (self.state[_key(sublayer)] for sublayer in self.sublayers if _key(sublayer) in self.state)
        return not all(mask.all() for mask in masks)

    def units(self, sublayer: Sublayer) -> Tensor:
        """Indices of the units of a sublayer that stay; all of them until it is pruned."""
        mask = self.state.get(_key(sublayer))
        return torch.arange(len(sublayer.channels)) if mask is None else mask.nonzero()[:, 0]

    def kept(self, index: int) -> Kept:
        """The units of layer ``index`` that stay."""
        found = {
            sublayer.name: self.units(sublayer) for sublayer in self.sublayers if sublayer.index == index
        }
        none = torch.arange(0)
        return Kept(found.get("attention", none), found.get("mlp", none))

    def search(self, number: int, held: Layer) -> Tensor:
        """Decide which units of the sublayer ``number``, the first that is not pruned, stay: bool [units].

        ``held`` is the student's layer that it is in.
        """
        budget, sublayers = int(self.state["budget"]), self.sublayers[number:]
        if sum(sublayer.total for sublayer in sublayers) <= budget:
            return torch.ones(len(sublayers[0].channels), dtype=torch.bool)
        tape = Tape(self.model, self.student, self.context.folder / "tape", held)
        found = measure_knowledge(tape, sublayers, self.divergence, self.teacher if self.pruned else None)
        scores = []
        for sublayer, known in zip(sublayers, found, strict=True):
            total = (
                self.options.lambda_rep * known.representational + self.options.lambda_pred * known.predictive
            )
            if sublayer.name == "attention":
                total *= self.options.mu
                total[total.topk(min(self.options.min_heads, len(total))).indices] = torch.inf
            scores.append(total / sublayer.flops)
        flops = [sublayer.flops for sublayer in sublayers]
        return affordable(scores, flops, budget, self.steps[number:])[0]

    def tune(self, held: Layer, sublayer: Sublayer) -> Tensor:
        """Refit W_out to the dense stream: [out, kept channels], rounded to the dtype it is stored in.

        Raises:
            CompressError: it is not finite in the dtype the model is stored in.
        """
        linear = held.linears[sublayer.path]
        present, bias = weight(linear).double().T, bias_of(linear)
        fits = [Fit(present), Fit(present)]

        def add(name: str, seen: Seen, residual: Tensor) -> None:
            if name != sublayer.name:
                return
            a, start, mask = seen.inputs, seen.start, seen.mask
            target = self.targets[name].read(start, start + len(a)).to(a)
            for half, fit in enumerate(fits):
                chosen = mask & (self.halves[start : start + len(a), None] == half).to(mask.device)
                wanted = (target - residual)[chosen].double()
                if bias is not None:
                    wanted -= bias
                fit.add(a[chosen].double(), wanted)

        observers = observe_sublayers(self.model.anatomy, self.student, held, add)
        self.student.advance(held, observers, into=self.scratch)
        damping = choose_damping(fits) if self.options.damping is None else self.options.damping
        self.state[f"damping.{_key(sublayer)}"] = torch.tensor(-1 if damping is None else damping).double()
        fitted = present if damping is None else (fits[0] + fits[1]).solve(damping)
        stored = held.stored(sublayer.path)
        assert stored is not None
        new = fitted.T.to(DTYPES[self.model.checkpoint.tensors[stored].dtype])
        if not torch.isfinite(new).all():
            raise CompressError(
                f"The refitted '{sublayer.path}' of layer {held.index} is not finite in the dtype of the "
                "model; use more calibration text, or set tune to false."
            )
        return new.float()


def _key(sublayer: Sublayer) -> str:
    return f"{sublayer.name}.{sublayer.index}"
