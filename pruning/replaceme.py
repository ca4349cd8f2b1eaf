"""ReplaceMe (NeurIPS 2025): replace layers by a linear map that is folded into the projection before them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from compress.anatomy import layer_shapes, sizes_of
from compress.calibration.statistics.losses import streamed_losses
from compress.engine.activations import Activations
from compress.engine.stream import Layer, Seen, Stream, StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.depth import (
    Cut,
    choose_cuts,
    layer_distances,
    plan_without_layers,
    remove_layers,
)
from compress.pruning.parts.options import LayerCount
from compress.storage.draft import Draft

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from compress.engine.shape import ModelShape
    from compress.method import StepContext


Kind = Literal["least-squares", "cosine"]
Transforms = dict[int, torch.Tensor]
"""Layer i -> T, float64 [hidden_size, hidden_size]."""


class ReplaceMe(Method["ReplaceMe.Options"]):
    """Replace n consecutive layers by one linear map, folded into the down projection before them.

    With X_i the input of layer i, Y_i = X_i + attention, M_i = MLP(norm(Y_i)) and L_i = Y_i + M_i (section 3;
    where attention and MLP are parallel, M_i = MLP(norm(X_i)), and all else is the same):

    1. Select: i* minimises the angular distance arccos(cos(L_i, L_{i+n})) / pi, averaged over all tokens, or
       over the last token of each window.
    2. Estimate T [hidden_size, hidden_size] so that M_i T + Y_i approximates L_{i+n}.
       Least squares: T = (M^T M + l2 I)^-1 M^T (L_{i+n} - Y_i), from float64 Grams.
       Cosine: T minimises mean(1 - cos(M_i T, L_{i+n} - Y_i)) + l1 sum|T| + l2 sum T^2, by Adam from the
       identity; with ``exact`` the cosine is that of M_i T + Y_i and L_{i+n}.
    3. Merge: W_down <- T^T W_down and b_down <- T^T b_down, so the result is the plain architecture with
       fewer layers.

    Several transforms are all estimated on the activations of the dense model.

    Differences from the published code: padding is masked everywhere; L_{i+n} is taken before the final norm;
    several transforms replace layers in disjoint places, and adjacent cuts are merged into one; activations
    are streamed. Layers are selected on all tokens by default, because a few last tokens may select layers
    whose removal costs far more. And some windows are held out, on which both transforms are compared with
    each other and with removing the same layers without any; the best of the three is written.
    """

    name = "replaceme"
    family = "pruning"
    paper = Paper(
        "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        "2505.02819",
    )

    class Options(LayerCount):
        renamed: ClassVar[Mapping[str, str]] = {"batch_tokens": "batch_size"}

        transform: Literal["auto", "cosine", "least-squares", "none"] = Field(
            "auto",
            description="how to estimate the linear map; none removes the layers without a replacement; auto "
            "takes what is best on held-out windows",
        )
        transforms: PositiveInt = Field(
            1, description="number of linear maps, each for an equal share of the layers"
        )
        distance: Literal["last-token", "all-tokens"] = Field(
            "all-tokens",
            description="select the layers by the distance of all tokens, or of the last one (as published)",
        )
        exact: bool = Field(
            False,
            description="compare whole layer outputs by their cosine, instead of the part that T explains",
        )
        l1: NonNegativeFloat = Field(0.0, description="weight of the sum of |T| in the loss (cosine)")
        l2: NonNegativeFloat = Field(
            0.0,
            description="weight of the sum of T^2 in the loss (cosine); added to the diagonal of the Gram "
            "matrix (least-squares)",
        )
        epochs: PositiveInt = Field(10, description="passes over the tokens (cosine)")
        learning_rate: float = Field(1e-4, gt=0, le=1, description="learning rate of Adam (cosine)")
        batch_size: PositiveInt = Field(1024, description="tokens in an Adam step (cosine)")
        held_out: float = Field(
            0.125,
            ge=0,
            lt=1,
            description="share of the windows on which transforms are compared with none; 0: no check",
        )

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.layers % self.transforms:
                raise ValueError(
                    f"{self.layers} layers cannot be shared equally by {self.transforms} transforms"
                )
            if "cosine" not in self.kinds and (self.exact or self.l1):
                raise ValueError("exact and l1 are options of the cosine transform only")
            if self.transform == "auto" and not self.held_out:
                raise ValueError("auto compares transforms on held-out windows, so held_out cannot be 0")
            return self

        @property
        def kinds(self) -> tuple[Kind, ...]:
            """The transforms to estimate."""
            if self.transform == "auto":
                return ("least-squares", "cosine")
            return () if self.transform == "none" else (self.transform,)

        @property
        def length(self) -> int:
            """n, the layers that one linear map replaces."""
            return self.layers // self.transforms

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if options.layers >= shape.num_layers:
            raise BadInput(
                f"ReplaceMe can remove at most {shape.num_layers - 1} of the model's {shape.num_layers} "
                f"layers, not {options.layers}."
            )
        if options.kinds and (obstacle := shape.anatomy.merge_obstacle):
            raise BadInput(f"{obstacle} Use 'transform: none', or another method.")
        if options.transform != "none" and options.held_out and shape.anatomy.head is None:
            raise BadInput(
                "ReplaceMe checks its linear map by the loss of the next token on held-out windows, and "
                f"this {shape.anatomy.model_type} model predicts no tokens; set held_out to 0."
            )
        # The calibration text decides which layers go; in a plain model all have the same size.
        return plan_without_layers(shape, range(1, options.layers + 1))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        fit, held_out = _split(context.calibration, options)
        size = sizes_of(model.config).hidden_size
        enough = fit.num_tokens >= size or bool(options.l2)
        if options.transform == "least-squares" and not enough:
            raise BadInput(
                f"Least squares needs at least {size} calibration tokens for this model, better {size**2:,}; "
                f"there are only {fit.num_tokens}, so use more windows, or set l2."
            )
        distances = self.distances(model, fit, options, context)
        cuts = _choose(distances, model.config, options)
        removed = sorted(index for cut in cuts for index in cut.removed)
        details: dict[str, Any] = {
            "distances": [round(float(value), 6) for value in distances],
            "cuts": [{"layer": cut.layer, "removed": list(cut.removed)} for cut in cuts],
            "tokens": fit.num_tokens,
        }
        kinds = [kind for kind in options.kinds if kind != "least-squares" or enough]
        found = self.estimate(model, fit, cuts, kinds, options, context) if kinds else {}
        if len(held_out):
            details["held_out"] = _compare(model, removed, found, held_out, context)
            chosen = details["held_out"]["chosen"]
        else:
            chosen = options.transform
        merge(context.draft, model, removed, found.get(chosen, {}))
        return StepReport(_summary(chosen, removed, details), details)

    def distances(
        self, model: StreamedModel, windows: Windows, options: Options, context: StepContext
    ) -> torch.Tensor:
        """The angular distance of L_i and L_{i+n} for every i: float64 [num_layers - n], from 0 to 1."""
        last_token = options.distance == "last-token"
        return layer_distances(model, windows, options.length, context, last_token)

    def estimate(
        self,
        model: StreamedModel,
        windows: Windows,
        cuts: list[Cut],
        kinds: Sequence[Kind],
        options: Options,
        context: StepContext,
    ) -> dict[str, Transforms]:
        """Estimate T for every cut, in all the ways that ``kinds`` names."""
        stream = model.stream(windows, context.folder / "estimate")
        journal = context.journal("estimate")
        mlp, rest = (journal.activations(name, stream.hidden.shape, model.device) for name in ("mlp", "rest"))
        begins = {cut.layer for cut in cuts}
        ends = {cut.removed[-1]: cut.layer for cut in cuts}
        for layer in model.walk(
            journal, stream, mlp, rest, stop=max(ends) + 1, label="estimating the transform"
        ):
            if layer.index in begins:
                self._keep(model, stream, layer, mlp, rest)
            else:
                stream.advance(layer)
            if layer.index in ends:
                samples = Samples(mlp, rest, stream, context.device)
                for kind in kinds:
                    transform = SOLVERS[kind](samples, options, context.generator())
                    journal.state[f"T.{kind}.{ends[layer.index]}"] = transform
        return {kind: {cut.layer: journal.state[f"T.{kind}.{cut.layer}"] for cut in cuts} for kind in kinds}

    @staticmethod
    def _keep(
        model: StreamedModel, stream: Stream, layer: Layer, mlp: Activations, rest: Activations
    ) -> None:
        """Take the text through layer i, and keep M_i and Y_i = L_i - M_i."""

        def keep_mlp(seen: Seen) -> None:
            mlp.write(seen.start, seen.output)

        stream.advance(layer, observe={model.anatomy.down: keep_mlp})
        mlp.flip()
        for start, hidden, _ in stream.batches():
            rest.write(start, hidden - mlp.read(start, start + len(hidden)))
        rest.flip()


def _choose(distances: torch.Tensor, config: PretrainedConfig, options: ReplaceMe.Options) -> list[Cut]:
    """The cuts with the least ``distances`` [num_layers - n] whose maps have an MLP to be folded into.

    Raises:
        BadInput: pruning has left too few MLPs.
    """
    if options.kinds:
        neurons = torch.tensor([shape.intermediate_size for shape in layer_shapes(config)])
        distances = distances.masked_fill(neurons[: len(distances)] == 0, torch.inf)
    cuts = choose_cuts(distances, options.transforms, options.length)
    if any(distances[cut.layer].isinf() for cut in cuts):
        raise BadInput(
            "ReplaceMe folds a linear map into the MLP of the layer before those that it removes, and this "
            "model has too few layers with an MLP at such places; use 'transform: none', or another method."
        )
    return cuts


class Samples:
    """What T is estimated on: M_i, Y_i and L_{i+n} of the real tokens, window by window."""

    def __init__(self, mlp: Activations, rest: Activations, stream: Stream, device: str) -> None:
        self.parts = (mlp, rest, stream.hidden)
        self.mask = stream.windows.mask
        self.device = device
        self.hidden_size = stream.hidden.shape[-1]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """M, Y and L of the real tokens of one window: float32 [tokens, hidden_size] each, on the device."""
        m, y, target = (part.read(index, index + 1)[0] for part in self.parts)
        mask = self.mask[index]
        return m[mask].to(self.device), y[mask].to(self.device), target[mask].to(self.device)


def least_squares(samples: Samples, options: ReplaceMe.Options, _: torch.Generator) -> torch.Tensor:
    """T = (M^T M + l2 I)^-1 M^T (L - Y) from float64 Grams: float64 [hidden_size, hidden_size]."""
    size = samples.hidden_size
    gram = options.l2 * torch.eye(size, dtype=torch.float64, device=samples.device)
    cross = torch.zeros_like(gram)
    for index in range(len(samples)):
        m, y, target = (part.double() for part in samples[index])
        gram += m.T @ m
        cross += m.T @ (target - y)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # the MLP never writes to some directions: take the solution of least norm
        return torch.linalg.lstsq(gram.cpu(), cross.cpu(), driver="gelsd").solution
    return torch.cholesky_solve(cross, factor).cpu()


def cosine(samples: Samples, options: ReplaceMe.Options, generator: torch.Generator) -> torch.Tensor:
    """T that minimises the cosine loss: float64 [hidden_size, hidden_size].

    Adam starts from the identity, in float32. Every epoch takes the windows in a new order, and every step
    the next ``batch_size`` tokens of them.
    """
    transform = torch.eye(samples.hidden_size, device=samples.device, requires_grad=True)
    optimizer = torch.optim.Adam([transform], lr=options.learning_rate)

    def step(m: torch.Tensor, y: torch.Tensor, target: torch.Tensor) -> None:
        predicted, wanted = (m @ transform + y, target) if options.exact else (m @ transform, target - y)
        loss = (1 - torch.cosine_similarity(predicted, wanted, dim=-1)).mean()
        if options.l1:
            loss = loss + options.l1 * transform.abs().sum()
        if options.l2:
            loss = loss + options.l2 * transform.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(options.epochs):
        waiting: list[tuple[torch.Tensor, ...]] = []
        for index in torch.randperm(len(samples), generator=generator).tolist():
            waiting.append(samples[index])
            while sum(len(part[0]) for part in waiting) >= options.batch_size:
                parts = [torch.cat(column) for column in zip(*waiting, strict=True)]
                step(*(part[: options.batch_size] for part in parts))
                waiting = [tuple(part[options.batch_size :] for part in parts)]
        if waiting and len(waiting[0][0]):
            step(*(torch.cat(column) for column in zip(*waiting, strict=True)))
    return transform.detach().cpu().double()


SOLVERS = {"least-squares": least_squares, "cosine": cosine}


def merge(draft: Draft, model: StreamedModel, removed: list[int], transforms: Transforms) -> None:
    """Turn ``draft`` into the model without the layers ``removed``, with each T folded into its ``down``.

    W_down <- T^T W_down and b_down <- T^T b_down are computed in float64 and rounded to the stored dtype.

    Raises:
        CompressError: the new weights are not finite in the dtype the model is stored in.
    """
    draft.reset()
    renamed = remove_layers(draft, removed)
    for index, transform in transforms.items():
        down = f"{model.anatomy.layer_name(index)}.{model.anatomy.down}"
        for stored in filter(None, (model.weights.find(f"{down}.{leaf}") for leaf in ("weight", "bias"))):
            old = draft.parent.read(stored)
            # A linear's weight is [out, in]; in a Conv1D's weight [in, out] and in a bias, out comes last.
            out_first = old.ndim == 2 and not model.anatomy.conv1d
            new = transform.T @ old.double() if out_first else old.double() @ transform
            new = new.to(old.dtype)
            if not torch.isfinite(new).all():
                raise CompressError(
                    f"The linear map for layer {index} is too large or not a number; use a smaller "
                    "learning_rate (cosine), or more calibration windows or a larger l2 (least-squares)."
                )
            draft.write({renamed[stored]: new})


def _split(windows: Windows, options: ReplaceMe.Options) -> tuple[Windows, Windows]:
    """The windows to estimate on, and the held-out ones, which are spread evenly."""
    count = len(windows)
    aside = math.ceil(count * options.held_out) if options.kinds else 0
    if aside >= count:
        raise BadInput(
            f"With {count} calibration window(s) none can be held out; use more, or set held_out to 0."
        )
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.arange(aside) * count // max(aside, 1)] = True
    return windows.select(~chosen), windows.select(chosen)


def _compare(
    model: StreamedModel,
    removed: list[int],
    found: Mapping[str, Transforms],
    windows: Windows,
    context: StepContext,
) -> dict[str, Any]:
    """The perplexities on the held-out windows with each transform and without any, and which is chosen."""
    draft = Draft(context.draft.parent, context.folder / "compared")

    def loss(transforms: Transforms) -> float:
        try:
            merge(draft, model, removed, transforms)
            return float(streamed_losses(StreamedModel(draft, context.device), windows).mean())
        except CompressError:  # weights or activations overflow, which rules the model out
            return math.inf

    losses = {"none": loss({})} | {kind: loss(transforms) for kind, transforms in found.items()}
    return {
        "windows": len(windows),
        "perplexity": {kind: _perplexity(value) for kind, value in losses.items()},
        "chosen": min(losses, key=lambda kind: losses[kind]),
    }


def _perplexity(loss: float) -> float | None:
    """exp of a mean loss in nats; None where that is too large for a float."""
    return math.exp(loss) if loss < 700 else None


def _summary(chosen: str, removed: list[int], details: dict[str, Any]) -> str:
    layers = ", ".join(map(str, removed))
    if chosen == "none":
        text = f"removed layers {layers} without a linear map"
    else:
        text = f"replaced layers {layers} by {len(details['cuts'])} linear map(s) ({chosen})"
    if "held_out" in details:
        found = details["held_out"]
        figures = (f"{kind} {_shown(value)}" for kind, value in found["perplexity"].items())
        text += f"; perplexity on {found['windows']} held-out calibration windows: {', '.join(figures)}"
    return text + "."


def _shown(perplexity: float | None) -> str:
    return "too large to state" if perplexity is None else f"{perplexity:.2f}"
