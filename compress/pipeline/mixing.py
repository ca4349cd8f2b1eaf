"""Bits for every linear of a recipe, chosen so that the model fits into a memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.calibration.text.prepare import prepare_calibration
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.pipeline.plan import open_model
from compress.pipeline.recipe import Recipe, validated
from compress.system.device import check_device
from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.quantization.parts.mixing import Mix


def choose_bits(
    recipe: Recipe,
    widths: Sequence[int],
    memory: int,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> Mix:
    """Choose the bits of every linear for the one quantization step of a recipe, in ``folder`` (see `mix`).

    Raises:
        BadInput: the recipe is another one, a width is none, or as `mix`.
    """
    from compress.quantization.parts.layout import WeightOptions
    from compress.quantization.parts.mixing import mix

    if len(recipe.steps) != 1 or not isinstance(recipe.steps[0][1], WeightOptions):
        raise BadInput(
            "Bits can be chosen for a recipe of one step, whose method takes bits and a group size (rtn, "
            "hqq, awq, gptq or apiq); run other steps first, and start from their result."
        )
    method, options = recipe.steps[0]
    for bits in widths:
        validated(type(options), options.model_dump() | {"bits": bits}, method.name)
    check_device(device)
    checkpoint = open_model(recipe)[1]
    model = StreamedModel(checkpoint, device, progress)
    windows = prepare_calibration(recipe.calibration, recipe.seed, checkpoint, device, progress)
    return mix(
        model,
        options,
        widths,
        memory,
        windows,
        recipe.seed,
        folder,
        calibrated=method.needs_calibration,
    )
