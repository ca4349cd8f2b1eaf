"""ApiQ (EMNLP 2024): the clipping of low-bit grids and a low-rank adapter are learned together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from compress.anatomy import Anatomy, anatomy_of, linears_by_input, set_weight, weight
from compress.calibration.statistics.fisher import Fisher, text_loss
from compress.calibration.statistics.hessian import Hessian
from compress.engine.activations import Activations
from compress.engine.inputs import advance_keeping
from compress.engine.stream import Seen
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.clipped import ClippedLinear
from compress.quantization.parts.layout import WeightOptions, plan_packed
from compress.quantization.parts.packer import Packer
from compress.storage import adapter
from compress.storage.tensors import DTYPES, TensorInfo
from compress.system.memory import give_back_memory

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import Layer, Observer, Stream, StreamedModel
    from compress.method import StepContext

GRADIENT_NORM = 1.0
"""Gradients are cut to this norm; they are those of losses relative to plain rounding's."""
LORA_DECAY = 0.1
"""Weight decay of A and B, as published; the clipping has none, which would pull it to one half."""
ROWS = 256
"""Outputs that a loss is summed up over at a time; only memory depends on it."""
LOSS = "loss of layer "
"""Before the names of losses in a journal's state."""


class ApiQ(Method):
    """Learn how to clip the groups of weights before rounding, and a low-rank adapter that makes up for it.

    A linear W [out, in] becomes Q = Ŵ + (alpha / r) B A, with A [r, in], B [out, r] and Ŵ on a low-bit grid
    between sigma(l) min(W_g) and sigma(u) max(W_g) in every group g (`ClippedLinear`). A, B, u and l are
    learned on two streams of calibration text: X has gone through the dense layers before, X_q through the
    quantized ones with their adapters.

    - layer-wise (ApiQ-lw): for one linear after another in the order of the data flow, the mean of
      (X W^T - X_q Q^T)^2, where X_q has passed the linears before, quantized already (`LinearLoss`). No step
      touches a token, since two Gram matrices hold all that matters, and each step sees all of them.
    - block-wise (ApiQ-bw): for all linears of a layer f at once, the mean of (f(X) - f_q(X_q))^2 and, with
      ``aug_loss``, that of (f(X_q) - f_q(X_q))^2, in minibatches.

    Both are minimised by AdamW with learning rates that fall linearly to 0. What is kept is the best state
    seen on the calibration text; plain rounding without an adapter is one of them, so nothing gets worse.
    The default rates are for 100 steps; the paper makes 2560, with constant rates of 5e-3 and 5e-4.

    With ``saliency`` (Saliency-aware partial retraining, arXiv 2504.13932) lambda * sum F_ij (Ŵ_ij - W_ij)^2
    joins the mean squared error, where F is the diagonal Fisher information by squared gradients of windows,
    not of tokens (`Fisher`). ``before_lora`` trains u and l only; ``after_lora`` has Q in the place of Ŵ.

    Adapters are stored in the dtype of the linear's weight if that has 16 bits, otherwise in float32, and
    once, as peft reads them (`compress.storage.adapter`).
    """

    name = "apiq"
    family = "quantization"
    paper = Paper("ApiQ: Finetuning of 2-Bit Quantized Large Language Model", "2402.05147")

    class Options(WeightOptions):
        symmetric: bool = Field(False, description="fixed zero points; otherwise each group stores its own")
        mode: Literal["layer", "block"] = Field(
            "layer", description="what is held against the dense model: the outputs of linears, or of layers"
        )
        rank: PositiveInt = Field(64, description="rank r of the adapters")
        alpha: PositiveFloat = Field(16, description="adapters are multiplied by alpha / rank")
        clip_lr: PositiveFloat = Field(0.2, description="learning rate of the clipping")
        lora_lr: PositiveFloat = Field(0.02, description="learning rate of the adapters")
        steps: PositiveInt = Field(100, description="layer-wise: steps for a linear, each on all the text")
        epochs: PositiveInt = Field(4, description="block-wise: passes over the text for a layer")
        batch: PositiveInt = Field(1, description="block-wise: windows in a step")
        aug_loss: bool = Field(
            True, description="block-wise: hold layers against the dense ones on the same inputs, too"
        )
        saliency: Literal["none", "before_lora", "after_lora"] = Field(
            "none",
            description="weigh errors of weights, without or with adapters, by their Fisher information",
        )
        saliency_weight: PositiveFloat = Field(1e-3, description="lambda of the saliency term")

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        anatomy, own = shape.anatomy, anatomy_of(shape.pretrained_config)
        causal = own.kind == "decoder" and own.head is not None
        if options.saliency != "none" and not causal:
            raise BadInput("Saliency is measured with the loss of a language model, and this model is none.")
        packed = plan_packed(shape, options)
        infos: dict[str, TensorInfo] = {}
        prefix = f"{anatomy.prefix}." if anatomy.prefix else ""
        for stored, (out, width) in shape.linears().items():
            if f"{stored}.weight" not in packed.tensors:
                # peft looks for modules, whose names may differ from those in the files.
                name = own.in_model(stored.removeprefix(prefix))
                dtype = adapter_dtype(shape.tensors[f"{stored}.weight"].dtype)
                infos[f"{name}{adapter.A}"] = TensorInfo(dtype, (options.rank, width))
                infos[f"{name}{adapter.B}"] = TensorInfo(dtype, (out, options.rank))
        names = dict.fromkeys(adapter.linear_of(name) for name in infos)
        others = [name for name, _ in shape.skeleton.named_modules() if name not in names]
        settings = adapter.adapter_config(
            options.rank, options.alpha, names, others, conv1d=own.conv1d, causal=causal
        )
        return packed.derive({**packed.config, adapter.KEY: settings}, add=infos)

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        length = context.calibration.tokens.shape[1]
        size = {"batch_tokens": options.batch * length} if options.mode == "block" else {}
        dense = model.stream(context.calibration, context.folder / "dense", **size)
        quantized = model.stream(context.calibration, context.folder / "quantized", **size)
        fisher = None
        if options.saliency != "none":
            fisher = Fisher(
                model, context.calibration, text_loss(context.calibration), context.folder / "fisher"
            )
        journal = context.journal("learning")
        packer = Packer(context.draft, options, journal.state)
        for layer in model.walk(journal, dense, quantized, label=f"ApiQ to {options.bits} bits"):
            generator = torch.Generator().manual_seed(context.seed * model.num_layers + layer.index)
            stored = {path: layer.stored(path) for path in layer.linears}
            stored = {path: name for path, name in stored.items() if packer.wants(name)}
            linears = {
                path: ClippedLinear(
                    weight(layer.linears[path]),
                    options.rank,
                    options.alpha,
                    bits=packer.format_of(name).bits,
                    group_size=packer.format_of(name).group_size,
                    symmetric=packer.format_of(name).symmetric,
                    scale_dtype=packer.scale_dtype(name),
                    adapter_dtype=DTYPES[adapter_dtype(packer.before.tensors[name].dtype)],
                    generator=generator,
                    name=name.removesuffix(".weight"),
                )
                for path, name in stored.items()
            }
            saliency = Saliency(options, fisher.read(layer) if fisher is not None else {})
            learning = Learning(
                model.anatomy, layer, linears, dense, quantized, saliency, options, context.folder / "targets"
            )
            losses = learning.layer_wise() if options.mode == "layer" else learning.block_wise(generator)
            journal.state[f"{LOSS}{layer.index}"] = torch.tensor(losses, dtype=torch.float64)
            for path, linear in linears.items():
                packer.write(stored[path], linear.weight, linear.rounded())
                names = (f"{layer.name}.{path}{part}" for part in (adapter.A, adapter.B))
                context.draft.write(dict(zip(names, linear.adapter(), strict=True)))
        return self._finish(packer, model, context, options)

    @staticmethod
    def _finish(packer: Packer, model: StreamedModel, context: StepContext, options: Options) -> StepReport:
        """The report of the packed weights, with the adapters counted, and with the losses."""
        losses = [packer.errors.pop(f"{LOSS}{index}").tolist() for index in range(model.num_layers)]
        report = packer.finish()
        weights = sum(packer.before.tensors[f"{name}.weight"].numel for name in packer.errors)
        planned = ApiQ().plan(packer.before, options)
        context.draft.config[adapter.KEY] = planned.config[adapter.KEY]
        nbytes = sum(info.nbytes for name, info in planned.tensors.items() if adapter.is_adapter(name))
        bits = report.details["bits_per_weight"] + 8 * nbytes / weights
        left = [after / before if before else 1.0 for before, after in losses]
        report.details |= {
            "adapter_bytes": nbytes,
            "bits_per_weight_with_adapter": round(bits, 4),
            "loss": {"plain_rounding": [loss[0] for loss in losses], "learned": [loss[1] for loss in losses]},
        }
        report.summary += (
            f"; {bits:.2f} bits a weight with adapters of rank {options.rank}, and "
            f"{sum(left) / len(left):.1%} of plain rounding's loss on the calibration text"
        )
        return report


