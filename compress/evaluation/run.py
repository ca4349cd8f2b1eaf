"""Carry out a recipe, from its text to its scorecard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.evaluation.evaluate import evaluate
from compress.pipeline.recipe import Recipe, load_recipe
from compress.pipeline.run import execute
from compress.storage.lineage import Lineage, read_lineage
from compress.system.progress import Progress


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    resume: bool | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress = lambda text, share: None,
) -> Lineage:
    """Carry out a recipe and write the model to ``output``; then evaluate it if the recipe asks for that.

    Args:
        recipe: a YAML file, the name of a bundled recipe, or a recipe as a dictionary. A validated `Recipe`
            is taken as it is: model, revision, dtype, seed and settings do not change it.
        output: a folder that does not exist or is empty, unless ``overwrite``.
        model: replaces the recipe's model: a folder, a hub id, or ``demo``.
        revision: branch, tag or commit of a model on the hub.
        dtype: of the tensors that are not quantized: float32, bfloat16 or float16.
        seed: of every random choice.
        settings: changes to the recipe, such as ``steps.0.bits=3``.
        resume: True goes on with an interrupted run, False starts over; None goes on if it is the same run,
            and raises an error if it is another one.
        overwrite: replace the model that is in ``output``.
        device: where to compute.
        progress: called with a text and the share that is done.

    Returns:
        What is in the folder's compression.json.

    Raises:
        BadInput: the recipe is not valid, or does not fit the model, the text, the device or the output.
        CompressError: the work failed.
    """
    changes = {"model": model, "revision": revision, "dtype": dtype, "seed": seed}
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, changes, settings)
    output = Path(output)
    lineage = execute(loaded, output, resume=resume, overwrite=overwrite, device=device, progress=progress)
    if (wanted := loaded.evaluate) is None:
        return lineage
    evaluate(
        str(output.absolute()),  # a folder may be called "demo"
        baseline=loaded.model,
        baseline_revision=loaded.revision,
        **wanted.model_dump(),
        device=device,
        progress=progress,
    )
    return read_lineage(output) or lineage
