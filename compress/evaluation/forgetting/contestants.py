"""The three models of an audit, and what later steps make of them.

What steps make is kept in the cache for as long as it is needed, under the model's hash and the steps, by the
pipeline itself: a run that was interrupted goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import compress
from compress.engine.config import config_of
from compress.engine.skeleton import check_positions, skeleton
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.evaluation.foreign import Foreign, open_any
from compress.evaluation.forgetting.grid import Way
from compress.evaluation.harness.cache import digest
from compress.evaluation.harness.subject import Subject
from compress.pipeline.artefact import write_model
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.report.scorecard import ModelIdentity
from compress.sources.find import ModelSource
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import LINEAGE, Step
from compress.storage.sharded import is_sharded
from compress.system.cache import cache_folder, make_folder
from compress.system.files import file_sha256
from compress.system.progress import Progress

log = logging.getLogger(__name__)

FOLDER = "audit"
"""The folder of the cache that holds what audits make."""

KEPT = {"models": 16, "unlearned": 4}
"""How many models of each kind the cache keeps: what later steps made, and those before their later steps."""


@dataclass(frozen=True)
class HowToMake:
    """What later steps depend on, beside their options.

    Attributes:
        seed: of every random choice.
        calibration: section of a recipe.
        forget: the records that calibration text must not tell.
        device: where to compute.
        progress: told what is done.
    """

    seed: int
    calibration: Mapping[str, Any]
    forget: str
    device: str
    progress: Progress

    @cached_property
    def identity(self) -> list[Any]:
        """Says what is made in this way. Of files the content counts, which may be edited, and relative
        paths mean other files in other folders."""
        sources = (self.calibration.get("source"), self.forget)
        files = [Path(source).expanduser() for source in sources if source]
        content = [file_sha256(file) for file in files if file.is_file()]
        return [self.seed, dict(self.calibration), self.forget, *content]


class Contestant:
    """One of the models, and what steps make of it.

    Args:
        source: of the model.
        device, kernel: how it is run.
        name: for people; by default that of the source.
    """

    def __init__(self, source: ModelSource, device: str, kernel: str, name: str | None = None) -> None:
        self.source = source
        self.name = name or (Path(source.id).name if Path(source.id).is_dir() else source.id)
        self._device, self._kernel = device, kernel
        self.opened = open_any(source.folder)
        self.tokenizer = load_tokenizer(source.folder)

    @cached_property
    def subject(self) -> Subject:
        """How the model is run."""
        return self.subject_of(self.opened)

    def subject_of(self, opened: Checkpoint | Foreign) -> Subject:
        """How what became of the model is run."""
        return Subject(self.name, opened, self._device, self._kernel)

    @cached_property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(name=self.name, sha256=self.opened.sha256)

    @property
    def obstacle(self) -> str | None:
        """Why no later step can follow, as what is said of the model; None if one can."""
        if isinstance(self.opened, Foreign) or "quantization_config" in self.opened.config:
            return "is quantized already"
        return "is an ensemble of S3T" if is_sharded(self.opened.config) else None

    def check_positions(self, length: int) -> None:
        """Make sure that the model has positions for texts of so many tokens.

        Raises:
            BadInput: it has not. Of models that only transformers reads, nothing is known.
        """
        if isinstance(self.opened, Checkpoint):
            check_positions(skeleton(config_of(self.opened)), length, "use a smaller seqlen")

    def key(self, way: Way, how: HowToMake) -> str:
        """Says what way makes of this model: whatever it depends on."""
        if way.made is not None:
            return digest(compress.__version__, self.subject_of(open_any(way.made)).identity)
        made = how.identity if way.steps else []
        return digest(compress.__version__, self.subject.identity, list(way.steps), made)

    def after(self, way: Way, how: HowToMake) -> Path:
        """The folder of the model after the steps, which are done if they have not been done before.

        Raises:
            BadInput: a step does not fit the model.
            CompressError: a step failed.
        """
        if way.made is not None or not way.steps:
            return way.made or self.source.folder
        folder = self.folder(way, how)
        if not (folder / LINEAGE).is_file():
            recipe = parse_recipe(
                {
                    "model": str(self.source.folder),
                    "seed": how.seed,
                    "calibration": dict(how.calibration),
                    "audit": {"forget": how.forget},
                    "steps": list(way.steps),
                }
            )
            make_folder(folder.parent)
            # Nobody else reads this model, so how other programs run it does not matter.
            execute(recipe, folder, device=how.device, progress=how.progress, try_loaders=False)
        os.utime(folder)
        return folder

    def folder(self, way: Way, how: HowToMake) -> Path:
        """Where the cache keeps the model after the steps."""
        return cache_folder() / FOLDER / "models" / self.key(way, how)[:32]

    def lock(self, way: Way, how: HowToMake) -> Path | None:
        """The file that is locked while the model after the steps is made, asked and removed, so that two
        audits do not do so at once; None where nothing is made."""
        if way.made is not None or not way.steps:
            return None
        folder = self.folder(way, how)
        make_folder(folder.parent)
        return folder.with_name(f".{folder.name}.audit.lock")

    def discard(self, way: Way, how: HowToMake) -> None:
        """Remove what the steps made, unless it was there before."""
        if way.steps and way.made is None:
            shutil.rmtree(self.folder(way, how), ignore_errors=True)


def tidy() -> None:
    """Remove models from the cache that were not used for the longest time, beyond those that it keeps."""
    for kind, count in KEPT.items():
        folders = [path for path in (cache_folder() / FOLDER / kind).glob("[!.]*") if path.is_dir()]
        for old in sorted(folders, key=lambda path: path.stat().st_mtime)[:-count]:
            shutil.rmtree(old, ignore_errors=True)


def same_tokens(contestants: Sequence[Contestant], items: Sequence[Any]) -> None:
    """Make sure that all models read the records as the same tokens.

    Args:
        contestants: the first of them is what the others are compared with.
        items: of each contestant.

    Raises:
        BadInput: two tokenizers differ.
    """
    first, *others = contestants
    for other, theirs in zip(others, items[1:], strict=True):
        if theirs != items[0]:
            raise BadInput(
                f"'{first.source.id}' and '{other.source.id}' have different tokenizers, so they cannot be "
                "compared; give models of one family."
            )


def keep_unlearned(
    checkpoint: Checkpoint, source: Path, recipe: Mapping[str, Any], sha256: str, steps: Sequence[Step]
) -> None:
    """Keep a model in the cache as it is after the recipe's steps of unlearning, before others follow.

    Args:
        checkpoint: the model as it is then.
        source: folder of the recipe's model.
        recipe: resolved.
        sha256: of the recipe's model.
        steps: the records of the steps of unlearning.
    """
    folder = unlearned_folder(recipe, sha256, steps)
    make_folder(folder.parent)
    fresh = folder.with_name(f".{folder.name}-fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    write_model(checkpoint, source, fresh, dict(recipe))
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run of the same recipe
    fresh.rename(folder)


def unlearned_folder(recipe: Mapping[str, Any], sha256: str, steps: Sequence[Step]) -> Path:
    """Where the cache keeps what the first steps of a recipe, those of unlearning, made of a model."""
    parts = [recipe.get(name) for name in ("seed", "dtype", "calibration")]
    content = [step.content for step in steps]  # the recipe only names the sets of records
    key = digest(compress.__version__, sha256, parts, unlearning_steps(recipe), content)
    return cache_folder() / FOLDER / "unlearned" / key[:32]


def unlearning_steps(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first steps of a resolved recipe, those of unlearning."""
    from compress.pipeline.registry import find_method

    return [step for step in recipe["steps"] if find_method(step["method"]).family == "unlearning"]


