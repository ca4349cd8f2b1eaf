"""What is published of a model: its files as they were written, and its card, record and recipe.

Only files that the record lists with their sha256 are published. So what somebody else put into the folder
stays here, and what is published is what was evaluated.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from compress.errors import BadInput
from compress.report.card import CARD, Base, base_of, relation_of, render_card
from compress.sources.demo import LICENCE as DEMO_LICENCE
from compress.storage import sharded
from compress.storage.companions import PRUNED_FILE, is_inside
from compress.storage.lineage import LINEAGE, RECIPE, Lineage, read_lineage, read_recipe, record_of
from compress.system.files import file_sha256
from compress.system.progress import Progress
from compress.system.secrets import TOKEN

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".gguf")
"""The endings of files of weights that are published. Neither can run code."""

TEXTS = (*(".json", ".txt", ".model", ".jinja", ".md", ".spm", ".tiktoken", ".bpe", ".codes", ".vocab"), "")
"""The endings of the small files that a model has besides; licences often have none."""

MOST_SCANNED = 64 * 10**6
"""Bytes of a small file that are searched for access tokens."""

DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the hub that ``demo`` was converted from."""

LICENCE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Published:
    """A file that is published.

    Attributes:
        name: in the repository.
        content: where it is, or what is in it.
        sha256: of its content, in hexadecimal digits.
    """

    name: str
    content: Path | bytes
    sha256: str

    @property
    def nbytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(WEIGHTS)

    @cached_property
    def git_sha1(self) -> str:
        """The name that git gives to this content."""
        found = hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)
        if isinstance(self.content, bytes):
            found.update(self.content)
            return found.hexdigest()
        with self.content.open("rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
        return found.hexdigest()


@dataclass(frozen=True)
class Publication:
    """All that is published of a model.

    Attributes:
        name: of the model.
        base: the model on the hub that it was made from, if that is known.
        licence: of the model, as the hub writes it.
        files: the weights come last.
        is_file: it is one file of weights, which other files may lie beside.
    """

    name: str
    base: Base | None
    licence: str
    files: list[Published]
    is_file: bool

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def publication(
    path: Path, licence: str | None = None, progress: Progress = lambda text, share: None
) -> Publication:
    """Collect what is published of a model folder, or of a ``.gguf`` file with its record.

    Args:
        path: what compress-model wrote.
        licence: of the model, where that of its base model is not known, such as "apache-2.0".
        progress: told how much of the files is checked.

    Raises:
        BadInput: compress-model did not write it; it is no model; a file is missing, has changed, or holds
            weights that are neither safetensors nor GGUF; a small file holds an access token; or the licence
            is not known, or known to be another.
    """
    is_file = path.is_file()
    lineage, record, recipe = _read(path)
    if lineage.exported and lineage.exported.target == "imatrix":
        raise BadInput(f"'{path}' holds importances and no model, so there is no card for it; push a model.")
    private = _without_folders(lineage.model_dump(mode="json"))
    shown = Lineage.model_validate_json(_json(private))
    base = base_of(lineage) or _demo(lineage)
    model = list(_model_files(path, lineage, progress))
    if is_file:  # it may have been renamed since it was written
        result = shown.result.model_copy(update={"files": {file.name: file.sha256 for file in model}})
        shown = shown.model_copy(update={"name": path.name, "result": result})
    shown = shown.model_copy(update={"card": _licensed(shown, base, licence, {file.name for file in model})})
    recipe_text = yaml.safe_dump(_without_folders(recipe), sort_keys=False) if recipe is not None else None
    texts = {CARD: render_card(shown, recipe_text, base, record), record: shown.model_dump_json(indent=2)}
    if recipe_text is not None:
        texts[RECIPE] = recipe_text
    made = [_text(name, text) for name, text in texts.items()]
    _refuse_tokens([*made, *model])
    if not is_file:
        _tell_what_stays(path, lineage, recipe, {file.name for file in (*made, *model)})
    return Publication(
        shown.name, base, str(shown.card["license"]), sorted([*made, *model], key=_weights_last), is_file
    )


def _weights_last(file: Published) -> tuple[bool, str]:
    return file.is_weights, file.name


def _text(name: str, text: str) -> Published:
    content = text.encode()
    return Published(name, content, hashlib.sha256(content).hexdigest())


def _read(path: Path) -> tuple[Lineage, str, Any]:
    """The record of a model, the name of the file that holds it, and the recipe."""
    if path.is_dir():
        lineage = read_lineage(path)
        if lineage is None:
            raise BadInput(f"'{path}' was not written by compress-model: it has no {LINEAGE}.")
        if (path / sharded.KEY / sharded.STATE).is_file():
            raise BadInput(
                f"'{path}' is an ensemble that S3T trained, which holds the records it was trained on; it is "
                "not pushed, so that they can still be deleted."
            )
        return lineage, LINEAGE, read_recipe(path)
    if not path.exists():
        raise BadInput(f"There is no folder or file '{path}'.")
    if path.suffix != ".gguf":
        raise BadInput(f"'{path}' is neither a model folder nor a .gguf file.")
    name = record_of(path).name
    lineage = read_lineage(path)
    if lineage is None:
        raise BadInput(
            f"'{path}' has no record '{name}' beside it; only what 'compress-model export' wrote is pushed."
        )
    return lineage, name, None


def _model_files(path: Path, lineage: Lineage, progress: Progress) -> Iterator[Published]:
    """The files that decide what the model computes, checked against the record."""
    listed = lineage.result.files
    if path.is_file():
        files = {path.name: path}
        sums = dict(zip(files, listed.values(), strict=False))
        if len(listed) != 1:
            raise BadInput(f"The record of '{path}' is not of one file.")
    else:
        files, sums = {name: path / name for name in listed}, listed
    for name, file in files.items():
        _check_kind(name)
        if not file.is_file():
            raise BadInput(f"'{file}' is missing; the record of the model lists it.")
    total, done = sum(file.stat().st_size for file in files.values()) or 1, 0
    for name, file in files.items():
        progress("checking the files", done / total)
        if file_sha256(file) != sums[name]:
            raise BadInput(
                f"'{file}' has changed since the model was written, so its record and its evaluations are of "
                "another model; push a model as it was written."
            )
        done += file.stat().st_size
        yield Published(name, file, sums[name])
    progress("checking the files", 1.0)
    if not any(name.endswith(WEIGHTS) for name in files):
        raise BadInput(f"'{path}' has no weights in safetensors or GGUF, so there is nothing to push.")


def _check_kind(name: str) -> None:
    if not is_inside(name):
        raise BadInput(f"The record of the model lists '{name}', which is outside of its folder.")
    if name == PRUNED_FILE or name.endswith(WEIGHTS) or Path(name).suffix.lower() in TEXTS:
        return
    raise BadInput(
        f"'{name}' is not pushed: weights are pushed as safetensors or GGUF only, and other files only if "
        "they are small texts; 'compress-model export' writes both formats."
    )


def _refuse_tokens(files: list[Published]) -> None:
    """Refuse to publish an access token that somebody left in a settings file or in a recipe."""
    for file in files:
        if file.is_weights or file.nbytes > MOST_SCANNED:
            continue
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        if TOKEN.search(content.decode("utf-8", errors="replace")):
            raise BadInput(
                f"'{file.name}' holds what looks like an access token; remove it, and revoke the token."
            )


def _demo(lineage: Lineage) -> Base | None:
    first = lineage.chain()[0]
    return Base(DEMO_BASE, relation_of(lineage.chain())) if first.parent.id == "demo" else None


def _licensed(lineage: Lineage, base: Base | None, stated: str | None, files: set[str]) -> dict[str, Any]:
    """The metadata of the card with a licence.

    Raises:
        BadInput: no licence is known, or another one than the stated.
    """
    known = lineage.card.get("license")
    if known in (None, "", "unknown") and lineage.chain()[0].parent.id == "demo":
        known = DEMO_LICENCE.lower()
    if stated is not None and not LICENCE_NAME.fullmatch(stated):
        raise BadInput(f"'{stated}' is no name of a licence on the hub; write one such as apache-2.0 or mit.")
    origin = f"'{base.id if base else lineage.chain()[0].parent.id}'"
    if known in (None, "", "unknown"):
        if stated is None:
            raise BadInput(
                f"The licence of {origin} is not known; look it up, and say it with --license, such as "
                "--license apache-2.0."
            )
        return {**lineage.card, "license": stated}
    if stated is not None and stated != known:
        raise BadInput(
            f"{origin} is under the licence {known}, which holds for this model too, not {stated}."
        )
    card = {**lineage.card, "license": known}
    link = card.get("license_link")
    if base and isinstance(link, str) and "://" not in link and link not in files:
        card["license_link"] = f"https://huggingface.co/{base.id}/blob/main/{link}"
    return card


def _without_folders(found: Any) -> Any:
    """A document in which absolute paths of this machine, which tell names of users, are names of files."""
    if isinstance(found, dict):
        return {key: _without_folders(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_without_folders(value) for value in found]
    if isinstance(found, str) and "\n" not in found and found.startswith(("/", "~/", "./", "../")):
        return Path(found).name or found
    return found


def _json(document: Any) -> str:
    import json

    return json.dumps(document)


def _tell_what_stays(folder: Path, lineage: Lineage, recipe: Any, published: set[str]) -> None:
    """Say which files of a folder are not published, and whether its card was changed by hand."""
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    if stays := sorted(there - published):
        names = ", ".join(f"'{name}'" for name in stays[:5]) + (" and others" if len(stays) > 5 else "")
        log.warning("Not pushed, because the record of the model does not list it: %s.", names)
    card, text = folder / CARD, (folder / RECIPE).read_text(encoding="utf-8") if recipe is not None else None
    if card.is_file() and card.read_text(encoding="utf-8") != render_card(lineage, text):
        log.warning("The card of the pushed model is made anew from %s; '%s' differs.", LINEAGE, card)
