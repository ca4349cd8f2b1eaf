"""Recipes: what to do to which model, validated before anything else is read or written."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from compress.calibration.text.settings import DEFAULT_SIZE, Calibration, Section, Seed, TextSize
from compress.errors import BadInput, unknown
from compress.method import Method, MethodOptions
from compress.pipeline.registry import find_method

if TYPE_CHECKING:
    from compress.engine.windows import Windows

ORDER = ("unlearning", "pruning", "quantization")
WHY_ORDER = {
    (
        "pruning",
        "unlearning",
    ): "unlearning measures and edits the whole model, so what was pruned before would be missed",
    (
        "quantization",
        "unlearning",
    ): "unlearning edits weights finer than a quantization step, which are gone by then",
    ("quantization", "pruning"): "pruning edits and moves weights, which packed low-bit codes do not allow",
}
Dtype = Literal["float32", "bfloat16", "float16"]


class Evaluation(Section):
    """The evaluation after the run, against the recipe's model."""

    suite: Literal["text", "quick", "kick", "kick-hub"] = Field(
        "text", description="text alone, or also the questions of LLM-KICK: all, or a few of them (quick)"
    )
    tasks: list[str] = Field([], description="tasks and groups of lm-eval to ask, in place of a suite's")
    include_path: list[str] = Field([], description="folders with files of further tasks")
    fewshot: NonNegativeInt | None = Field(
        None, description="examples in front of each question; by default as many as the task says"
    )
    limit: PositiveInt | None = Field(None, description="largest number of questions of each task")
    batch_size: PositiveInt | Literal["auto"] = Field("auto", description="questions asked at once")
    chat_template: bool = Field(False, description="put each question into the model's chat template")
    task_file: str | None = Field(
        None, description="labelled examples (.jsonl) for an encoder with a task head, in place of text"
    )
    text: str = Field("bundled:evaluation", description="text to score; sources as for calibration")
    context: PositiveInt | None = Field(
        None,
        description="tokens in a window, and the stride; by default 512, or as many as the model has "
        "positions for",
    )
    windows: PositiveInt = Field(32, description="number of windows at most")


class Audit(Section):
    """The audit of forgetting after the run, of a recipe with a step of unlearning."""

    forget: str | None = Field(None, description="records to forget; by default those of the step")
    retain: str | None = Field(None, description="records to retain; by default those of the step")
    holdout: str | None = Field(None, description="records of the same kind that no model has seen")
    world: str | None = Field(None, description="other records that count for utility")
    retrained: str | None = Field(None, description="a model that never saw the records to forget")
    survives: list[str] | None = Field(
        None, description="later steps to try beside those of the recipe, such as int4; by default a grid"
    )
    relearn: list[NonNegativeInt] = Field(
        [0, 10, 50, 100], description="numbers of updates on retained records after which to ask again"
    )
    limit: PositiveInt | None = Field(
        100, description="largest number of records of each set but the one to forget"
    )
    seqlen: PositiveInt = Field(256, description="tokens of a record at most")
    strict: bool = Field(
        False, description="fail the run unless the model stays forgotten and is not damaged"
    )


