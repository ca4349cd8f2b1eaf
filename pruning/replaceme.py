"""ReplaceMe (NeurIPS 2025): consecutive layers become one linear map, folded into a projection before them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from compress.anatomy import weight
from compress.calibration.windows import Windows
from compress.checkpoint import DTYPES, Checkpoint, Draft
from compress.errors import BadInput
from compress.method import Method, MethodOptions, Paper, StepReport
from compress.pruning.depth import plan_without_layers, remove_layers, renumbered
from compress.stream import Activations, Layer, Stream, StreamedModel, next_token_loss

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.run import Run


class Cut(NamedTuple):
    """The linear map goes into ``layer``, and the ``count`` layers behind it are removed."""

    layer: int
    count: int

    @property
    def removed(self) -> range:
        return range(self.layer + 1, self.layer + self.count + 1)


class ReplaceMe(Method):
    """Replace n consecutive layers by one linear map, folded into the down projection before them.

    With X_i the input of layer i, Y_i = X_i + attention, M_i = MLP(norm(Y_i)) and L_i = Y_i + M_i (section 3):

    1. Selection: i* minimises the angular distance arccos(cos(L_i, L_{i+n})) / pi, averaged over windows (last
       token, as the paper does) or over all tokens.
    2. Estimate T [hidden_size, hidden_size] so that M_i T + Y_i stands for L_{i+n}. Least squares:
       T = (M^T M + l2 I)^-1 M^T (L_{i+n} - Y_i), from float64 Grams. Cosine: T from the identity by Adam on
       mean(1 - cos(M T, L_{i+n} - Y)) + l1 |T|_1 + l2 |T|_F^2, or with ``exact`` on mean(1 - cos(M T + Y, L_{i+n})).
    3. Merge: W_down <- T^T W_down and b_down <- T^T b_down, so the output is the plain architecture with fewer layers.

    Differences from the published code: padding is masked everywhere; L_{i+n} is taken before the final norm;
    several transforms are always cut in disjoint places, and adjacent cuts are merged into one; buffers are
    streamed; and a part of the calibration windows is held out to compare the result with removing the same
    layers without any transform, which is what you get if the transform loses.
    """

    name = "replaceme"
    family = "pruning"
    paper = Paper(
        "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        "2505.02819",
    )

    class Options(MethodOptions):
        layers: PositiveInt = Field(description="how many layers to remove in all")
        transform: Literal["cosine", "least-squares", "none"] = Field(
            "cosine",
            description="how to estimate the linear map; none removes the layers and puts nothing in their place",
        )
        transforms: PositiveInt = Field(
            1, description="number of linear maps, each for an equal share of the layers"
        )
        distance: Literal["last-token", "all-tokens"] = Field(
            "last-token", description="tokens whose distance selects the layers"
        )
        exact: bool = Field(
            False, description="cosine of the whole layer output instead of the part T explains"
        )
        l1: NonNegativeFloat = Field(0.0, description="weight of the sum of |T| in the loss (cosine only)")
        l2: NonNegativeFloat = Field(
            0.0, description="ridge (least-squares), or weight of the sum of T^2 (cosine)"
        )
        epochs: PositiveInt = Field(10, description="passes over the tokens (cosine)")
        learning_rate: PositiveFloat = Field(1e-4, description="of Adam (cosine)")
        batch_tokens: PositiveInt = Field(1024, description="tokens in an Adam step (cosine)")
        held_out: float = Field(
            0.125,
            ge=0,
            lt=1,
            description="share of the windows that decides between the transform and none; 0: no check",
        )

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.layers % self.transforms:
                raise ValueError(
                    f"{self.layers} layers cannot be shared equally by {self.transforms} transforms"
                )
            if self.transform != "cosine" and (self.exact or self.l1):
                raise ValueError("exact and l1 belong to the cosine transform")
            return self

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if "quantization_config" in shape.config:
            raise BadInput("ReplaceMe needs a model that is not quantized yet; prune first, then quantize.")
        if options.layers >= shape.num_layers:
            raise BadInput(
                f"ReplaceMe can remove at most {shape.num_layers - 1} of the model's {shape.num_layers} layers, "
                f"not {options.layers}."
            )
        if options.transform != "none" and (obstacle := shape.anatomy.merge_obstacle):
            raise BadInput(f"{obstacle} Use 'transform: none', or another method.")
        # Layers of one model have the same size, so any of them stand for those that will be chosen.
        return plan_without_layers(shape, range(1, options.layers + 1))

    def apply(self, model: StreamedModel, options: Options, run: Run) -> StepReport:
        fit, held_out = _split(run.calibration, options)
        distances = self.distances(model, fit, options, run)
        cuts = choose_cuts(distances, options.transforms, options.layers // options.transforms)
        removed = sorted(index for cut in cuts for index in cut.removed)
        details = {
            "distances": [round(float(value), 6) for value in distances],
            "cuts": [{"layer": cut.layer, "removed": list(cut.removed)} for cut in cuts],
            "tokens": int(fit.mask.sum()),
        }
        transforms: dict[int, torch.Tensor] = {}
        if options.transform != "none":
            transforms = self.estimate(model, fit, cuts, options, run)
            merge(run.draft, model, removed, transforms)
            if len(held_out.tokens):
                plain = Draft(run.draft.parent, run.folder / "without")
                merge(plain, model, removed, {})
                details["held_out"] = _compare(run.draft, plain, held_out, run.device)
                if details["held_out"]["chosen"] == "none":
                    transforms = {}
        merge(run.draft, model, removed, transforms)
        return StepReport(_summary(options, removed, bool(transforms), details), details)

    def distances(self, model: StreamedModel, windows: Windows, options: Options, run: Run) -> torch.Tensor:
        """Distance of L_i and L_{i+n} for every i: float64 [num_layers - n]."""
        n = options.layers // options.transforms
        stream = model.stream(windows, run.folder / "distances")
        journal = run.journal("distances")
        every = options.distance == "all-tokens"
        # L_{j-n} to L_j, in turn.
        recent = [
            journal.activations(f"recent-{slot}", stream.hidden.shape) for slot in range((n + 1) * every)
        ]
        last = windows.mask.long().cumsum(1).argmax(1)
        journal.state["distances"] = torch.zeros(model.num_layers - n, dtype=torch.float64)
        for layer in model.walk(journal, stream, *recent, label="measuring distances"):
            stream.advance(layer)
            index, first = layer.index, layer.index - n
            if not every:
                rows = [hidden[torch.arange(len(hidden)), last[start : start + len(hidden)]]
                        for start, hidden, _ in stream.batches()]  # fmt: skip
                journal.state[f"last.{index}"] = torch.cat(rows)
                if first >= 0:
                    before = journal.state.pop(f"last.{first}")
                    journal.state["distances"][first] = angular(before, journal.state[f"last.{index}"]).mean()
                continue
            total, count = 0.0, 0
            for start, hidden, mask in stream.batches():
                recent[index % (n + 1)].write(start, hidden)
                if first >= 0:
                    before = recent[first % (n + 1)].read(start, start + len(hidden))
                    values = angular(before[mask], hidden[mask])
                    total, count = total + float(values.sum()), count + len(values)
            recent[index % (n + 1)].flip()
            if first >= 0:
                journal.state["distances"][first] = total / count
        return journal.state["distances"]

    def estimate(
        self, model: StreamedModel, windows: Windows, cuts: list[Cut], options: Options, run: Run
    ) -> dict[int, torch.Tensor]:
        """T for every cut: layer i -> float64 [hidden_size, hidden_size]."""
        stream = model.stream(windows, run.folder / "estimate")
        journal = run.journal("estimate")
        mlp, rest = (journal.activations(name, stream.hidden.shape) for name in ("mlp", "rest"))
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
                samples = Samples(mlp, rest, stream)
                solve = least_squares if options.transform == "least-squares" else cosine
                journal.state[f"T.{ends[layer.index]}"] = solve(samples, options, run.generator())
        return {cut.layer: journal.state[f"T.{cut.layer}"] for cut in cuts}

    @staticmethod
    def _keep(
        model: StreamedModel, stream: Stream, layer: Layer, mlp: Activations, rest: Activations
    ) -> None:
        """Keep M_i and Y_i = L_i - M_i while the text goes through layer i."""

        def keep_mlp(_: torch.Tensor, output: torch.Tensor, __: torch.Tensor, start: int) -> None:
            mlp.write(start, output)

        stream.advance(layer, observe={model.anatomy.down: keep_mlp})
        mlp.flip()
        for start, hidden, _ in stream.batches():
            rest.write(start, hidden - mlp.read(start, start + len(hidden)))
        rest.flip()


class Samples:
    """The tokens T is estimated on: M_i, Y_i and L_{i+n}, without padding."""

    def __init__(self, mlp: Activations, rest: Activations, stream: Stream) -> None:
        self.mlp, self.rest, self.stream = mlp, rest, stream
        self.hidden_size = stream.hidden.shape[-1]
        self.tokens = int(stream.windows.mask.sum())

    def window(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """M, Y and L [tokens, hidden_size] of one window."""
        mask = self.stream.windows.mask[index]
        parts = (self.mlp, self.rest, self.stream.hidden)
        return tuple(part.read(index, index + 1)[0][mask] for part in parts)

    def __len__(self) -> int:
        return len(self.stream.windows.tokens)


def angular(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """arccos(cos(a, b)) / pi of the rows of two [tokens, D]: float64 [tokens]."""
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1).acos() / math.pi


def choose_cuts(distances: torch.Tensor, transforms: int, n: int) -> list[Cut]:
    """The lowest-distance cuts of n layers that do not overlap, greedily; adjacent ones are merged into one.

    Args:
        distances: [num_layers - n]; entry i is the distance over layers i+1 to i+n.
        transforms: how many cuts.
        n: layers in a cut.

    Raises:
        BadInput: that many do not fit.
    """
    chosen: list[Cut] = []
    for layer in torch.argsort(distances, stable=True).tolist():
        cut = Cut(layer, n)
        if len(chosen) < transforms and all(set(cut.removed).isdisjoint(other.removed) for other in chosen):
            chosen.append(cut)
    if len(chosen) < transforms:
        raise BadInput(
            f"{transforms} cuts of {n} layers do not fit into the model without overlapping; use fewer transforms."
        )
    merged: list[Cut] = []
    for cut in sorted(chosen):
        if merged and merged[-1].removed[-1] == cut.layer:
            # The layer that would take this map is itself removed, so the map before it takes both.
            merged[-1] = Cut(merged[-1].layer, merged[-1].count + cut.count)
        else:
            merged.append(cut)
    return merged


def least_squares(samples: Samples, options: ReplaceMe.Options, _: torch.Generator) -> torch.Tensor:
    """T = (M^T M + l2 I)^-1 M^T (L - Y) from float64 Grams: [hidden_size, hidden_size].

    Raises:
        BadInput: fewer tokens than unknowns in a column of T, and no l2 to make up for it.
    """
    size = samples.hidden_size
    if samples.tokens < size and not options.l2:
        raise BadInput(
            f"Least squares needs at least {size} calibration tokens for this model (better {size**2:,}), not "
            f"{samples.tokens}; use more windows, or l2."
        )
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for index in range(len(samples)):
        m, y, target = (part.double() for part in samples.window(index))
        gram += m.T @ m
        cross += m.T @ (target - y)
    gram += options.l2 * torch.eye(size, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # directions that the MLP never writes to: the solution of least norm
        return torch.linalg.lstsq(gram, cross, driver="gelsd").solution
    return torch.cholesky_solve(cross, factor)


def cosine(samples: Samples, options: ReplaceMe.Options, generator: torch.Generator) -> torch.Tensor:
    """T minimising the cosine loss by Adam from the identity, float32 inside: float64 [hidden_size, hidden_size].

    Every epoch sees the windows in a new order; a step takes the next ``batch_tokens`` tokens.
    """
    transform = torch.eye(samples.hidden_size, requires_grad=True)
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
            waiting.append(samples.window(index))
            while sum(len(part[0]) for part in waiting) >= options.batch_tokens:
                parts = [torch.cat(column) for column in zip(*waiting, strict=True)]
                step(*(part[: options.batch_tokens] for part in parts))
                waiting = [tuple(part[options.batch_tokens :] for part in parts)]
        if waiting and len(waiting[0][0]):
            step(*(torch.cat(column) for column in zip(*waiting, strict=True)))
    return transform.detach().double()


def merge(
    draft: Draft, model: StreamedModel, removed: list[int], transforms: dict[int, torch.Tensor]
) -> None:
    """Make ``draft`` the model without the layers ``removed`` and with W_down <- T^T W_down, b_down <- T^T b_down."""
    draft.reset()
    remove_layers(draft, removed)
    numbers = renumbered(model.num_layers, removed)
    for index, transform in transforms.items():
        with model.layer(index) as layer:
            down = layer.linears[model.anatomy.down]
            merged = transform.T @ weight(down).double()
            bias = None if down.bias is None else transform.T @ down.bias.double()
            prefix = model.weights.find(f"{layer.name}.{model.anatomy.down}.weight")
            old = prefix.removesuffix("weight")
            new = old.replace(f".{index}.", f".{numbers[index]}.", 1)
            stored = DTYPES[draft.parent.tensors[prefix].dtype]
            tensors = {f"{new}weight": (merged.T if model.anatomy.conv1d else merged).to(stored)}
            if bias is not None:
                tensors[f"{new}bias"] = bias.to(stored)
            draft.write(tensors)


def _split(windows: Windows, options: ReplaceMe.Options) -> tuple[Windows, Windows]:
    """Windows to estimate on, and evenly spread ones to decide on."""
    count = len(windows.tokens)
    aside = math.ceil(count * options.held_out) if options.transform != "none" else 0
    if aside >= count:
        raise BadInput(f"With {count} calibration window(s) none can be held out; use more, or held_out: 0.")
    chosen = torch.zeros(count, dtype=torch.bool)
    if aside:
        chosen[torch.linspace(0, count - 1, aside).long()] = True
    return windows.select(~chosen), windows.select(chosen)


def _compare(
    with_transform: Checkpoint, without: Checkpoint, windows: Windows, device: str
) -> dict[str, Any]:
    """Perplexity on the held-out windows with the transform and without any, and which one is chosen."""
    losses = {
        name: float(next_token_loss(StreamedModel(checkpoint, device), windows).mean())
        for name, checkpoint in (("transform", with_transform), ("none", without))
    }
    return {
        "windows": len(windows.tokens),
        "perplexity_with_transform": math.exp(losses["transform"]),
        "perplexity_without": math.exp(losses["none"]),
        "chosen": min(losses, key=losses.__getitem__),
    }


def _summary(
    options: ReplaceMe.Options, removed: list[int], transformed: bool, details: dict[str, Any]
) -> str:
    layers = ", ".join(map(str, removed))
    if transformed:
        text = f"replaced layers {layers} by {len(details['cuts'])} linear map(s) ({options.transform})"
    else:
        text = f"removed layers {layers} without a linear map"
    if "held_out" in details:
        found = details["held_out"]
        text += (
            f"; perplexity on {found['windows']} held-out calibration windows {found['perplexity_with_transform']:.2f} "
            f"with the map, {found['perplexity_without']:.2f} without"
        )
    return text + "."
