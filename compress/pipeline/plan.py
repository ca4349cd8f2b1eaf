"""Predicting what a recipe makes of a model, from config.json and safetensors headers alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from compress.anatomy import anatomy_of
from compress.engine.opening import open_checkpoint
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.method import Method, MethodOptions
from compress.pipeline.acting import inherited_acting, plain
from compress.pipeline.recipe import Recipe
from compress.sources.find import ModelSource, find_model
from compress.storage.checkpoint import Checkpoint
from compress.storage.companions import companions
from compress.storage.lineage import read_lineage
from compress.storage.sharded import refuse_sharded
from compress.storage.tensors import DTYPE_NAMES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedStep:
    """The prediction for the model after one step: sizes in bytes."""

    method: str
    nbytes: int
    parameters: int
    layers: int
    loads_with: str


@dataclass(frozen=True)
class Plan:
    """The shapes along a recipe: as the model is stored, after every step, and at the end."""

    before: ModelShape
    after: ModelShape
    steps: list[PlannedStep]

    @property
    def warning(self) -> str | None:
        """A sentence about a result that takes more bytes than the model it is made of."""
        before, after = (f"{shape.nbytes / 1e6:,.1f} MB" for shape in (self.before, self.after))
        if not self.steps or self.after.nbytes <= self.before.nbytes or after == before:
            return None
        return f"The result would be larger than the model: {after} instead of {before}."

    def document(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "before": _figures(self.before, self.before.num_layers),
            "after": _figures(self.after, self.after.num_layers),
            "warning": self.warning,
            "steps": [{"method": step.method, **_figures(step, step.layers)} for step in self.steps],
        }


def _figures(shape: ModelShape | PlannedStep, layers: int) -> dict[str, Any]:
    return {
        "bytes": shape.nbytes,
        "parameters": shape.parameters,
        "bits_per_parameter": 8 * shape.nbytes / shape.parameters,
        "layers": layers,
        "loads_with": str(shape.loads_with),
    }


def open_model(recipe: Recipe) -> tuple[ModelSource, Checkpoint]:
    """The recipe's model, found and opened with the recipe's dtype. It warns of what will be left out.

    Raises:
        BadInput: there is no such model, or something in its folder cannot be read.
    """
    source = find_model(recipe.model, recipe.revision)
    dtype = DTYPE_NAMES[getattr(torch, recipe.dtype)] if recipe.dtype else None
    checkpoint = open_checkpoint(source.folder, dtype)
    refuse_sharded(checkpoint.config, source.folder)
    for sentence in left_out(source, checkpoint):
        log.warning("In the result, %s", sentence)
    read_lineage(source.stored)
    return source, checkpoint


def left_out(source: ModelSource, checkpoint: Checkpoint) -> list[str]:
    """What the folder of the model holds and the result will not, in sentences.

    Raises:
        BadInput: as `companions`.
    """
    return companions(source.folder, {where.file for where in checkpoint.sources.values()}).left_out


def make_plan(checkpoint: Checkpoint, steps: list[tuple[Method, MethodOptions]]) -> Plan:
    """Follow the shape of the model through the steps.

    Raises:
        BadInput: the architecture is not supported, a method's library is not installed, or a step cannot be
            done to the shape it meets.
    """
    before, shape = ModelShape.of(checkpoint.as_stored), ModelShape.of(checkpoint)
    anatomy_of(before.pretrained_config)  # first, so that no method complains about something else
    planned = []
    acting = [(one.method, one.options) for one in inherited_acting(checkpoint)] if steps else []
    if acting:
        shape = ModelShape.of(plain(checkpoint))
    for method, options in steps:
        if (package := method.needs_package) and find_spec(package) is None:
            raise BadInput(
                f"The method {method.name} needs {package}: pip install 'compress-model[{package}]'."
            )
        acting += [(method, options)] if method.at_inference else []
        shape = shape if method.at_inference else method.plan(shape, options)
        result = shape  # with the methods that act on what the steps leave
        for last, its_options in acting:
            result = last.plan(result, its_options)
        planned.append(
            PlannedStep(
                *(method.name, result.nbytes, result.parameters, result.num_layers, str(result.loads_with))
            )
        )
    return Plan(before, result if planned else shape, planned)