class Recipe(Section):
    """A validated recipe. ``steps`` are (method, options) in the order they are done."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: str
    revision: str | None = None
    dtype: Dtype | None = Field(
        None, description="of the tensors that are not quantized; as in the model if not given"
    )
    seed: Seed = 0
    calibration: Calibration = Calibration()
    steps: list[tuple[Method, MethodOptions]] = Field([])
    evaluate: Evaluation | None = None
    audit: Audit | Literal[False] | None = Field(
        None, description="by default a short one after a step of unlearning; false for none"
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether a step looks at text."""
        return any(
            method.needs_calibration or getattr(options, "mix", False) for method, options in self.steps
        )

    @property
    def forgotten(self) -> list[str]:
        """The sets of records that steps forget, which no text of the recipe may tell."""
        found = [getattr(options, "forget", None) for _, options in self.steps]
        audited = self.audit.forget if self.audit else None
        return [source for source in (*found, audited) if source]

    @property
    def unlearning(self) -> int:
        """Number of the steps of unlearning, which come first."""
        return sum(method.family == "unlearning" for method, _ in self.steps)

    @property
    def text_size(self) -> TextSize:
        """Calibration text for all steps: as much as the step wants that is content with the least."""
        sizes = [method.text_size for method, _ in self.steps if method.needs_calibration]
        return min(sizes, key=lambda size: size.nsamples * size.seqlen, default=DEFAULT_SIZE)

    def resolved(self, windows: Windows | None = None) -> dict[str, Any]:
        """The recipe with every default written out, as plain data: ``recipe.yaml`` of an artefact.

        Args:
            windows: the calibration text that was used, if any. It says how much that was.
        """
        data = self.model_dump(mode="json", exclude={"steps"}, exclude_none=True)
        if windows is not None:
            used = windows.describe()
            data["calibration"] |= {"nsamples": used["nsamples"], "seqlen": used["seqlen"]}
        steps = [{"method": method.name, **options.model_dump(mode="json")} for method, options in self.steps]
        return {
            key: steps if key == "steps" else data[key]
            for key in [*data, "steps"]
            if key in data or key == "steps"
        }


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    folder = Path(str(importlib.resources.files("compress.pipeline"))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """Read and validate a recipe.

    Args:
        source: a YAML file, the name of a bundled recipe, or a recipe as a dictionary.
        overrides: top-level keys that replace the recipe's; those that are None are left out.
        settings: ``steps.0.ratio=0.3`` strings (values are YAML).

    Raises:
        BadInput: there is no such file, it is not YAML, a key or method is unknown, a value is out of range,
            or the steps are in an unsound order.
    """
    if isinstance(source, Mapping):
        data = _with_included(copy.deepcopy(dict(source)), "recipe", Path(), ())
    else:
        data = _read(Path(source), seen=())
    for setting in settings:
        _set(data, setting)
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    return parse_recipe(_changed(data, changes))


def _changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``data`` with top-level ``changes``; a revision is one of its own model."""
    return {
        key: value for key, value in data.items() if key != "revision" or "model" not in changes
    } | changes


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as plain data. Raises BadInput as `load_recipe` does."""
    data = dict(data)
    raw_steps = [] if data.get("steps") is None else data["steps"]
    if not isinstance(raw_steps, list):
        raise BadInput("In the recipe, 'steps' must be a list of {method: NAME, option: value}.")
    if data.get("model") is None and data.keys() <= Recipe.model_fields.keys():  # no key is misspelt
        raise BadInput("The recipe names no model; add 'model: NAME' or use -m.")
    steps = [_step(number, raw) for number, raw in enumerate(raw_steps)]
    _check_order([method for method, _ in steps])
    return validated(Recipe, {**data, "steps": steps}, "recipe")


def _step(number: int, raw: Any) -> tuple[Method, MethodOptions]:
    if not isinstance(raw, dict) or not isinstance(raw.get("method"), str):
        raise BadInput(f"Step {number} of the recipe names no method; write {{method: NAME, option: value}}.")
    method = find_method(raw["method"])
    options = {key: value for key, value in raw.items() if key != "method"}
    return method, validated(method.Options, options, f"steps.{number} ({method.name})")


def _check_order(methods: list[Method]) -> None:
    for before, after in pairwise(methods):
        if ORDER.index(before.family) > ORDER.index(after.family):
            why = WHY_ORDER[before.family, after.family]
            raise BadInput(
                f"'{after.name}' ({after.family}) must come before '{before.name}' ({before.family}): {why}; "
                "put the steps in the order unlearn, prune, quantize."
            )
    quantizers = [method.name for method in methods if method.family == "quantization"]
    if len(quantizers) > 1:
        raise BadInput(f"Weights can be quantized once, but the recipe has {' and '.join(quantizers)}.")


def validated(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """``model(**values)``, with pydantic's complaints as one sentence that names the key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt name first, since it may be the reason why another is missing.
        errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        first, (path, section) = errors[0], _located(model, errors[0]["loc"])
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            if name in (renamed := getattr(section, "renamed", {})):
                new, comma, remark = renamed[name].partition(",")
                raise BadInput(
                    f"In {where}: the option '{name}' is now called '{new}'{comma}{remark}."
                ) from None
            raise BadInput(f"In {where}: {unknown('option', name, section.model_fields)}") from None
        if first["type"] == "missing":
            raise BadInput(f"In {where}: the option '{path}' is required.") from None
        # A value that may be of several types is complained about once for each of them.
        same = [other for other in errors if _located(model, other["loc"])[0] == path]
        complaints = dict.fromkeys(other["msg"].removeprefix("Value error, ") for other in same)
        what = " or ".join(complaints).replace(" or Input should be ", " or ")
        got = f" (got {first['input']!r})" if not isinstance(first["input"], dict) else ""
        raise BadInput(f"In {where}: {f'{path}: ' if path else ''}{what}{got}.") from None


def _located(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """``section.option`` of pydantic's location, which also names types, and the model the option is in."""
    path: list[str] = []
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif part in model.model_fields:
            path.append(part)
            annotation = model.model_fields[part].annotation
            kinds = (annotation, *getattr(annotation, "__args__", ()))
            model = next((kind for kind in kinds if _is_section(kind)), model)
    return ".".join(path), model


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's readers silently take the last.

    Keys are compared before merge keys (``<<: *other``) are replaced by what they bring, because a mapping
    may well give another value to a key that it merges.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: list[Any] = []
        for key, _ in node.value:
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            value = key.value if is_merge else self.construct_object(key, deep=True)
            if value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{value}' is given twice", key.start_mark
                )
            keys.append(value)
        return node


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():  # a folder may well have the name of a bundled recipe
        bundled = bundled_recipes()
        if path.name not in bundled or len(path.parts) > 1:
            if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
                raise BadInput(f"There is no recipe file '{path}'.")
            raise unknown("recipe", str(path), bundled)
        path = bundled[path.name]
    path = path.resolve()
    if path in seen:
        raise BadInput(f"The recipe '{path}' includes itself.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except Exception as error:  # YAML's reader lets the errors of dates, numbers and deep nesting through
        raise BadInput(f"The recipe '{path}' cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise BadInput(f"The recipe '{path}' is not a YAML mapping.")
    return _with_included(data, f"recipe '{path}'", path.parent, (*seen, path))


def _with_included(data: dict[str, Any], what: str, folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """``data`` on top of the recipe it includes, which is a file beside it or a bundled one."""
    included = data.pop("include", None)
    if included is None:
        return data
    if not isinstance(included, str):
        raise BadInput(f"In the {what}, 'include' must be one file name.")
    base = folder / included
    return _changed(_read(base if base.exists() else Path(included), seen), data)


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    try:
        value = yaml.safe_load(text)
    except Exception:  # as when a recipe is read
        value, equals = None, ""
    if not equals or not key:
        raise BadInput(f"'{setting}' is not a setting; write KEY=VALUE, for example steps.0.bits=4.")
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise BadInput(f"The recipe has no '{key}' to set.")
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise BadInput(f"The recipe has no '{key}' to set.")