def adapter_dtype(stored: str) -> str:
    """The dtype of the adapter of a weight stored as ``stored`` (safetensors spellings)."""
    return stored if stored in ("F16", "BF16") else "F32"


class Saliency:
    """lambda * sum F_ij (M_ij - W_ij)^2 of a linear, where M is Ŵ or Q; 0 without F.

    Args:
        options: lambda, and what M is.
        fisher: path of a linear -> F [out, in].
    """

    def __init__(self, options: ApiQ.Options, fisher: Mapping[str, torch.Tensor]) -> None:
        self.factor, self.fisher = options.saliency_weight, fisher
        self.of_whole = options.saliency == "after_lora"

    def __call__(
        self, path: str, dense: torch.Tensor, rounded: torch.Tensor, whole: torch.Tensor
    ) -> torch.Tensor:
        """The term of W, Ŵ and Q."""
        if path not in self.fisher:
            return dense.new_zeros(())
        off = (whole if self.of_whole else rounded) - dense
        return self.factor * (self.fisher[path].to(off) * off.square()).sum()


class Learning:
    """What is learned of one layer, which holds the dense weights at first and what is stored at last.

    Args:
        anatomy: of the model.
        layer: in memory.
        linears: path -> what becomes of it.
        dense: stands before the layer with X.
        quantized: stands there with X_q.
        saliency: the term that joins the losses.
        options: of the method.
        folder: for targets above the memory limit.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        layer: Layer,
        linears: dict[str, ClippedLinear],
        dense: Stream,
        quantized: Stream,
        saliency: Saliency,
        options: ApiQ.Options,
        folder: Path,
    ) -> None:
        self.anatomy, self.layer, self.linears = anatomy, layer, linears
        self.dense, self.quantized = dense, quantized
        self.saliency, self.options, self.folder = saliency, options, folder

    def layer_wise(self) -> tuple[float, float]:
        """Learn the linears one after another, and take both streams through the layer.

        Returns:
            The sums over the linears of the losses, with plain rounding and as learned.
        """
        groups = [
            wanted
            for paths in linears_by_input(self.anatomy, self.linears)
            if (wanted := [path for path in paths if path in self.linears])
        ]
        energies = dict.fromkeys(self.linears, 0.0)

        def observer(path: str) -> Observer:
            bias = self.layer.linears[path].bias

            def observe(seen: Seen) -> None:
                product = seen.output if bias is None else seen.output - bias
                energies[path] += float(product[seen.mask].square().sum(dtype=torch.float64))

            return observe

        observers = {path: observer(path) for path in self.linears}
        paths = [paths[0] for paths in groups]
        inputs = advance_keeping(self.dense, self.layer, paths, self.folder, observers)
        losses = []
        for paths in groups:
            hessian = Hessian(inputs[paths[0]])
            self.quantized.look(self.layer, {paths[0]: hessian.add})
            crossed = {path: cross_products(self.linears[path].weight, hessian) for path in paths}
            hessian.difference = None  # D is as large as G, and has done its part
            for path in paths:
                loss = LinearLoss(self.linears[path].weight, hessian, crossed.pop(path), energies[path])
                losses.append(self._learn(path, loss))
                set_weight(self.layer.linears[path], self.linears[path].stored())
            del loss
            give_back_memory()
        self.quantized.advance(self.layer)
        return sum(before for before, _ in losses), sum(after for _, after in losses)

    def _learn(self, path: str, loss: LinearLoss) -> tuple[float, float]:
        """Bring one linear to its best state; the loss of plain rounding, and the loss of that state."""
        linear = self.linears[path]

        def of(state: dict[str, torch.Tensor]) -> float:
            linear.load(state)
            whole, rounded = linear.stored(), linear.rounded().dequantize().to(linear.weight)
            return loss.exact(whole) + float(self.saliency(path, linear.weight, rounded, whole))

        begin, plain = linear.state(), linear.plain()
        if (before := of(plain)) <= loss.resolution:  # the grid holds the weights, the inputs are the same
            return max(before, 0.0), max(before, 0.0)
        linear.load(begin)
        lowest, best = float("inf"), begin
        step = self._descent([linear], self.options.steps)
        for number in range(self.options.steps + 1):
            rounded = linear.quantized()
            whole = linear.adapted(rounded)
            value, gradient = loss.gradient(whole.detach())
            term = self.saliency(path, linear.weight, rounded, whole)
            value += float(term.detach())
            if value < lowest:
                lowest, best = value, linear.state()
            if number == self.options.steps:
                break
            roots = [(whole, gradient / before)] + ([(term / before, None)] if term.requires_grad else [])
            torch.autograd.backward(*zip(*roots, strict=True))
            step()
        after = of(best)
        return before, after if after < before else of(plain)

    def block_wise(self, generator: torch.Generator) -> tuple[float, float]:
        """Learn all linears at once, and take both streams through the layer.

        Args:
            generator: for the order of the minibatches.

        Returns:
            The losses with plain rounding and as learned.
        """
        layer, stream, linears = self.layer, self.quantized, self.linears
        targets = [self.dense.hidden]
        if self.options.aug_loss:
            targets.append(Activations(stream.hidden.shape, self.folder / "outputs"))
            stream.advance(layer, into=targets[1])
        self.dense.advance(layer)
        begin = {path: linear.state() for path, linear in linears.items()}
        plain = {path: linear.plain() for path, linear in linears.items()}
        if not linears or (before := self._block_loss(plain, targets)) <= 0:
            stream.advance(layer)
            return 0.0, 0.0
        for path, state in begin.items():
            linears[path].load(state)
        lowest, best = before, plain
        step = self._descent(list(linears.values()), self.options.epochs * len(stream.starts))
        for _ in range(self.options.epochs):
            order = torch.randperm(len(stream.starts), generator=generator).tolist()
            for start, hidden, mask in stream.batches(stream.starts[index] for index in order):
                weights, terms = {}, []
                for path, linear in linears.items():
                    rounded = linear.quantized()
                    weights[path] = linear.adapted(rounded)
                    terms.append(self.saliency(path, linear.weight, rounded, weights[path]))
                output = stream.call(self._computing_with(weights), start, hidden)
                loss = sum(terms) + sum(
                    (output - target.read(start, start + len(hidden)).to(output))[mask].square().mean()
                    for target in targets
                )
                (loss / before).backward()
                step()
            now = {path: linear.state() for path, linear in linears.items()}
            if (value := self._block_loss(now, targets)) < lowest:
                lowest, best = value, now
        self._put(best)
        stream.advance(layer)
        return before, lowest

    def _computing_with(self, weights: Mapping[str, torch.Tensor]) -> Layer:
        """The layer with other weights [out, in] of its linears, by which outputs can be differentiated."""
        given = {f"{path}.weight": w.T if self.anatomy.conv1d else w for path, w in weights.items()}
        module = self.layer.module
        return replace(
            self.layer, module=lambda *args, **kwargs: functional_call(module, given, args, kwargs)
        )

    def _block_loss(self, states: Mapping[str, dict[str, torch.Tensor]], targets: list[Activations]) -> float:
        """The loss on all the text with the linears in these states, as they would be stored."""
        self._put(states)
        total = 0.0

        def compare(seen: Seen) -> None:
            nonlocal total
            for target in targets:
                off = seen.output - target.read(seen.start, seen.start + len(seen.output)).to(seen.output)
                total += float(off[seen.mask].square().sum(dtype=torch.float64))

        self.quantized.look(self.layer, {"": compare})
        loss = total / (int(self.quantized.windows.mask.sum()) * self.quantized.hidden.shape[-1])
        for path, linear in self.linears.items():
            rounded = linear.rounded().dequantize().to(linear.weight)
            loss += float(self.saliency(path, linear.weight, rounded, linear.stored()))
        return loss

    def _put(self, states: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """Bring the linears into these states, and what is stored of them into the layer."""
        for path, state in states.items():
            self.linears[path].load(state)
            set_weight(self.layer.linears[path], self.linears[path].stored())

    def _descent(self, linears: list[ClippedLinear], steps: int) -> Callable[[], None]:
        """AdamW: a function that makes a step by the gradients there are, and clears them."""
        clipping = [values for linear in linears for values in (linear.u, linear.l)]
        adapters = [values for linear in linears for values in (linear.A, linear.B)]
        optimizer = torch.optim.AdamW(
            [
                {"params": clipping, "lr": self.options.clip_lr, "weight_decay": 0.0},
                {"params": adapters, "lr": self.options.lora_lr, "weight_decay": LORA_DECAY},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

        def step() -> None:
            # A step that went too far may overflow; one that cannot be computed is left out.
            if clip_grad_norm_([*clipping, *adapters], GRADIENT_NORM).isfinite():
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        return step


def cross_products(dense: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """W D, float64 [out, in], of a weight W [out, in], of which only some rows are in float64 at a time."""
    found = torch.empty(dense.shape, dtype=torch.float64, device=dense.device)
    for rows, products in zip(dense.split(ROWS), found.split(ROWS), strict=True):
        torch.mm(rows.double(), hessian.difference, out=products)
    return found


class LinearLoss:
    """The mean over tokens and outputs of (X W^T - X_q Q^T)^2.

    With G = X_q^T X_q, D = (X - X_q)^T X_q and E = Q - W its sum is <E G, E> - 2 <W D, E> + constant, where
    the constant is |X W^T|^2 - 2 <W D, W> - <W G, W>, and its gradient by Q is 2 (E G - W D).

    Args:
        dense: W, float32 [out, in].
        hessian: G.
        crossed: W D, float64 [out, in], which changes.
        energy: |X W^T|^2.

    Attributes:
        resolution: losses below it are lost in the rounding of float32 products.
    """

    def __init__(self, dense: torch.Tensor, hessian: Hessian, crossed: torch.Tensor, energy: float) -> None:
        self.dense, self.G, self.count = dense, hessian.sum, hessian.tokens * len(dense)
        self.resolution = 1e-6 * energy / self.count
        self.WD = crossed.div_(self.count)
        self.constant = energy / self.count
        parts = map(torch.Tensor.double, dense.split(ROWS))
        for rows, products in zip(parts, self.WD.split(ROWS), strict=True):
            self.constant -= float(((2 * products + (rows @ self.G).div_(self.count)) * rows).sum())
        self.G32, self.WD32 = self.G.float().div_(self.count), self.WD.float()

    def exact(self, whole: torch.Tensor) -> float:
        """The loss of Q, in float64."""
        total = self.constant
        parts = (matrix.split(ROWS) for matrix in (whole, self.dense, self.WD))
        for rows, dense, products in zip(*parts, strict=True):
            off = rows.double() - dense
            total += float((((off @ self.G).div_(self.count) - 2 * products) * off).sum())
        return total

    def gradient(self, whole: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss of Q and its gradient, in float32, by one product of matrices."""
        off = whole - self.dense
        product = off @ self.G32
        loss = self.constant
        for rows, products, crossed in zip(*(m.split(ROWS) for m in (off, product, self.WD32)), strict=True):
            loss += float(((products - 2 * crossed) * rows).sum(dtype=torch.float64))
        return loss, product.sub_(self.WD32).mul_(2)
