"""Bits for every linear, chosen by measured sensitivity: for a recipe, or for a step that asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.calibration.text.prepare import prepare_calibration
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.method import Method, MethodOptions, StepContext
from compress.pipeline.plan import open_model
from compress.pipeline.recipe import Recipe, validated
from compress.storage.checkpoint import Checkpoint
from compress.system.device import check_device, computing_on
from compress.system.files import write_atomically
from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.quantization.parts.mixing import Mix

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a step may give to a linear."""


def mix_bits(
    method: Method, options: MethodOptions, model: Checkpoint, context: StepContext
) -> MethodOptions:
    """The options of a step, with the bits of every linear chosen if the step asks for that (``mix``).

    What was chosen is kept in the step's folder, so that a run that was interrupted goes on with it.

    Raises:
        BadInput: see `mix`.
    """
    from compress.quantization.parts.mixing import mix
    from compress.quantization.parts.options import WeightOptions

    if not isinstance(options, WeightOptions) or not options.mix:
        return options
    chosen = context.folder / "mixed.json"
    if chosen.exists():
        return type(options).model_validate_json(chosen.read_text(encoding="utf-8"))
    room = context.folder / "mixing"
    room.mkdir(exist_ok=True)
    found = mix(
        StreamedModel(model, context.device, context.progress),
        options,
        WIDTHS,
        None,
        context.calibration,
        context.seed,
        room,
        calibrated=method.needs_calibration,
    )
    write_atomically(chosen, found.options.model_dump_json())
    shutil.rmtree(room)  # the Fisher information is as large as the model
    return found.options


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
    from compress.quantization.parts.mixing import mix
    from compress.quantization.parts.options import WeightOptions

    if len(recipe.steps) != 1 or not isinstance(recipe.steps[0][1], WeightOptions):
        raise BadInput(
            "Bits can be chosen for a recipe of one step, whose method takes bits and a group size (rtn, "
            "hqq, awq, gptq or apiq); run other steps first, and start from their result."
        )
    method, options = recipe.steps[0][0], recipe.steps[0][1]
    for bits in widths:
        validated(type(options), options.model_dump() | {"bits": bits}, method.name)
    check_device(device)
    checkpoint = open_model(recipe)[1]
    with computing_on(device):
        windows = prepare_calibration(
            recipe.calibration, recipe.seed, checkpoint, device, progress, recipe.text_size
        )
        return mix(
            StreamedModel(checkpoint, device, progress),
            options,
            widths,
            memory,
            windows,
            recipe.seed,
            folder,
            calibrated=method.needs_calibration,
        )