def check_content(step: Step, source: str, name: str, sha256: str, advice: str) -> None:
    """Make sure that a set is still the one with which a model was unlearned.

    Args:
        step: the record of the unlearning. If it does not tell the content of the set, nothing is checked.
        source: of the set.
        name: of the option that names it.
        sha256: of what it holds now.
        advice: what to do if it is not, for the message.

    Raises:
        BadInput: it is another one.
    """
    if step.content.get(name, sha256) != sha256:
        raise BadInput(f"'{source}' is not what it was when the model was unlearned; {advice}.")


def remake(
    recipe: Mapping[str, Any],
    target: ModelSource,
    sha256: str,
    steps: Sequence[Step],
    device: str,
    progress: Progress,
) -> Path:
    """The unlearned model before the later steps of a recipe: from the cache, or unlearned once more.

    Args:
        recipe: resolved.
        target: the recipe's model.
        sha256: of it.
        steps: the records of the steps of unlearning.
        device: where to compute.
        progress: told what is done.

    Raises:
        BadInput: the sets of records have changed, so it cannot be unlearned again; or as `execute`.
        CompressError: as `execute`.
    """
    folder = unlearned_folder(recipe, sha256, steps)
    if not (folder / "config.json").is_file():
        parts = {key: recipe[key] for key in ("seed", "dtype", "calibration") if recipe.get(key) is not None}
        again = parse_recipe({**parts, "model": str(target.folder), "steps": unlearning_steps(recipe)})
        advice = "put that back, so that it can be unlearned again"
        for step, (_, options) in zip(steps, again.steps, strict=True):
            for name, content in options.content().items():
                check_content(step, getattr(options, name), name, content, advice)
        log.warning(
            "The model as it was before its later steps is not kept any more, so it is unlearned again."
        )
        make_folder(folder.parent)
        execute(again, folder, device=device, progress=progress, try_loaders=False)
    os.utime(folder)
    return folder
