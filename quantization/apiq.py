"""ApiQ (EMNLP 2024): the clipping of low-bit grids and a low-rank adapter are learned together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from compress.anatomy import Anatomy, Sizes, anatomy_of, linears_by_input, set_weight, sizes_of, weight
from compress.calibration.statistics.fisher import Fisher, text_loss
from compress.calibration.statistics.hessian import Hessian
from compress.engine.activations import Activations
from compress.engine.inputs import advance_keeping
from compress.engine.stream import Seen
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.adapters import clipped_linear, plan_adapters
from compress.quantization.parts.clipped import ClippedLinear, descent
from compress.quantization.parts.layout import plan_packed
from compress.quantization.parts.linear_losses import LinearLoss, Saliency, cross_products
from compress.quantization.parts.options import WeightOptions
from compress.quantization.parts.packer import Packer
from compress.quantization.parts.state import StatePart
from compress.quantization.parts.substituted import Substituted
from compress.storage import adapter
from compress.system.memory import give_back_memory

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import Layer, Observer, Stream, StreamedModel
    from compress.method import StepContext


class ApiQ(Method["ApiQ.Options"]):
    """Learn how to clip groups of weights before rounding, and a low-rank adapter for the remaining error.

    A linear W [out, in] becomes Q = Ŵ + (alpha / r) B A, with A [r, in] and B [out, r]. In every group g, Ŵ
    lies on a low-bit grid between sigma(l) min(W_g) and sigma(u) max(W_g) (`ClippedLinear`). A, B, u and l
    are learned on two streams of calibration text: X has gone through the dense layers before, X_q through
    the quantized ones with their adapters.

    - layer-wise (ApiQ-lw): linear by linear in the order of the data flow, minimise the mean of
      (X W^T - X_q Q^T)^2 (`LinearLoss`), where X_q has passed the linears before, which are already
      quantized. No step touches a token, since two Gram matrices hold all that matters, and each step sees
      all tokens.
    - block-wise (ApiQ-bw): for all linears of a layer f at once, minimise the mean of (f(X) - f_q(X_q))^2
      and, with ``aug_loss``, that of (f(X_q) - f_q(X_q))^2, in minibatches.

    Both use AdamW with learning rates that fall linearly to 0. The best state seen on the calibration text is
    kept; plain rounding without an adapter is one of the candidates, so no loss gets worse. The default
    learning rates are for 100 steps; the paper makes 2560, with constant rates of 5e-3 and 5e-4.

    With ``saliency`` (Saliency-aware partial retraining, arXiv 2504.13932) lambda * sum F_ij (Ŵ_ij - W_ij)^2
    is added to the mean squared error. F is the diagonal Fisher information from squared gradients of
    windows, not of tokens (`Fisher`). ``before_lora`` trains only u and l with this term; ``after_lora`` has
    Q in the place of Ŵ.

    Adapters are stored in the dtype of the linear's weight if that has 16 bits, otherwise in float32, and
    only once, in the way that peft reads them (`compress.storage.adapter`).
    """

    name = "apiq"
    family = "quantization"
    paper = Paper("ApiQ: Finetuning of 2-Bit Quantized Large Language Model", "2402.05147")

    class Options(WeightOptions):
        renamed: ClassVar[Mapping[str, str]] = {
            "batch": "batch_size",
            "clip_lr": "clip_learning_rate",
            "lora_lr": "learning_rate",
        }

        mode: Literal["layer", "block"] = Field(
            "layer",
            description="what to match with the dense model: the output of each linear (layer), or of each "
            "layer of the model (block)",
        )
        rank: PositiveInt | None = Field(
            None,
            description="rank r of the adapters; by default a 64th of the model's width (the paper takes 64 "
            "for 4,096), rounded to a multiple of 8",
        )
        alpha: PositiveFloat = Field(16, description="adapters are multiplied by alpha / rank")
        learning_rate: PositiveFloat = Field(
            0.02, description="learning rate of the adapters at the first step"
        )
        clip_learning_rate: PositiveFloat = Field(
            0.2, description="learning rate of the clipping at the first step"
        )
        steps: PositiveInt = Field(
            100, description="layer-wise: number of steps for a linear, each on all the text"
        )
        epochs: PositiveInt = Field(4, description="block-wise: number of passes over the text for a layer")
        batch_size: PositiveInt = Field(1, description="block-wise: number of windows in a step")
        aug_loss: bool = Field(
            True, description="block-wise: match each layer with the dense one on its own inputs as well"
        )
        saliency: Literal["none", "before_lora", "after_lora"] = Field(
            "none",
            description="penalise errors of the weights by their Fisher information: of the weights without "
            "(before_lora) or with (after_lora) their adapters",
        )
        saliency_weight: PositiveFloat = Field(1e-3, description="factor lambda of the saliency penalty")

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        own = anatomy_of(shape.pretrained_config)
        if options.saliency != "none" and (own.kind != "decoder" or own.head is None):
            raise BadInput(
                "Saliency is measured with the loss of a language model, but this model does not predict "
                "tokens."
            )
        rank = rank_of(options, shape.sizes)
        return plan_adapters(shape, plan_packed(shape, options), rank, options.alpha)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        windows, rank = context.calibration, rank_of(options, sizes_of(model.config))
        length = windows.tokens.shape[1]
        size = {"batch_tokens": options.batch_size * length} if options.mode == "block" else {}
        dense = model.stream(windows, context.folder / "dense", **size)
        quantized = model.stream(windows, context.folder / "quantized", **size)
        fisher = None
        if options.saliency != "none":
            fisher = Fisher(model, windows, text_loss(windows), context.folder / "fisher")
        journal = context.journal("learning")
        packer = Packer(context.draft, options, StatePart(journal.state, "weight error"))
        losses = StatePart(journal.state, "loss")
        for layer in model.walk(journal, dense, quantized, label=f"ApiQ to {options.bits} bits"):
            generator = torch.Generator().manual_seed(context.seed * model.num_layers + layer.index)
            linears = {
                path: clipped_linear(
                    weight(layer.linears[path]), name, packer, rank, options.alpha, generator
                )
                for path, name in packer.wanted(layer).items()
            }
            information: Mapping[str, torch.Tensor] = fisher.read(layer) if fisher is not None else {}
            learning = Learning(
                model.anatomy,
                layer,
                linears,
                dense,
                quantized,
                information,
                options,
                context.folder / "targets",
                partial(_write, packer, layer),
            )
            found = learning.layer_wise() if options.mode == "layer" else learning.block_wise(generator)
            losses[str(layer.index)] = torch.tensor(found, dtype=torch.float64)
        return self._report(packer.finish(model, quantized), packer, losses, context, options, rank)

    @staticmethod
    def _report(
        report: StepReport,
        packer: Packer,
        losses: MutableMapping[str, torch.Tensor],
        context: StepContext,
        options: Options,
        rank: int,
    ) -> StepReport:
        """The report of the packed weights, to which the adapters and the losses by layer are added."""
        weights = sum(packer.before.tensors[f"{name}.weight"].numel for name in packer.errors)
        planned = ApiQ().plan(packer.before, options)
        context.draft.config[adapter.KEY] = planned.config[adapter.KEY]
        nbytes = sum(info.nbytes for name, info in planned.tensors.items() if adapter.is_adapter(name))
        bits = report.details["bits_per_weight"] + 8 * nbytes / weights
        by_layer = [losses[str(index)].tolist() for index in range(len(losses))]
        left = [after / before if before else 1.0 for before, after in by_layer]
        report.details |= {
            "adapter_bytes": nbytes,
            "bits_per_weight_with_adapter": round(bits, 4),
            "loss": {
                "plain_rounding": [before for before, _ in by_layer],
                "learned": [after for _, after in by_layer],
            },
        }
        report.summary += (
            f"; {bits:.2f} bits per weight with adapters of rank {rank}, and "
            f"{sum(left) / len(left):.1%} of plain rounding's loss on the calibration text"
        )
        return report


def rank_of(options: ApiQ.Options, sizes: Sizes) -> int:
    """The rank of the adapters."""
    return options.rank or 8 * max(1, round(sizes.hidden_size / 512))


class Learning:
    """Learns one layer. The layer holds the dense weights at first, and at last the weights that are stored.

    Args:
        anatomy: of the model.
        layer: in memory.
        linears: path inside the layer -> what takes the place of that linear.
        dense: the stream of X, before the layer.
        quantized: the stream of X_q, before the layer.
        fisher: path of a linear -> F [out, in], for its `Saliency`; empty if it is not wanted.
        options: of the method.
        folder: for targets above the memory limit.
        write: is given the path of each linear and what was learned, once that is final.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        layer: Layer,
        linears: dict[str, ClippedLinear],
        dense: Stream,
        quantized: Stream,
        fisher: Mapping[str, torch.Tensor],
        options: ApiQ.Options,
        folder: Path,
        write: Callable[[str, ClippedLinear], None],
    ) -> None:
        self.anatomy, self.layer, self.linears = anatomy, layer, linears
        self.dense, self.quantized = dense, quantized
        self.fisher, self.options, self.folder, self.write = fisher, options, folder, write
        self.rates = (options.clip_learning_rate, options.learning_rate)

    def layer_wise(self) -> tuple[float, float]:
        """Learn the linears one after another, and take both streams through the layer.

        Returns:
            The losses of plain rounding and of what was learned, each summed over the linears.
        """
        groups = linears_by_input(self.anatomy, self.linears)
        energies = dict.fromkeys(self.linears, 0.0)

        def observer(path: str) -> Observer:
            bias = dict(self.layer.linears[path].named_parameters()).get("bias")

            def observe(seen: Seen) -> None:
                product = seen.output if bias is None else seen.output - bias
                energies[path] += float(seen.real(product).square().sum(dtype=torch.float64))

            return observe

        observers = {path: observer(path) for path in self.linears}
        paths = [paths[0] for paths in groups]
        inputs = advance_keeping(self.dense, self.layer, paths, self.folder, observers)
        losses = []
        for paths in groups:
            hessian = Hessian(inputs[paths[0]])
            self.quantized.look(self.layer, {paths[0]: hessian.add})
            crossed = {path: cross_products(self.linears[path].weight, hessian) for path in paths}
            hessian.difference = None  # D is as large as G and no longer needed
            for path in paths:
                loss = LinearLoss(self.linears[path].weight, hessian, crossed.pop(path), energies[path])
                losses.append(self._learn(path, loss))
                set_weight(self.layer.linears[path], self.linears[path].stored())
                self.write(path, self.linears.pop(path))  # the dense weight goes, as the layer has another
            del loss
            give_back_memory()
        self.quantized.advance(self.layer)
        return sum(before for before, _ in losses), sum(after for _, after in losses)

    def _saliency(self, path: str) -> Saliency | None:
        """The term that is added to the loss of a linear."""
        options = self.options
        if options.saliency == "none":
            return None
        weight = self.linears[path].weight
        return Saliency(options.saliency, options.saliency_weight, self.fisher[path], weight)

    def _learn(self, path: str, loss: LinearLoss) -> tuple[float, float]:
        """Bring one linear to its best state. Returns the losses of plain rounding and of that state."""
        linear, saliency = self.linears[path], self._saliency(path)

        def of(state: dict[str, torch.Tensor]) -> float:
            linear.load(state)
            value = loss.exact(linear.stored())
            return value if saliency is None else value + saliency.exact(linear)

        begin, plain = linear.state(), linear.plain()
        if (before := of(plain)) <= loss.resolution:  # the grid holds the weights exactly, on equal inputs
            return max(before, 0.0), max(before, 0.0)
        linear.load(begin)
        lowest, best = float("inf"), begin
        step = descent([linear], self.options.steps, *self.rates)
        for number in range(self.options.steps + 1):
            if (value := _differentiate(linear, loss, saliency, before)) < lowest:
                lowest, best = value, linear.state()
            if number < self.options.steps:
                step()
        after = of(best)
        return before, after if after < before else of(plain)

    def block_wise(self, generator: torch.Generator) -> tuple[float, float]:
        """Learn all linears at once, and take both streams through the layer.

        Args:
            generator: for the order of the minibatches.

        Returns:
            The losses of plain rounding and of what was learned.
        """
        layer, stream, linears = self.layer, self.quantized, self.linears
        targets = [self.dense.hidden]
        if self.options.aug_loss:
            targets.append(Activations(stream.hidden.shape, self.folder / "outputs", device=stream.device))
            stream.advance(layer, into=targets[1])
        self.dense.advance(layer)
        begin = {path: linear.state() for path, linear in linears.items()}
        plain = {path: linear.plain() for path, linear in linears.items()}
        if not linears or (before := self._block_loss(plain, targets)) <= 0:
            stream.advance(layer)
            self._write_all()
            return 0.0, 0.0
        for path, state in begin.items():
            linears[path].load(state)
        lowest, best = before, plain
        saliencies = {path: self._saliency(path) for path in linears}
        step = descent(list(linears.values()), self.options.epochs * len(stream.starts), *self.rates)
        for _ in range(self.options.epochs):
            order = torch.randperm(len(stream.starts), generator=generator).tolist()
            for start, hidden, mask in stream.batches(stream.starts[index] for index in order):
                weights = dict[str, torch.Tensor]()
                roots, gradients = list[torch.Tensor](), list[torch.Tensor | None]()
                for path, linear in linears.items():
                    rounded = linear.quantized()
                    weights[path] = linear.adapted(rounded)
                    if (saliency := saliencies[path]) is not None:
                        roots.append(saliency.of(rounded, weights[path]))
                        gradients.append(saliency.gradient(roots[-1])[1].div_(before))
                output = stream.call(self._computing_with(weights), start, hidden)
                error = torch.zeros(())
                for target in targets:
                    off = output - target.read(start, start + len(hidden)).to(output)
                    error = error + off[mask].square().mean()
                torch.autograd.backward([*roots, error / before], [*gradients, None])
                step()
            now = {path: linear.state() for path, linear in linears.items()}
            if (value := self._block_loss(now, targets)) < lowest:
                lowest, best = value, now
        self._put(best)
        stream.advance(layer)
        self._write_all()
        return before, lowest

    def _write_all(self) -> None:
        for path, linear in self.linears.items():
            self.write(path, linear)

    def _computing_with(self, weights: Mapping[str, torch.Tensor]) -> Layer:
        """The layer with other weights [out, in] of its linears, for which outputs can be differentiated."""
        given = {f"{path}.weight": w.T if self.anatomy.conv1d else w for path, w in weights.items()}
        return replace(self.layer, module=Substituted(self.layer.module, given))

    def _block_loss(self, states: Mapping[str, dict[str, torch.Tensor]], targets: list[Activations]) -> float:
        """The loss on all the text, with the linears as they would be stored in these states."""
        self._put(states)
        total = 0.0

        def compare(seen: Seen) -> None:
            nonlocal total
            for target in targets:
                off = seen.output - target.read(seen.start, seen.start + len(seen.output)).to(seen.output)
                total += float(seen.real(off).square().sum(dtype=torch.float64))

        self.quantized.look(self.layer, {"": compare})
        loss = total / (int(self.quantized.windows.mask.sum()) * self.quantized.hidden.shape[-1])
        for path, linear in self.linears.items():
            if (saliency := self._saliency(path)) is not None:
                loss += saliency.exact(linear)
        return loss

    def _put(self, states: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """Bring the linears into these states, and put the weights that they would store into the layer."""
        for path, state in states.items():
            self.linears[path].load(state)
            set_weight(self.layer.linears[path], self.linears[path].stored())


def _write(packer: Packer, layer: Layer, path: str, linear: ClippedLinear) -> None:
    """Put the packed weight of a linear and its adapter into the draft."""
    stored = layer.stored(path)
    assert stored is not None  # it was wanted
    packer.write(stored, linear.weight, linear.rounded())
    names = (f"{layer.name}.{path}{part}" for part in (adapter.A, adapter.B))
    packer.draft.write(dict(zip(names, linear.adapter(), strict=True)))


def _differentiate(linear: ClippedLinear, loss: LinearLoss, saliency: Saliency | None, scale: float) -> float:
    """Add the gradients of the losses, divided by ``scale``, to those of a linear. Returns their sum.

    Everything here is as large as the weight, and is gone when this returns.
    """
    rounded = linear.quantized()
    whole = linear.adapted(rounded)
    value, gradient = loss.gradient(whole.detach())
    roots, gradients = [whole], [gradient.div_(scale)]
    if saliency is not None:
        roots.append(saliency.of(rounded, whole))
        term, gradient = saliency.gradient(roots[-1])
        value += term
        gradients.append(gradient.div_(scale))
    torch.autograd.backward(roots, gradients)
    return value
