"""Recipes: what is accepted, what is refused and with which sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import BadInput
from compress.pipeline.recipe import bundled_recipes, load_recipe, parse_recipe
from compress.pipeline.registry import METHODS, find_method

RTN = {"method": "rtn", "bits": 4, "group_size": 32}
REPLACEME = {"method": "replaceme", "layers": 1}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as error:
        parse_recipe({"model": "demo", **data})
    return str(error.value)


def test_defaults_are_filled_in_and_numbers_keep_their_kind():
    recipe = parse_recipe({"model": "demo", "steps": [REPLACEME, RTN]})
    assert [method.name for method, _ in recipe.steps] == ["replaceme", "rtn"]
    assert (recipe.seed, recipe.dtype, recipe.evaluate) == (0, None, None)
    assert (recipe.calibration.source, recipe.calibration.nsamples) == ("bundled", None)
    assert recipe.text_size == (128, 512)
    assert recipe.steps[1][1].bits == 4
    assert recipe.needs_calibration
    assert not parse_recipe({"model": "demo", "steps": [RTN]}).needs_calibration


@pytest.mark.parametrize(
    "data",
    [
        {"steps": []},
        {"steps": [RTN], "dtype": "bfloat16", "seed": 3, "revision": "main"},
        {"steps": [REPLACEME, {**RTN, "group_size": "channel", "ignore": ["model.layers.0.*"]}]},
        {"calibration": {"source": "a.txt", "nsamples": 4, "seqlen": 8, "seed": 1, "chat_template": True}},
        {"evaluate": {"context": 64, "windows": 2}, "steps": [{**REPLACEME, "l1": 0.5, "exact": True}]},
    ],
)
def test_a_resolved_recipe_parses_to_itself(data: dict[str, Any]):
    recipe = parse_recipe({"model": "demo", **data})
    resolved = recipe.resolved()
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(resolved)))
    assert again.resolved() == resolved
    assert [options for _, options in again.steps] == [options for _, options in recipe.steps]
    assert again.model_copy(update={"steps": []}) == recipe.model_copy(update={"steps": []})


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_are_valid(name: str):
    assert load_recipe(name).model == "demo"
    assert bundled_recipes()[name].read_text().startswith("# ")  # the line 'recipes' shows


def test_every_method_has_a_bundled_recipe_with_comments():
    shown = {method.name for name in bundled_recipes() for method, _ in load_recipe(name).steps}
    ours = {name for family in METHODS.values() for name in family}
    assert shown == {name for name in ours if find_method(name).command is None}


@pytest.mark.parametrize("name", [name for family in METHODS.values() for name in family])
def test_renamed_options_are_errors_that_name_the_new_one(name: str):
    options = find_method(name).Options
    for old, new in options.renamed.items():
        assert new.partition(",")[0] in options.model_fields
        assert f"the option '{old}' is now called '{new.partition(',')[0]}'" in refused(
            {"steps": [{"method": name, old: 1}]}
        )


def test_a_recipe_may_be_a_dictionary(tmp_path: Path):
    data = {"model": "mine", "steps": [RTN]}
    assert load_recipe(data).steps[0][1].bits == 4
    changed = load_recipe({"include": "int4"}, {"model": "mine"}, ["steps.0.bits=8"])
    assert (changed.model, changed.steps[0][1].bits) == ("mine", 8)
    assert data == {"model": "mine", "steps": [RTN]}
    with pytest.raises(BadInput, match="In the recipe, 'include' must be one file name"):
        load_recipe({"include": ["int4"]})


def test_a_folder_with_the_name_of_a_bundled_recipe_does_not_hide_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int4").mkdir()
    assert load_recipe("int4").steps[0][0].name == "rtn"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stepz": []}, "no option 'stepz'; did you mean 'steps'"),
        ({"sed": 1}, "did you mean 'seed'"),
        ({"calibration": {"nsample": 1}}, "'nsample'; did you mean 'nsamples'"),
        ({"evaluate": {"windws": 1}}, "'windws'; did you mean 'windows'"),
        ({"steps": [{**RTN, "bts": 4}]}, r"In steps.0 (rtn): There is no option 'bts'; did you mean 'bits'"),
        ({"steps": [{**RTN, "method": "rtm"}]}, "no method 'rtm'; did you mean 'rtn'"),
        ({"steps": {"method": "rtn"}}, "'steps' must be a list"),
        ({"steps": {}}, "'steps' must be a list"),
        ({"steps": False}, "'steps' must be a list"),
        ({"steps": ["rtn"]}, "Step 0 of the recipe names no method"),
        ({"steps": [RTN, {"bits": 4}]}, "Step 1 of the recipe names no method"),
        ({"steps": [{"method": "replaceme"}]}, "the option 'layers' is required"),
        ({"steps": [{**RTN, "bits": 9}]}, "bits: Input should be 2, 3, 4, 5, 6, 7 or 8 (got 9)"),
        (
            {"steps": [{**RTN, "group_size": 0}]},
            "group_size: Input should be greater than 0 or 'auto' or 'channel'",
        ),
        ({"steps": [{**RTN, "group_size": "row"}]}, "or 'channel' (got 'row')"),
        ({"steps": [{**REPLACEME, "layers": -1}]}, "layers: Input should be greater than 0 (got -1)"),
        ({"steps": [{**REPLACEME, "held_out": 1.5}]}, "held_out: Input should be less than 1 (got 1.5)"),
        ({"steps": [{**REPLACEME, "l2": float("inf")}]}, "l2: Input should be a finite number"),
        ({"calibration": {"seqlen": 0}}, "calibration.seqlen: Input should be greater than 0"),
        ({"calibration": {"seed": -1}}, "calibration.seed: Input should be greater than or equal to 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"calibration": "bundled"}, "calibration: Input should be a valid dictionary"),
        ({"dtype": "int8"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16' (got 'int8')"),
        (
            {"evaluate": {"suite": "all"}},
            "evaluate.suite: Input should be 'text', 'quick', 'kick' or 'kick-hub'",
        ),
        ({"model": None}, "names no model"),
        ({"model": None, "modell": "demo"}, "There is no option 'modell'; did you mean 'model'?"),
        ({"steps": [RTN, REPLACEME]}, "'replaceme' (pruning) must come before 'rtn' (quantization): pruning"),
        ({"steps": [RTN, RTN]}, "quantized once, but the recipe has rtn and rtn"),
    ],
)
def test_one_sentence_says_what_is_wrong(data: dict[str, Any], words: str):
    message = refused(data)
    assert words in message
    assert "\n" not in message


def test_include_is_the_ground_that_keys_are_put_on(tmp_path: Path):
    write(tmp_path, "a.yaml", "model: one\nseed: 1\nsteps: [{method: replaceme, layers: 2}]\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "b.yaml", "include: ../a.yaml\nseed: 2\n")
    recipe = load_recipe(write(tmp_path, "c.yaml", "include: sub/b.yaml\nmodel: three\n"))
    assert (recipe.model, recipe.seed, recipe.steps[0][1].layers) == ("three", 2, 2)
    assert load_recipe(write(tmp_path, "d.yaml", "include: int4\nmodel: x\n")).steps[0][0].name == "rtn"


def test_a_revision_is_one_of_its_own_model(tmp_path: Path):
    file = write(tmp_path, "a.yaml", "model: one\nrevision: abc\n")
    assert load_recipe(file).revision == load_recipe(file, {"model": None}).revision == "abc"
    assert load_recipe(file, {"model": "two"}).revision is None
    assert load_recipe(file, {"model": "two", "revision": "v2"}).revision == "v2"
    assert load_recipe(write(tmp_path, "b.yaml", "include: a.yaml\nmodel: two\n")).revision is None


def test_include_that_leads_back_or_nowhere_is_refused(tmp_path: Path):
    write(tmp_path, "a.yaml", "include: b.yaml\n")
    back = write(tmp_path, "b.yaml", "include: a.yaml\n")
    with pytest.raises(BadInput, match=r"b.yaml' includes itself"):
        load_recipe(back)
    with pytest.raises(BadInput, match="includes itself"):
        load_recipe(write(tmp_path, "self.yaml", "include: self.yaml\n"))
    with pytest.raises(BadInput, match=r"no recipe file 'nosuch.yaml'"):
        load_recipe(write(tmp_path, "c.yaml", "include: nosuch.yaml\n"))
    with pytest.raises(BadInput, match=r"no recipe 'int5'; did you mean 'int4'"):
        load_recipe(write(tmp_path, "d.yaml", "include: int5\n"))
    with pytest.raises(BadInput, match="'include' must be one file name"):
        load_recipe(write(tmp_path, "e.yaml", "include: [int4]\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"steps: [", "cannot be read"),
        (b"- 1\n", "is not a YAML mapping"),
        (b"", "is not a YAML mapping"),
        (b"model: \xff\xfe\n", "cannot be read"),
        (b"model: 2026-13-45\n", "cannot be read: month must be in 1..12."),
        (b"model: " + b"[" * 3000, "cannot be read: maximum recursion depth exceeded"),
        (b"steps: [{method: rtn, bits: 4, bits: 3}]\n", "'bits' is given twice"),
        (b"model: !!python/object/apply:os.getcwd []\n", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(BadInput, match=words) as error:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_names_of_recipes_are_suggested():
    with pytest.raises(BadInput, match="no recipe 'int5'; did you mean 'int4'"):
        load_recipe("int5")
    with pytest.raises(BadInput, match=r"no recipe file 'folder/int4'"):
        load_recipe("folder/int4")


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("steps.0.group_size=32", lambda recipe: recipe.steps[0][1].group_size == 32),
        ("steps.0.group_size=channel", lambda recipe: recipe.steps[0][1].group_size == "channel"),
        ("steps.0.symmetric=true", lambda recipe: recipe.steps[0][1].symmetric is True),
        ("steps.0.ignore=[a, b]", lambda recipe: recipe.steps[0][1].ignore == ["a", "b"]),
        ("steps.0={method: rtn, bits: 3}", lambda recipe: recipe.steps[0][1].bits == 3),
        ("steps=[]", lambda recipe: recipe.steps == []),
        ("calibration.nsamples=7", lambda recipe: recipe.calibration.nsamples == 7),
        ("calibration.source=a=b.txt", lambda recipe: recipe.calibration.source == "a=b.txt"),
        ("evaluate.windows=3", lambda recipe: recipe.evaluate is not None and recipe.evaluate.windows == 3),
        ("dtype=null", lambda recipe: recipe.dtype is None),
        ("seed=5", lambda recipe: recipe.seed == 5),
    ],
)
def test_settings_change_one_place_and_are_yaml(setting: str, found):
    assert not found(load_recipe("int4"))
    assert found(load_recipe("int4", settings=[setting]))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps.0.bits", "is not a setting; write KEY=VALUE"),
        ("=3", "is not a setting"),
        ("model=2026-13-45", "is not a setting"),
        ("steps.0.bits=[4", "is not a setting"),
        ("steps.1.bits=4", "no 'steps.1.bits' to set"),
        ("steps.-1.bits=4", "no 'steps.-1.bits' to set"),
        ("steps.².bits=4", "no 'steps.².bits' to set"),
        ("steps.one=4", "no 'steps.one' to set"),
        ("model.name=x", "no 'model.name' to set"),
        ("steps.0.bits.x=4", "no 'steps.0.bits.x' to set"),
        ("steps.0.bits=9", "bits: Input should be 2, 3, 4, 5, 6, 7 or 8"),
        ("calibraton.seed=5", "did you mean 'calibration'"),
    ],
)
def test_settings_that_fit_nowhere_are_refused(setting: str, words: str):
    with pytest.raises(BadInput) as error:
        load_recipe("int4", settings=[setting])
    assert words in str(error.value)


def test_settings_do_not_leak_into_the_next_recipe():
    load_recipe("int4", settings=["steps.0.bits=8"])
    assert load_recipe("int4").steps[0][1].bits == 4


def test_overrides_win_and_none_is_no_override():
    recipe = load_recipe("int4", {"model": "mine", "dtype": None, "seed": 0}, ["seed=4", "model=theirs"])
    assert (recipe.model, recipe.dtype, recipe.seed) == ("mine", "bfloat16", 0)
