"""RMU (ICML 2024): hidden states of what is forgotten are steered to a random direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from compress.engine.stream import hidden_of
from compress.errors import BadInput
from compress.method import Method, Paper, StepReport
from compress.unlearning.parts.baseline import FORGET, RETAIN, WeightedOptions, read_sets, unlearn
from compress.unlearning.parts.chosen import train_linears
from compress.unlearning.parts.losses import squared_distance
from compress.unlearning.parts.options import check_trainable, low_rank_learning_rate, rate_for
from compress.unlearning.parts.reference import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext
    from compress.unlearning.parts.training import Batch

TRAINED_LAYERS = 3
"""Layers that are trained: the steered one and those before it, as published."""


TIMES_AS_LONG = 5.0
"""How many times as long as it was a hidden state becomes, as in Adaptive RMU."""

TIMES_THE_RATE = 5.0
"""How many times the learning rate of methods that train all layers; at a hidden size of 4096 that gives the
published 5e-5."""


class RMU(Method["RMU.Options"]):
    """Steer the hidden states of records to forget to a random direction, and keep those of the others.

    With h_t the output of layer l at token t, h_t,ref the same before unlearning, and u a random direction of
    length 1 (uniform in [0, 1) before it is normalised), the losses are, each the mean over the positions
    that predict an answer's tokens,

        forget:  ‖h_t − c_t · u‖²          retain:  α ‖h_t − h_t,ref‖²

    The paper takes one c for all tokens, chosen for its models. Where hidden states are much longer than c,
    they are only made shorter, which the norm of the next layer undoes. So c_t is 5 ‖h_t,ref‖ by default, as
    in Adaptive RMU (arXiv:2408.06223), whatever the model and the layer.

    Only the linears of the layers l − 2, l − 1 and l are trained, and no later layer runs. The hidden states
    are computed once before, so no second model is in memory. Low-rank updates of so few layers either forget
    little or harm what is retained; since few layers have gradients, all their weights are cheap to train.
    """

    name = "rmu"
    family = "unlearning"
    paper = Paper("The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", "2403.03218")
    needs_calibration = False
    needs_package = "peft"

    class Options(WeightedOptions):
        learning_rate: PositiveFloat | None = Field(
            default_factory=low_rank_learning_rate,
            description="learning rate at the first step; it falls to 0 along a line. By default 2e-4 for "
            "low-rank updates, and for all weights the smaller, the wider the model: 1e-3 at a hidden size "
            "of 576, about 5e-5 at 4096",
        )
        layer: NonNegativeInt = Field(
            7,
            description="index, from 0, of the layer to steer; it and the two before it are trained",
        )
        steering: PositiveFloat | None = Field(
            None,
            description="length c of the vector that hidden states of records to forget are steered to; by "
            "default 5 times their own before",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "RMU", options)
        if options.layer >= shape.num_layers:
            raise BadInput(
                f"RMU cannot steer layer {options.layer} of a model with the layers 0 to "
                f"{shape.num_layers - 1}; choose another 'layer'."
            )
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)
        if options.learning_rate is None:
            rate = TIMES_THE_RATE * rate_for(model.config.hidden_size)
            options = options.model_copy(update={"learning_rate": rate})
        layers = range(max(0, options.layer - TRAINED_LAYERS + 1), options.layer + 1)
        before = Reference(model, sets.retain, context, RETAIN, layers.stop) if sets.retain else None
        known = None
        if options.steering is None:
            known = Reference(model, sets.forget, context, FORGET, layers.stop)
        steered = model.anatomy.layer_name(options.layer)
        direction = torch.rand(model.config.hidden_size, generator=context.generator())
        direction = (direction / direction.norm()).to(context.device)

        def choose(whole: PreTrainedModel) -> nn.Module:
            names = [
                f"{model.anatomy.layer_name(index)}.{path}"
                for index in layers
                for path in model.anatomy.linears(whole.get_submodule(model.anatomy.layer_name(index)))
            ]
            return train_linears(whole, names, options, context.seed)

        def forget(trained: nn.Module, batch: Batch) -> Tensor:
            part = batch[FORGET]
            length: Tensor | float | None = options.steering
            if known is not None:
                own = known.states(known.rows(part)).norm(dim=-1, keepdim=True)
                length = TIMES_AS_LONG * own.to(context.device)
            return squared_distance(output_of(steered, trained, part), part["labels"], length * direction)

        def retain(trained: nn.Module, batch: Batch) -> Tensor:
            assert before is not None
            part = batch[RETAIN]
            reference = before.states(before.rows(part))
            return squared_distance(output_of(steered, trained, part), part["labels"], reference)

        return unlearn(model, sets, forget, retain, options, context, choose)


class _Reached(Exception):
    """Leaves the forward pass behind a layer, because nothing later is needed."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def output_of(layer: str, model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    """The output of a layer, [B, S, D]; the layers behind it do not run.

    Args:
        layer: its full name in the transformers model.
        model: that model, or peft's model around it.
        part: of a batch.
    """
    find: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    whole = model if find is None else find()

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> NoReturn:
        raise _Reached(hidden_of(output))

    handle = whole.get_submodule(layer).register_forward_hook(leave)
    try:
        model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError(f"The model has run without its layer '{layer}'.")
