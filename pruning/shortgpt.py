"""ShortGPT: remove the layers that change their input least."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.engine.stream import Seen, StreamedModel
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.pruning.parts.depth import plan_without_layers, remove_layers
from compress.pruning.parts.options import LayerCount

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.method import StepContext


class ShortGPT(Method["ShortGPT.Options"]):
    """Remove the n layers with the least block influence, all at once, and put nothing in their place.

    With X_i the input of layer i and X_{i+1} its output (section 3), the block influence is

        BI_i = 1 - mean over tokens t of cos(X_{i,t}, X_{i+1,t})

    in float64, over the real tokens (no padding). The output of the last layer is taken before the final
    norm.
    """

    name = "shortgpt"
    family = "pruning"
    paper = Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", "2403.03853"
    )

    class Options(LayerCount):
        """How many layers to remove, nothing else."""

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        if options.layers >= shape.num_layers:
            raise BadInput(
                f"ShortGPT can remove at most {shape.num_layers - 1} of the model's {shape.num_layers} "
                f"layers, not {options.layers}."
            )
        # The calibration text decides which layers go; in a plain model all have the same size.
        return plan_without_layers(shape, range(1, options.layers + 1))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        influence = self.block_influence(model, context)
        order = torch.argsort(influence, stable=True).tolist()
        removed = sorted(order[: options.layers])
        remove_layers(context.draft, removed)
        details = {
            "block_influence": [round(value, 6) for value in influence.tolist()],
            "removed": removed,
            "tokens": context.calibration.num_tokens,
        }
        return StepReport(f"removed layers {', '.join(map(str, removed))}.", details)

    def block_influence(self, model: StreamedModel, context: StepContext) -> torch.Tensor:
        """The block influence of every layer: float64 [num_layers]."""
        windows = context.calibration
        assert windows is not None  # the method needs calibration
        stream = model.stream(windows, context.folder / "influence")
        journal = context.journal("influence")
        journal.state["similarity"] = torch.zeros(model.num_layers, dtype=torch.float64)
        for layer in model.walk(journal, stream, label="measuring block influence"):
            total = journal.state["similarity"][layer.index]
            stream.advance(layer, observe={"": partial(_add_similarity, total)})
        return 1 - journal.state["similarity"] / windows.num_tokens


def _add_similarity(total: torch.Tensor, seen: Seen) -> None:
    before, after = (seen.real(values).double() for values in (seen.inputs, seen.output))
    total += torch.cosine_similarity(before, after, dim=-1).sum().cpu()
