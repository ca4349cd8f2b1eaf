"""FLAP (AAAI 2024): prune the heads and neurons that fluctuate least, and compensate the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import nn

from compress.anatomy import Anatomy, set_weight, weight
from compress.calibration.statistics.moments import Moments, Products
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.allocation import (
    Scores,
    Units,
    Widths,
    best,
    check_ratio,
    even_widths,
    floor_of,
    floor_widths,
    rank,
    rank_apart,
    removal,
    spread_widths,
    standardised,
    units_of,
)
from compress.pruning.parts.channels import (
    Metric,
    channel_statistics,
    channels_of,
    pruned_inputs,
    unit_scores,
    watch,
)
from compress.pruning.parts.depth import choose_cuts, layer_distances, plan_without_layers
from compress.pruning.parts.options import ParameterRatio, WidthMultiple
from compress.pruning.parts.refit import prune_and_follow
from compress.pruning.parts.width import (
    Kept,
    bias_of,
    finish,
    narrow,
    plan_widths,
    shallow_copy,
    skipped,
    write_layer,
)

if TYPE_CHECKING:
    from compress.engine.stream import Layer, Stream, StreamedModel
    from compress.engine.windows import Windows
    from compress.method import StepContext

DEPTH_FIRST = "depth-first"
MOST_LAYERS = 1 / 5
"""The largest share of the layers that depth-first removes."""


class Flap(Method["Flap.Options"]):
    """Prune heads and MLP neurons by how much their outputs fluctuate over the calibration text.

    With W [out, in] the weight of a block's output projection (of attention or MLP), and mu_j, v_j and n_j
    the mean, variance and squared norm of its input channel j over all tokens of the dense model (section 3):

    1. Metric of a channel. IFV: v_j. WIFV: v_j sum_o W_oj^2. WIFN: mean_o |W_oj| sqrt(n_j). The metrics of
       attention channels are squared, as in the published code.
    2. Standardise the metrics of each block over its channels, to mean 0 and standard deviation 1. A neuron
       has one channel; the score of a key-value head is the mean over the channels of all its query heads.
    3. Structure. AL-AM: one ranking of all heads and neurons, weighted by their cost in parameters. AL-MM:
       one ranking of heads, of which a given number are removed, and one of neurons. UL-MM: the same in every
       layer. UL-UM: every layer loses floor(ratio * units) of its heads and of its neurons.
    4. Compensate. bias: b <- b + sum over pruned j of mu_j W_:j, so that the mean of the block's output stays
       the same. least-squares: W_k <- W_k + W_p S_pk (S_kk + lambda I)^-1 for the kept channels k and the
       pruned channels p. This minimises the squared error of the block's output plus lambda |change of
       W_k|^2. S are sums over tokens of products of channels, and lambda = damping * mean diagonal of S_kk.
       Where the projection has a bias, S is computed from deviations from the mean, and the bias is also
       fitted.

    The inputs for the compensation come from the dense model (``propagate: dense``) or from the layers
    already pruned (``pruned``). The target is the output of the unpruned block for the same input.

    Uniform shapes. Taking the same units from every layer costs more than ranking those of all layers. So
    ``shape: uniform`` spends the ratio on depth first (depth-first): whole layers go, at most a fifth of
    them, and then every layer that stays loses the same number of heads and neurons, the best ones staying.
    The layers that go follow each other; they are those that turn the hidden states least (the angular
    distance of ReplaceMe). All output projections from the first change on are refitted, one after the other,
    so that the pruned model's hidden states follow those of the dense model; the MLP before the layers that
    are gone also takes over what they did (see `prune_and_follow`). Where that is not linear, because a norm
    stands between a block and the hidden states, no layer goes (UL-MM).

    Differences from the published code: variances are correct (its running mean is updated before it is used)
    and include all tokens except padding; grouped-query attention stays whole; costs are exact; every layer
    keeps at least one unit of each kind. With few key-value heads UL-UM removes less than ``ratio``; in UL-MM
    neurons fill the rest of the budget. depth-first is not in the paper. The paper compensates with
    biases; the default here is least squares, because it came closer to the dense model in our measurements.
    """

    name = "flap"
    family = "pruning"
    paper = Paper("Fluctuation-based Adaptive Structured Pruning for Large Language Models", "2312.11983")

    class Options(WidthMultiple, ParameterRatio):
        renamed: ClassVar[Mapping[str, str]] = {"ridge": "damping"}

        metric: Metric = Field("WIFV", description="how to score a channel")
        structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM", "depth-first"] | None = Field(
            None,
            description="spread the removal uniformly (U) or adaptively (A) over layers (L) and modules (M), "
            "or over modules by a given number of heads (MM); depth-first removes some whole layers and "
            "narrows the others alike; by default AL-AM, and for shape uniform depth-first (UL-MM if "
            "compensate is not least-squares)",
        )
        shape: Literal["heterogeneous", "uniform"] = Field(
            "heterogeneous",
            description="uniform gives all layers the same widths, which the plain architecture needs",
        )
        compensate: Literal["none", "bias", "least-squares"] = Field(
            "least-squares", description="how to compensate for the units that are gone"
        )
        propagate: Literal["dense", "pruned"] | None = Field(
            None,
            description="compute the compensation from the activations of the dense or of the pruned model; "
            "by default dense, and pruned for depth-first, which knows nothing else",
        )
        damping: NonNegativeFloat = Field(
            1.0,
            description="how strongly least-squares keeps the old weights: added to the diagonal of the Gram "
            "matrix of the inputs, as a share of its mean",
        )
        remove_heads: NonNegativeInt | None = Field(
            None,
            description="key-value heads (each with its query heads) to remove from all layers that stay "
            "together, for UL-MM, AL-MM and depth-first; by default the same share as of the parameters",
        )

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.shape == "uniform" and self.chosen_structure.startswith("AL"):
                raise ValueError(
                    f"structure {self.structure} gives layers different widths, which shape uniform "
                    "excludes; use depth-first, UL-UM or UL-MM"
                )
            if self.remove_heads is not None and self.chosen_structure in ("UL-UM", "AL-AM"):
                raise ValueError(
                    f"remove_heads belongs to UL-MM, AL-MM and depth-first, not to {self.chosen_structure}"
                )
            if self.chosen_structure == DEPTH_FIRST:
                if self.compensate != "least-squares":
                    raise ValueError(
                        "in depth-first the layers that stay take over what the others did, which only "
                        f"compensate: least-squares does, not {self.compensate}; or use UL-MM"
                    )
                if self.propagate == "dense":
                    raise ValueError(
                        "depth-first refits the layers to what they get in the pruned model, so propagate "
                        "cannot be dense; with UL-MM it can"
                    )
            return self

        @property
        def chosen_structure(self) -> str:
            """The structure, given or implied."""
            if self.structure is None and self.shape == "uniform":
                return DEPTH_FIRST if self.compensate == "least-squares" else "UL-MM"
            return self.structure or "AL-AM"

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        options = resolved(shape.anatomy, options)
        units = units_of(shape)
        check_ratio(units, options.ratio, options.multiple(layer.neurons for layer in units))
        if count := removed_layers(units, options):
            # The calibration text decides which layers go; all have the same size.
            shape, units = plan_without_layers(shape, range(1, count + 1)), units[count:]
        widths = structure_widths(units, options, count)
        pairs = list(zip(units, widths, strict=True))
        biased = []
        if options.compensate == "bias":
            if any(after.groups < before.groups for before, after in pairs):
                biased.append(shape.anatomy.attention_output)
            if any(after.neurons < before.neurons for before, after in pairs):
                biased.append(shape.anatomy.down)
        kept = [width.kept for width in widths]
        return plan_widths(shape, kept, biased, uniform=options.shape == "uniform")

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        shape = ModelShape.of(model.checkpoint)
        options = resolved(shape.anatomy, options)
        units = units_of(shape)
        windows = context.calibration
        assert windows is not None  # the method needs calibration
        if options.compensate == "least-squares":
            _check_tokens(shape, windows)
        removed = choose_layers(model, removed_layers(units, options), context)
        stay = [index for index in range(len(units)) if index not in removed]
        statistics = channel_statistics(model, options.metric, context)
        scores = []
        for index in stay:
            attention, mlp = channels_of(model, index, statistics)
            scores.append(unit_scores(model, index, standardised(attention.square()), standardised(mlp)))
        chosen = choose(scores, [units[index] for index in stay], options, len(removed))
        if options.structure == DEPTH_FIRST:
            by_layer = dict(zip(stay, chosen, strict=True))
            prune_and_follow(model, by_layer, removed, options.damping, context)
        else:
            self.prune(model, chosen, statistics, options, context)
        finish(context.draft, model, chosen, removed)
        found = iter(chosen)
        kept = [Widths(0, 0).kept if index in removed else next(found) for index in range(len(units))]
        summary, details = removal(kept, units)
        if removed:
            summary += f"; among them all of layers {', '.join(map(str, removed))}"
        how = f"{options.structure}, {options.metric}, compensation: {options.compensate}"
        details |= {"structure": options.structure, "tokens": windows.num_tokens}
        if options.structure == DEPTH_FIRST:
            details["removed_layers"] = removed
        return StepReport(f"{summary} ({how}).", details)

    def prune(
        self,
        model: StreamedModel,
        kept: list[Kept],
        statistics: dict[str, torch.Tensor],
        options: Options,
        context: StepContext,
    ) -> None:
        """Narrow every layer to what is kept, compensate the loss, and write it to the draft."""
        streams = []
        if options.compensate == "least-squares" or (
            options.compensate == "bias" and options.propagate == "pruned"
        ):
            streams.append(model.stream(context.calibration, context.folder / "pruning"))
        for layer in model.walk(context.journal("pruning"), *streams, label="pruning"):
            layer.module = shallow_copy(layer.module)
            layer.linears = model.anatomy.linears(layer.module)
            pruned = pruned_inputs(model, layer, kept[layer.index])
            if options.compensate == "bias" and options.propagate == "dense":
                for path, columns in pruned.items():
                    add_bias(layer.linears[path], columns, statistics[f"{layer.index}.{path}.mean"])
            elif options.compensate != "none":
                self.compensate(model, layer, pruned, streams[0], options)
            narrow(model, layer, kept[layer.index])
            if streams and options.propagate == "pruned":
                streams[0].advance(layer)
            write_layer(context.draft, model, layer)

    def compensate(
        self,
        model: StreamedModel,
        layer: Layer,
        pruned: dict[str, torch.Tensor],
        stream: Stream,
        options: Options,
    ) -> None:
        """Correct the output projections, still unnarrowed, by the inputs they get from the stream."""

        def accumulator(path: str) -> Moments | Products:
            linear, columns = layer.linears[path], pruned[path]
            channels = weight(linear).shape[1]
            if options.compensate == "bias":
                return Moments(channels, model.device)
            return Products(channels, columns, linear.bias is not None, model.device)

        def correct(path: str, seen: Moments | Products) -> None:
            if isinstance(seen, Moments):
                add_bias(layer.linears[path], pruned[path], seen.mean)
            else:
                refit(layer.linears[path], seen, options.damping)

        if options.propagate == "dense":
            found = {path: accumulator(path) for path in pruned}
            stream.advance(layer, observe={path: watch(seen) for path, seen in found.items()})
            for path, seen in found.items():
                correct(path, seen)
            return
        if (path := model.anatomy.attention_output) in pruned:
            seen = accumulator(path)
            with skipped(layer, model.anatomy, "mlp"):
                stream.look(layer, {path: watch(seen)})
            correct(path, seen)
        if (path := model.anatomy.down) in pruned:  # its input depends on the corrected attention
            seen = accumulator(path)
            stream.look(layer, {path: watch(seen)})
            correct(path, seen)


def resolved(anatomy: Anatomy, options: Flap.Options) -> Flap.Options:
    """The options with a structure that this architecture allows, and with what to propagate.

    Raises:
        BadInput: depth-first is asked for, and the architecture does not allow it.
    """
    structure = options.chosen_structure
    obstacle = anatomy.merge_obstacle or anatomy.refit_obstacle
    if structure == DEPTH_FIRST and obstacle:
        if options.structure is not None:
            raise BadInput(f"{obstacle} Use structure: UL-MM, which removes no layers.")
        structure = "UL-MM"
    return options.model_copy(update={"structure": structure, "propagate": options.propagate or "dense"})


def removed_layers(units: list[Units], options: Flap.Options) -> int:
    """How many whole layers go: in depth-first as many as the ratio allows, but at most `MOST_LAYERS`.

    Raises:
        BadInput: the layers differ, so their number says nothing about the parameters.
    """
    if options.structure != DEPTH_FIRST:
        return 0
    if len(set(units)) > 1:
        raise BadInput(
            "The model has layers of different shapes already, and depth-first removes layers by number; use "
            "structure: AL-AM."
        )
    return floor_of(min(options.ratio, MOST_LAYERS) * len(units))


def choose_layers(model: StreamedModel, count: int, context: StepContext) -> list[int]:
    """The ``count`` consecutive layers that turn the hidden states least; never the first one."""
    if not count:
        return []
    assert context.calibration is not None
    return list(choose_cuts(layer_distances(model, context.calibration, count, context), 1, count)[0].removed)


def structure_widths(units: list[Units], options: Flap.Options, removed: int = 0) -> list[Widths]:
    """How many units of every layer stay; for the adaptive structures this is a prediction.

    Args:
        units: of the layers that stay.
        options: with the structure given.
        removed: how many layers are gone, which counts towards the ratio.
    """
    layers, heads = len(units), options.remove_heads
    # What the layers that stay lose: all layers have the same size if some are removed.
    ratio = max(0.0, (options.ratio * (layers + removed) - removed) / layers)
    multiple = options.multiple(layer.neurons for layer in units)
    match options.structure:
        case "UL-UM":
            return floor_widths(units, ratio, multiple)
        case "UL-MM" | "depth-first":
            if heads is not None and heads % layers:
                raise BadInput(
                    f"{heads} heads cannot be shared equally by {layers} layers, but {options.structure} "
                    "removes the same number from each; change remove_heads."
                )
            return even_widths(units, ratio, multiple, heads and heads // layers)
        case _:
            return spread_widths(units, ratio, multiple, heads)


def choose(scores: list[Scores], units: list[Units], options: Flap.Options, removed: int = 0) -> list[Kept]:
    """Choose the units that stay in every layer that stays; the arguments are as in `structure_widths`."""
    ratio, heads = options.ratio, options.remove_heads
    multiple = options.multiple(layer.neurons for layer in units)
    match options.structure:
        case "AL-AM":
            return rank(scores, units, ratio, multiple)
        case "AL-MM":
            return rank_apart(scores, units, ratio, heads, multiple)
        case _:
            return best(scores, structure_widths(units, options, removed))


def add_bias(linear: nn.Module, stay: torch.Tensor, mean: torch.Tensor) -> None:
    """b <- b + sum over pruned j of mean_j W_:j, and W_:j <- 0; the channels ``stay`` are not pruned."""
    matrix = weight(linear)
    gone = torch.ones(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    gone[stay] = False
    bias = matrix[:, gone].double() @ mean.to(matrix.device)[gone]
    if (old := bias_of(linear)) is not None:
        bias += old
    set_weight(linear, matrix.masked_fill(gone, 0), bias)


def refit(linear: nn.Module, seen: Products, damping: float) -> None:
    """W_k <- W_k + W_p S_pk (S_kk + lambda I)^-1 and W_p <- 0; a bias is changed so that the mean stays.

    Raises:
        BadInput: the system is singular.
    """
    matrix, chosen = weight(linear), seen.chosen
    new = matrix.masked_fill(~chosen, 0).double()
    diagonal = seen.among.diagonal()
    if diagonal.any():  # inputs that are always the same, as in a block that is all zeros, tell nothing
        diagonal += damping * diagonal.mean()
        factor, failed = torch.linalg.cholesky_ex(seen.among)
        if failed:
            raise BadInput(
                "Some inputs of a projection are combinations of others on the calibration text, so least "
                "squares has no single solution; use more damping, or more and other text."
            )
        new[:, chosen] += torch.cholesky_solve(seen.across @ matrix[:, ~chosen].double().T, factor).T
    bias = bias_of(linear)
    if bias is not None:
        bias = bias + (matrix.double() - new) @ seen.mean
    set_weight(linear, new, bias)


def _check_tokens(shape: ModelShape, windows: Windows) -> None:
    outputs = (shape.anatomy.attention_output, shape.anatomy.down)
    most = max(columns for name, (_, columns) in shape.linears().items() if name.endswith(outputs))
    if (tokens := windows.num_tokens) < most:
        raise BadInput(
            f"Least squares needs at least {most:,} calibration tokens for this model, better several times "
            f"as many; there are only {tokens:,}, so use more windows, or set compensate to bias."
        )
