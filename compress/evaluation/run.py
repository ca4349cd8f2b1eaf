"""Carry out a recipe, from its text to its scorecard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from compress.errors import BadInput, CompressError
from compress.evaluation.beforehand import check_evaluation
from compress.evaluation.evaluate import evaluate
from compress.pipeline.recipe import Audit, Recipe, load_recipe
from compress.pipeline.run import Keep, execute
from compress.sources.find import find_model
from compress.storage.lineage import Lineage, read_lineage
from compress.system.progress import Progress

log = logging.getLogger(__name__)

BRIEFLY = Audit(survives=[], relearn=[])
"""The audit of a recipe that asks for none: only the steps of the recipe, or `USUAL` where none follow."""

USUAL = ["int4"]


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

    If the recipe has a step of unlearning, the result is audited too: does it stay forgotten?

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
    unseen: Set[str] = frozenset()
    if (wanted := loaded.evaluate) is not None:
        unseen = check_evaluation(loaded.model, loaded.revision, **wanted.model_dump(), progress=progress)
    auditing = _auditing(loaded)
    lineage = execute(
        loaded,
        output,
        resume=resume,
        overwrite=overwrite,
        device=device,
        progress=progress,
        keep=_keep() if auditing else None,
        unseen=unseen,
    )
    folder = str(output.absolute())  # a folder may be called "demo"
    if wanted is not None:
        evaluate(
            folder,
            baseline=loaded.model,
            baseline_revision=loaded.revision,
            **wanted.model_dump(),
            device=device,
            progress=progress,
        )
    if auditing is not None:
        _audit(folder, auditing, loaded, device, progress)
    return read_lineage(output) or lineage


def _auditing(recipe: Recipe) -> Audit | None:
    """The audit after a run; None for none. What it needs is checked before the run.

    Raises:
        BadInput: an audit is asked for of a recipe that unlearns nothing, or it cannot be done.
    """
    if recipe.audit and not recipe.unlearning:
        raise BadInput("The recipe asks for an audit of forgetting, but has no step of unlearning.")
    if recipe.audit is False or not recipe.unlearning:
        return None
    if recipe.audit is None:
        short = recipe.unlearning == len(recipe.steps)
        return BRIEFLY.model_copy(update={"survives": USUAL}) if short else BRIEFLY
    from compress.evaluation.forgetting.grid import ways_named
    from compress.evaluation.forgetting.sets import read_sets

    wanted = recipe.audit
    ways_named(wanted.survives or ())
    if wanted.retrained:
        find_model(wanted.retrained)
    options = recipe.steps[recipe.unlearning - 1][1]
    forget, retain = (getattr(wanted, name) or getattr(options, name, None) for name in ("forget", "retain"))
    read_sets(forget, retain, wanted.holdout, wanted.world, wanted.limit, recipe.seed)
    return wanted


def _keep() -> Keep:
    from compress.evaluation.forgetting.contestants import keep_unlearned

    return keep_unlearned


def _audit(folder: str, wanted: Audit, recipe: Recipe, device: str, progress: Progress) -> None:
    """Audit the result of a run.

    Raises:
        CompressError: the recipe wants the run to fail, because the model does not stay forgotten.
    """
    from compress.evaluation.forgetting.audit import audit

    settings = wanted.model_dump(exclude={"strict", "relearn"})
    try:
        result = audit(
            folder,
            **settings,
            relearning=wanted.relearn,
            target=find_model(recipe.model, recipe.revision).folder.as_posix(),
            seed=recipe.seed,
            device=device,
            progress=progress,
        )
    except CompressError as error:
        if recipe.audit is not None:
            raise
        log.warning("The model was not audited: %s", error)  # nobody asked for it, and the run is done
        return
    if wanted.strict and result.kind != "forgotten":
        raise CompressError(result.sentence)
