"""The gradient baselines, through recipes: what they forget, what they keep, and what they leave alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import compress
from compress.calibration.text.records import read_records
from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint
from compress.unlearning import dpo
from compress.unlearning.parts import training
from compress.unlearning.parts.grid import Grid
from compress.unlearning.parts.options import rate_for

from .common import FORGET, METHODS, RETAIN, knows, unlearned, write_facts


@pytest.fixture(scope="session")
def ascent(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gradient ascent alone makes of the model."""
    folder = tmp_path_factory.mktemp("ascent") / "out"
    unlearned(taught, folder, "gradient-difference", retain=None, retain_weight=0)
    return folder


CASES = [(name, "full") for name in METHODS] + [(name, "lora") for name in ("npo", "rmu", "sure")]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_forgets_and_keeps_more_than_ascent_alone(
    taught: Path, ascent: Path, tmp_path: Path, name: str, train: str
) -> None:
    forget, retain = (taught.parent / f"{kind}.jsonl" for kind in ("forget", "retain"))
    step = unlearned(taught, tmp_path / "out", name, train=train, **METHODS[name])
    assert knows(taught, forget) < 0.05
    assert knows(tmp_path / "out", forget) > 1
    assert knows(taught, retain) < 0.05
    assert knows(tmp_path / "out", retain) < min(2, knows(ascent, retain) - 2)
    assert step.details["forget"]["records"] == 4
    assert step.details["forget"]["sha256"] == read_records(str(forget)).sha256


def changed(before: Path, after: Path) -> dict[str, torch.Tensor]:
    """Which weights differ: stored name -> bool."""
    one, two = Checkpoint.open(before), Checkpoint.open(after)
    found = {name: one.read(name) != two.read(name) for name in one.tensors}
    return {name: differs for name, differs in found.items() if bool(differs.any())}


