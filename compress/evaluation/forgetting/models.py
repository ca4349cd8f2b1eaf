"""Which models an audit is about: the unlearned one, its target, and the one that never learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.errors import BadInput, CompressError
from compress.evaluation.foreign import open_any
from compress.evaluation.forgetting.contestants import remake, unlearning_steps
from compress.evaluation.forgetting.grid import Way, ways_of
from compress.sources.find import ModelSource, find_model
from compress.storage.checkpoint import read_config
from compress.storage.lineage import Lineage, Step, read_lineage, read_recipe
from compress.storage.sharded import is_sharded
from compress.system.progress import Progress


@dataclass(frozen=True)
class Models:
    """The models, and what is known of how the unlearned one was made.

    Attributes:
        unlearned: in full precision, before later steps.
        target: what it was made from.
        retrained: the model that never learned the forget set.
        asked: the folder that the audit is of, which is the unlearned one, or what later steps made of it.
        ways: the later steps that were done, one after another.
        recipe: the resolved recipe; empty for a model of another tool.
        steps: the records of its steps of unlearning.
    """

    unlearned: ModelSource
    target: ModelSource
    retrained: ModelSource | None
    asked: ModelSource
    ways: tuple[Way, ...]
    recipe: dict[str, Any]
    steps: tuple[Step, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the last step of unlearning."""
        steps = unlearning_steps(self.recipe) if self.recipe else []
        return steps[-1] if steps else {}


@dataclass(frozen=True)
class Revisions:
    """Branches, tags or commits of models on the hub; None takes the main branch."""

    model: str | None = None
    target: str | None = None
    retrained: str | None = None


def find_models(
    model: str,
    target: str | None,
    retrained: str | None,
    device: str,
    progress: Progress,
    revisions: Revisions = Revisions(),
) -> Models:
    """Find the models of an audit.

    A folder that compress-model wrote says what it was made from and by which steps. If others followed those
    of unlearning, the model before them is taken from the cache, or unlearned again.

    Raises:
        BadInput: there is no such model; the target is not known, not there any more, or has changed.
    """
    asked = find_model(model, revisions.model)
    lineage = read_lineage(asked.folder)
    never = find_model(retrained, revisions.retrained) if retrained else None
    sharded = is_sharded(read_config(asked.folder))
    recipe = (read_recipe(asked.folder) or {}) if lineage and not sharded else {}
    named = find_model(target, revisions.target) if target else None
    if not recipe or not unlearning_steps(recipe):
        if named is None:
            own = "was trained by S3T" if sharded else "has no step of unlearning"
            what = own if lineage else "was not written by compress-model"
            raise BadInput(f"'{asked.id}' {what}; say with --target which model still knows the records.")
        return Models(asked, named, never, asked, (), {}, ())
    assert lineage is not None  # a recipe has been read
    origin = named or _parent(lineage)
    later = [step for step in recipe["steps"] if step not in unlearning_steps(recipe)]
    unlearned = asked
    steps = tuple(step for step in lineage.steps if step.family == "unlearning")
    if later:
        folder = remake(recipe, origin, open_any(origin.folder).sha256, steps, device, progress)
        unlearned = ModelSource(str(folder), None, folder)
    return Models(unlearned, origin, never, asked, tuple(ways_of(later, asked.folder)), recipe, steps)


def _parent(lineage: Lineage) -> ModelSource:
    """The model that a run started from.

    Raises:
        BadInput: it is not there any more, or has changed.
    """
    parent = lineage.parent
    try:
        source = find_model(parent.id, parent.revision)
    except CompressError as error:  # such as a hub that cannot be reached
        raise BadInput(
            f"The model was made from '{parent.id}', which cannot be found any more; name it with --target."
        ) from error
    if open_any(source.folder).sha256 != parent.sha256:
        raise BadInput(
            f"'{parent.id}' is not the model any more that this one was made from; name that with --target."
        )
    return source
