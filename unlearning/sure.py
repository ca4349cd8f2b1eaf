"""SURE (ICLR 2025): larger steps, on the weights alone that matter for what is forgotten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.calibration.text.records import collate
from compress.method import Method, Paper, StepReport
from compress.unlearning.parts import losses
from compress.unlearning.parts.baseline import (
    FORGET,
    RetainLossOptions,
    Sets,
    Term,
    losses_before,
    mean_nll,
    nll_of,
    read_sets,
    retaining,
    unlearn,
)
from compress.unlearning.parts.chosen import train_linears, train_rows
from compress.unlearning.parts.options import check_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext
    from compress.unlearning.parts.training import Batch


class Sure(Method["Sure.Options"]):
    """Unlearn with steps large enough to outlast quantization, on the most salient weights alone.

    The saliency of a unit i of the weights θ is the length of its gradient before unlearning,

        s_i = ‖∂L_forget / ∂θ_i‖ with L_forget the mean over all records to forget,

    where a unit is the weight of one linear (``--saliency modules``, as in the paper) or one row of it
    (``rows``, as in the published code). The given share of units with the largest s_i is trained with the
    loss of gradient ascent or NPO and a retain term; all other weights stay bit for bit as they were. With
    ``--share 1`` every linear is trained: the control that tells what the mask is good for.

    The gradient of all linears is in memory once, before the training.
    """

    name = "sure"
    family = "unlearning"
    paper = Paper("Catastrophic Failure of LLM Unlearning via Quantization", "2410.16454")
    needs_calibration = False
    needs_package = "peft"

    class Options(RetainLossOptions):
        learning_rate: PositiveFloat = Field(
            1e-4,
            description="learning rate at the first step; it falls to 0 along a line. It must be large for "
            "changes to outlast quantization",
        )
        loss: Literal["gradient-ascent", "npo"] = Field(
            "npo", description="the loss of the records to forget"
        )
        beta: PositiveFloat = Field(0.1, description="inverse temperature of NPO")
        saliency: Literal["modules", "rows"] = Field(
            "modules", description="what is chosen by its saliency: whole linears, or rows of them"
        )
        share: float = Field(
            0.1, gt=0, le=1, description="share of the linears, or of all their rows, that is trained"
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        check_trainable(shape, "SURE", options)
        return shape

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        sets = read_sets(model, options, context)
        forget = forget_term(model, sets, options, context)
        found: dict[str, Any] = {}

        def choose(whole: PreTrainedModel) -> nn.Module:
            chosen = most_salient(saliency(whole, model, sets, forget, options, context), options.share)
            found["units"] = sum(len(units) for units in chosen.values())
            found["trained_units"] = sum(int(units.sum()) for units in chosen.values())
            chosen = {name: units for name, units in chosen.items() if bool(units.any())}
            found["linears"] = sorted(chosen)
            if options.saliency == "modules":
                return train_linears(whole, chosen, options, context.seed)
            return train_rows(whole, chosen, options, context.seed)

        with retaining(model, sets, options, context) as retain:
            report = unlearn(model, sets, forget, retain, options, context, choose)
        report.details["saliency"] = found
        unit = "linears" if options.saliency == "modules" else "rows of linears"
        report.summary = f"{found['trained_units']} of {found['units']} {unit} trained: {report.summary}"
        return report


def forget_term(model: StreamedModel, sets: Sets, options: Sure.Options, context: StepContext) -> Term:
    """The loss of the records to forget that the options name."""
    if options.loss == "gradient-ascent":
        return lambda trained, batch: -mean_nll(trained, batch, FORGET)
    before = losses_before(model, sets.forget, context, FORGET)

    def term(trained: nn.Module, batch: Batch) -> Tensor:
        return losses.npo(nll_of(trained, batch, FORGET), before(batch[FORGET]), options.beta)

    return term


def saliency(
    whole: PreTrainedModel,
    model: StreamedModel,
    sets: Sets,
    forget: Term,
    options: Sure.Options,
    context: StepContext,
) -> dict[str, Tensor]:
    """The saliency of every unit, before anything is trained.

    Returns:
        Full name of a linear -> float64, [1] for modules and [out] for rows.
    """
    linears: dict[str, nn.Module] = {}
    for index in range(model.num_layers):
        name = model.anatomy.layer_name(index)
        layer = whole.get_submodule(name)
        linears |= {f"{name}.{path}": linear for path, linear in model.anatomy.linears(layer).items()}
    whole.requires_grad_(False)
    for linear in linears.values():
        linear.get_parameter("weight").requires_grad_(True)
    if options.gradient_checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.train()  # nothing is drawn at random: the model has no dropout
    count = len(sets.forget)
    for start in range(0, count, options.batch_size):
        part = collate(sets.forget[start : start + options.batch_size], sets.pad)
        batch = {FORGET: {key: values.to(context.device) for key, values in part.items()}}
        (forget(whole, batch).sum() / count).backward()
        context.progress("measuring saliency", min(1.0, (start + options.batch_size) / count))
    found = {}
    for name, linear in linears.items():
        parameter = linear.get_parameter("weight")
        assert parameter.grad is not None
        gradient = parameter.grad.T if isinstance(linear, Conv1D) else parameter.grad
        squares = gradient.double().square().sum(1)
        found[name] = (squares if options.saliency == "rows" else squares.sum()[None]).sqrt().cpu()
        parameter.grad = None
    return found


def most_salient(found: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The ``share`` of all units with the largest saliency, at least one: name -> bool, True for these."""
    scores = torch.cat(list(found.values()))
    best = torch.zeros(len(scores), dtype=torch.bool)
    best[scores.sort(descending=True, stable=True).indices[: math.ceil(share * len(scores))]] = True
    sizes = [len(values) for values in found.values()]
    return dict(zip(found, best.split(sizes), strict=True))