def test_tied_tables_that_are_stored_twice_stay_the_same(
    taught: Path, write_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_decoder(tmp_path / "model", tie_word_embeddings=True)
    for kind in ("forget", "retain"):
        shutil.copy(taught.parent / f"{kind}.jsonl", tmp_path)
    weights = load_file(model / "model.safetensors")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    save_file({**weights, head: weights[table].clone()}, model / "model.safetensors", {"format": "pt"})
    unlearned(model, tmp_path / "out", "npo", epochs=1)
    after = Checkpoint.open(tmp_path / "out")
    assert not torch.equal(after.read(table), weights[table])
    assert head not in after or torch.equal(after.read(head), after.read(table))


@pytest.mark.parametrize("loss", ["gradient-ascent", "npo"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_sure_changes_the_chosen_linears_alone(taught: Path, tmp_path: Path, train: str, loss: str) -> None:
    step = unlearned(taught, tmp_path / "out", "sure", share=0.2, train=train, loss=loss, epochs=3)
    saliency = step.details["saliency"]
    assert (saliency["units"], saliency["trained_units"]) == (21, 5)  # of 7 linears in 3 layers
    assert sorted(changed(taught, tmp_path / "out")) == [f"{name}.weight" for name in saliency["linears"]]


@pytest.mark.parametrize(
    ("architecture", "train"),
    [("LlamaForCausalLM", "full"), ("LlamaForCausalLM", "lora"), ("GPT2LMHeadModel", "full")],
)
def test_sure_changes_the_chosen_rows_alone(
    taught: Path, shared_decoder: Callable[..., Path], tmp_path: Path, architecture: str, train: str
) -> None:
    """A row is all weights of an output, whether they are stored as a row or, in GPT-2, as a column."""
    sets = {kind: str(taught.parent / f"{kind}.jsonl") for kind in ("forget", "retain")}
    dense = shared_decoder(architecture)
    step = unlearned(dense, tmp_path / "out", "sure", saliency="rows", train=train, epochs=3, **sets)
    saliency = step.details["saliency"]
    assert 0 < saliency["trained_units"] == -(-saliency["units"] // 10)
    found = changed(dense, tmp_path / "out")
    assert sorted(found) == [f"{name}.weight" for name in saliency["linears"]]
    rows = [differs.T if architecture.startswith("GPT2") else differs for differs in found.values()]
    assert sum(int(differs.any(1).sum()) for differs in rows) == saliency["trained_units"]
    assert any(not bool(differs.any(1).all()) for differs in rows)


def test_with_the_whole_share_sure_is_the_method_without_a_mask(taught: Path, tmp_path: Path) -> None:
    step = unlearned(taught, tmp_path / "out", "sure", share=1, epochs=1)
    assert len(changed(taught, tmp_path / "out")) == len(step.details["saliency"]["linears"]) == 21


@pytest.mark.parametrize("name", ["dpo", "rmu", "sure"])
def test_training_through_rounding_changes_what_the_method_trains_and_counts_codes(
    taught: Path, tmp_path: Path, name: str
) -> None:
    options = {**METHODS[name], "survive": ["int4:32", "int3:16"], "learning_rate": 3e-3, "epochs": 5}
    if name == "sure":
        options |= {"saliency": "rows", "share": 0.2}
    step = unlearned(taught, tmp_path / "out", name, **options)
    found = changed(taught, tmp_path / "out")
    one, two = Checkpoint.open(taught), Checkpoint.open(tmp_path / "out")
    for text, grid in {"int4:32": Grid(4, 32), "int3:16": Grid(3, 16)}.items():
        crossed = sum(grid.crossings(one.read(linear), two.read(linear)) for linear in found)
        assert 0 < step.details["crossed"][text] == crossed < step.details["changed_weights"]
    assert all(name.endswith("proj.weight") for name in found)
    if name == "rmu":
        assert {name.split(".")[2] for name in found} <= {"0", "1"}
    if name == "sure":
        saliency = step.details["saliency"]
        assert {name.removesuffix(".weight") for name in found} <= set(saliency["linears"])
        rows = sum(int(differs.any(1).sum()) for differs in found.values())
        assert rows <= saliency["trained_units"]


def test_rmu_steers_its_layer_and_trains_no_later_one(taught: Path, tmp_path: Path) -> None:
    step = unlearned(taught, tmp_path / "out", "rmu", layer=1, steering=8, epochs=20)
    assert {name.split(".")[2] for name in changed(taught, tmp_path / "out")} == {"0", "1"}
    assert all("norm" not in name for name in changed(taught, tmp_path / "out"))
    training = step.details["training"]
    assert training["last_loss"] < 0.5 * training["first_loss"]
    with pytest.raises(BadInput, match="cannot steer layer 3 of a model with the layers 0 to 2"):
        unlearned(taught, tmp_path / "none", "rmu", layer=3)


def test_rmu_runs_no_later_layer(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    ran: set[int] = set()
    attend = modeling_llama.LlamaAttention.forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            ran.add(self.layer_idx)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", noted)
    for checkpointing in (False, True):
        ran.clear()
        options = {"layer": 1, "epochs": 1, "gradient_checkpointing": checkpointing}
        unlearned(taught, tmp_path / "out", "rmu", **options)
        assert ran == {0, 1}


def test_each_question_has_a_refusal_that_the_seed_draws(taught: Path, tmp_path: Path) -> None:
    from compress.unlearning.parts.baseline import Sets

    tokenizer = hf.AutoTokenizer.from_pretrained(taught)
    many = write_facts(tmp_path / "many.jsonl", {f"P{number}": "tin" for number in range(40)})
    sets = Sets(read_records(str(many)).entries, [], [], tokenizer, 0, {})

    def drawn(seed: int) -> list[str]:
        found = dpo.refused(sets, 256, torch.Generator().manual_seed(seed))
        assert [part.id for part in found] == [record.id for record in sets.records]
        answers = [[token for token in part.labels if token >= 0] for part in found]
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    assert {answer.removeprefix(" ") for answer in drawn(0)} <= set(dpo.REFUSALS)
    assert len(set(drawn(0))) > 10
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_dpo_leaves_prose_out_and_says_so(
    taught: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prose = '{"text": "Ada sells gold. Bo sells iron."}\n'
    (tmp_path / "prose.jsonl").write_text(prose)
    facts = (taught.parent / "forget.jsonl").read_text()
    (tmp_path / "mixed.jsonl").write_text(prose + facts)
    with pytest.raises(BadInput, match="asks nothing; give records with question and answer"):
        unlearned(taught, tmp_path / "out", "dpo", forget=str(tmp_path / "prose.jsonl"))
    mixed = unlearned(taught, tmp_path / "out", "dpo", forget=str(tmp_path / "mixed.jsonl"), epochs=1)
    assert mixed.details["left_out"] == 1
    assert mixed.summary.startswith("4 records unlearned")
    assert "1 records of prose are left out" in caplog.text


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("npo", {"retain_loss": "kl"}),
        ("gradient-difference", {"train": "lora"}),
        ("sure", {"saliency": "rows"}),
        ("sure", {"saliency": "rows", "train": "lora"}),
        ("npo", {"survive": ["int4:32"]}),
    ],
)
def test_a_killed_training_goes_on(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    """It ends with the weights of one that was not, bit for bit; it does not begin anew."""
    options = {"epochs": 3, **options}
    unlearned(taught, tmp_path / "whole", name, **options)
    steps = die_at_step(4, monkeypatch)
    with pytest.raises(Killed):
        unlearned(taught, tmp_path / "out", name, **options)
    assert not (tmp_path / "out").exists()
    step = unlearned(taught, tmp_path / "out", name, **options)
    assert step.resumed
    assert steps[0] == 4 + 3  # of six, three were done
    assert not changed(tmp_path / "whole", tmp_path / "out")
    assert changed(taught, tmp_path / "out")


def die_at_step(deadly: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Save after every step, and kill the training when one begins. Returns the number of steps begun."""
    steps = [0]
    around = training._around

    class Deadly(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            steps[0] += 1
            if steps[0] == deadly:
                raise Killed

    def with_death(*args: Any) -> TrainerCallback:
        kept = around(*args)
        kept.on_step_begin = Deadly().on_step_begin  # type: ignore[method-assign]
        return kept

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_around", with_death)
    return steps


def test_a_killed_training_does_not_go_on_with_other_records(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = write_facts(tmp_path / "forget.jsonl", FORGET)
    die_at_step(3, monkeypatch)
    with pytest.raises(Killed):
        unlearned(taught, tmp_path / "out", "npo", forget=str(facts))
    write_facts(facts, {**FORGET, "Di": "wool"})
    with pytest.raises(BadInput, match="interrupted run with another set of records; use --fresh"):
        unlearned(taught, tmp_path / "out", "npo", forget=str(facts))


@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_a_finished_step_is_not_that_of_other_records(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The recipe is the same, but a file that it names has changed since the step was done."""
    sets = {
        "forget": write_facts(tmp_path / "forget.jsonl", FORGET),
        "retain": write_facts(tmp_path / "retain.jsonl", RETAIN),
    }
    npo = {"method": "npo", "epochs": 1, **{name: str(file) for name, file in sets.items()}}
    recipe = parse_recipe({"model": str(taught), "steps": [npo, {"method": "rtn", "group_size": 8}]})

    def fail(*_: Any) -> None:
        raise BadInput("No.")

    with monkeypatch.context() as patch:
        patch.setattr(RoundToNearest, "apply", fail)
        with pytest.raises(BadInput, match="npo is done and kept"):
            execute(recipe, tmp_path / "out")
    write_facts(sets[kind], {"Kai": "wool"})
    with pytest.raises(BadInput, match="interrupted run with another set of records; use --fresh"):
        execute(recipe, tmp_path / "out")
    step = execute(recipe, tmp_path / "out", resume=False).steps[0]
    assert step.content[kind] == read_records(str(sets[kind])).sha256


def test_training_does_not_depend_on_checkpointing(taught: Path, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        unlearned(taught, folder, "sure", share=0.3, epochs=2, gradient_checkpointing=checkpointing)
    one, two = (Checkpoint.open(tmp_path / str(checkpointing)) for checkpointing in (False, True))
    for name in one.tensors:
        assert torch.allclose(one.read(name), two.read(name), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "train", "rate"),
    [
        ("npo", "full", None),  # it depends on the model
        ("npo", "lora", 2e-4),
        ("rmu", "full", None),
        ("rmu", "lora", 2e-4),
        ("harry-potter", "full", None),
        ("harry-potter", "lora", 2e-4),
    ],
)
def test_low_rank_updates_take_larger_steps(method: str, train: str, rate: float | None) -> None:
    step = {"method": method, "forget": "a.jsonl", "retain": "b.jsonl", "train": train}
    for given, expected in (({}, rate), ({"learning_rate": 3e-4}, 3e-4)):
        (_, options), *_ = parse_recipe({"model": "demo", "steps": [{**step, **given}]}).steps
        assert options.model_dump()["learning_rate"] == expected


def test_narrow_models_take_larger_steps(taught: Path, tmp_path: Path) -> None:
    assert rate_for(4096) == pytest.approx(1e-5, rel=0.06)  # as published
    for name, method, options, rate in (
        ("default", "npo", {"learning_rate": None}, rate_for(64)),
        ("given", "npo", {"learning_rate": 1e-3}, 1e-3),
        ("steered", "rmu", {"learning_rate": None, "layer": 1}, 5 * rate_for(64)),
    ):
        step = unlearned(taught, tmp_path / name, method, epochs=1, **options)
        assert step.details["training"]["learning_rate"] == pytest.approx(rate)
    assert knows(tmp_path / "default", taught.parent / "forget.jsonl") > 1


def test_the_result_is_a_model_like_any_other(taught: Path, tmp_path: Path) -> None:
    unlearned(taught, tmp_path / "out", "simnpo", train="lora", rank=4, epochs=2)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        ours = compress.load(tmp_path / "out")(tokens).logits
        stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert torch.allclose(ours, stock, atol=1e-4)
    assert not list((tmp_path / "out").glob("*adapter*"))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_refused(taught: Path, tmp_path: Path, name: str) -> None:
    def refused(sentence: str, **options: Any) -> None:
        with pytest.raises(BadInput, match=sentence):
            unlearned(taught, tmp_path / "none", name, **{**METHODS[name], **options})
        assert not (tmp_path / "none").exists()

    (tmp_path / "empty.jsonl").write_text("\n")
    both = write_facts(tmp_path / "both.jsonl", {"Ed": "rice", **FORGET})
    (tmp_path / "odd.jsonl").write_text('{"question": "Who?", "answer": "Ada", "colour": "red"}\n')
    (tmp_path / "unanswered.jsonl").write_text('{"question": "Who?"}\n')
    refused("give records to retain, or set retain_weight to 0", retain=None, retain_weight=1)
    refused("The forget set '.*empty.jsonl' holds no records", forget=str(tmp_path / "empty.jsonl"))
    refused("1 of the 5 records to forget are also to be retained", forget=str(both))
    refused("line 1: There is no field 'colour'", forget=str(tmp_path / "odd.jsonl"))
    refused("needs 'text', 'question' and 'answer'", forget=str(tmp_path / "unanswered.jsonl"))
    refused("temperature", temperature=1)


@pytest.mark.parametrize("name", METHODS)
def test_quantized_models_and_encoders_are_refused(
    taught: Path, tiny_encoder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    from compress.pipeline.recipe import parse_recipe
    from compress.pipeline.run import execute

    rounded = {"model": str(taught), "steps": [{"method": "rtn", "group_size": 32}]}
    execute(parse_recipe(rounded), tmp_path / "rounded" / "model")
    for kind in ("forget", "retain"):
        shutil.copy(taught.parent / f"{kind}.jsonl", tmp_path / "rounded")
        shutil.copy(taught.parent / f"{kind}.jsonl", tmp_path)
    with pytest.raises(BadInput, match="quantized already, and its packed weights cannot be edited"):
        unlearned(tmp_path / "rounded" / "model", tmp_path / "none", name, **METHODS[name])
    with pytest.raises(BadInput, match="but this model makes none"):
        unlearned(tiny_encoder("BertForSequenceClassification"), tmp_path / "none", name, **METHODS[name])


@pytest.mark.parametrize("name", [*METHODS, "harry-potter", "neuron-adjust"])
def test_records_that_cannot_be_learned_are_refused(
    write_decoder: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model = write_decoder(tmp_path / "model", "GPT2LMHeadModel", n_positions=16)
    own = {"epochs": None, "batch_size": None, "learning_rate": None}
    options = METHODS.get(name, {} if name == "harry-potter" else own)

    def refused(forget: str, words: str) -> None:
        for kind, text in (("forget", forget), ("retain", "abcdef")):
            (tmp_path / f"{kind}.jsonl").write_text(json.dumps({"text": text}))
        with pytest.raises(BadInput, match=words):
            unlearned(model, tmp_path / "none", name, **options)

    if name != "dpo":  # which needs questions
        refused("x" * 20, "The model has positions for 16 tokens, and 20 come at once; use a smaller seqlen")
        refused("x", "has more than one token")


def test_seqlen_on_the_command_line_is_the_methods(taught: Path, tmp_path: Path) -> None:
    """The command has an option of that name too, for the calibration text that other families need."""
    from click.testing import CliRunner

    from compress.commands.one_step import unlearn

    sets = [f"--{kind}={taught.parent / f'{kind}.jsonl'}" for kind in ("forget", "retain")]
    words = [str(taught), "--method", "npo", *sets, "-o", str(tmp_path / "out"), "--seqlen", "20"]
    ended = CliRunner().invoke(unlearn, words)
    assert isinstance(ended.exception, BadInput)
    assert "more than the seqlen of 20" in str(ended.exception)
    assert CliRunner().invoke(unlearn, ["--method", "npo", "--help"]).output.count("--seqlen") == 1
