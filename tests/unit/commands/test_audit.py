"""Audits through the command line, of tiny models that were taught made-up facts in a few seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock, Timeout

from compress.calibration.text.records import read_records
from compress.evaluation.forgetting import contestants
from compress.method import Method, Paper, StepReport
from compress.pipeline import registry, reload
from compress.report.forgetting import Forgetting
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import read_lineage
from compress.unlearning.parts.options import ForgetOptions

from .audits import copied, keep_in, result, teach, write_records
from .common import Command, Ended, assert_one_sentence


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Cells that a test finished serve the next one, and nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        keep_in(patch, tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return {
        "forget": write_records(folder / "forget.jsonl", 0, 3),
        "retain": write_records(folder / "retain.jsonl", 3, 6),
        "holdout": write_records(folder / "holdout.jsonl", 6, 8),
    }


@pytest.fixture(scope="module")
def models(
    write_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, sets: dict[str, Path]
) -> dict[str, Path]:
    """One that learned all, and one that never learned what is to be forgotten."""
    folder = tmp_path_factory.mktemp("models")
    dense = write_decoder(folder / "dense", initializer_range=0.05)
    return {
        "dense": dense,
        "target": teach(dense, folder / "target", sets["forget"], sets["retain"]),
        "retrained": teach(dense, folder / "retrained", sets["retain"]),
    }


@pytest.fixture
def audit(command: Command, models: dict[str, Path], sets: dict[str, Path]) -> Callable[..., Ended]:
    def run(model: Path, *words: Any, retrained: bool = True, **changes: Any) -> Ended:
        named = {**{name: sets[name] for name in ("forget", "retain")}, "target": models["target"]}
        named |= {"retrained": models["retrained"]} if retrained else {}
        named |= {"survives": "int4", "relearn": "0"} | changes
        given = [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
        return command("audit", model, *given, *words)

    return run


def test_the_target_has_forgotten_nothing_and_its_codes_are_the_same(
    audit: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
):
    copy = copied(models["target"], tmp_path / "copy")
    found = result(audit(copy, "--json"))
    assert [row.name for row in found.rows] == ["full precision", "int4"]
    for row in found.rows:
        assert row.knowledge.recovery is not None
        assert row.knowledge.recovery.value == row.knowledge.recovery.low == row.knowledge.recovery.high == 1
    assert found.rows[0].utility.change.value == 0
    assert found.rows[0].knowledge.target.value > 0.8
    codes = found.rows[1].codes
    assert codes.differ == 0
    assert codes.weights > 50_000
    assert found.kind == "not forgotten"
    strict = audit(copy, "--strict", "-q")
    assert strict.code == 1
    assert "Not forgotten, because" in strict.out  # the table is shown nevertheless
    assert strict.err == f"Error: {found.sentence}\n"


def test_a_model_that_never_learned_has_forgotten(
    audit: Callable[..., Ended], models: dict[str, Path], sets: dict[str, Path], tmp_path: Path
):
    copy = copied(models["retrained"], tmp_path / "copy")
    found = result(audit(copy, "--json", "--strict", holdout=sets["holdout"]))
    for row in found.rows:
        for one in (row.knowledge, *row.scores.values()):
            if one.recovery is not None:
                assert one.recovery.value == one.recovery.low == one.recovery.high == 0
        assert row.forget_quality.value == 1
        assert row.kind == "forgotten"
    assert "membership" in found.rows[0].scores
    assert found.rows[1].codes.differ > 1000
    assert found.sentence == "Forgotten, and it stays so after int4."


def test_without_a_retrained_model_the_floor_is_chance(
    audit: Callable[..., Ended], models: dict[str, Path], sets: dict[str, Path], tmp_path: Path
):
    found = result(audit(models["retrained"], "--json", retrained=False))
    assert found.protocol.floor == "wrong answers"
    assert any("wrong answers" in note for note in found.notes)
    scores = found.rows[0].scores
    assert scores["choice"].retrained.value == pytest.approx(1 / 3)
    assert scores["truth"].retrained.value == 0.5
    assert scores["rouge"].retrained.value == 0  # no city has a word of another
    assert found.retrained is None
    # Without wrong answers there is nothing to compare with.
    bare = write_records(tmp_path / "bare.jsonl", 0, 3, wrong=[])
    found = result(audit(models["retrained"], "--json", retrained=False, forget=bare))
    assert (found.protocol.floor, found.kind) == (None, "cannot tell")
    assert "neither a retrained model nor a wrong answer" in found.sentence


def test_relearning_is_followed(audit: Callable[..., Ended], models: dict[str, Path]):
    ended = audit(models["dense"], "--json", survives="", relearn="0,2,5")
    found = result(ended)
    assert [point.steps for point in found.relearned] == [0, 2, 5]
    before, *after = found.relearned
    first = found.rows[0].knowledge
    assert before.knowledge.unlearned.value == first.unlearned.value
    assert before.knowledge.retrained.value == first.retrained.value
    assert after[1].knowledge.unlearned.value != before.knowledge.unlearned.value
    assert {point.knowledge.target.value for point in found.relearned} == {first.target.value}
    table = audit(models["dense"], survives="", relearn="0,2,5", retrained=True)
    assert "relearning steps" in table.out


def test_a_finished_audit_asks_nobody_again(
    audit: Callable[..., Ended], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    first = audit(models["dense"], "--json")
    monkeypatch.setattr("compress.evaluation.forgetting.audit.Asked", None)
    monkeypatch.setattr("compress.evaluation.forgetting.contestants.execute", None)
    second = result(audit(models["dense"], "--json"))
    assert second.rows == result(first).rows


def test_another_audit_waits_while_a_model_is_made_and_asked(
    audit: Callable[..., Ended], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Two audits of one target make the same models, and remove them when they are done."""
    made, real = [], contestants.Contestant.after

    def after(self: contestants.Contestant, *how: Any) -> Path:
        if (file := self.lock(*how)) is not None:
            with pytest.raises(Timeout):
                FileLock(file).acquire(timeout=0)
            made.append(file)
        return real(self, *how)

    monkeypatch.setattr(contestants.Contestant, "after", after)
    result(audit(copied(models["target"], tmp_path / "copy"), "--json", survives="int4:32"))
    assert len(set(made)) == 3
    for file in made:
        with FileLock(file, timeout=0):
            pass


def test_a_model_that_no_other_program_runs_rightly_is_audited(
    audit: Callable[..., Ended], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What later steps make is read by nobody else, so no other program has to agree about it."""
    monkeypatch.setattr(reload, "promised_logits", lambda folder, tokens: torch.zeros(*tokens.shape, 1))
    assert audit(models["dense"], survives="int8").code == 0


def test_results_do_not_depend_on_the_size_of_batches(
    audit: Callable[..., Ended],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    whole = result(audit(models["retrained"], "--json", survives="prune20+int4"))
    keep_in(monkeypatch, tmp_path)
    monkeypatch.setattr("compress.evaluation.forgetting.ask.MOST_ROWS", 1)
    single = result(audit(models["retrained"], "--json", survives="prune20+int4"))
    for one, other in zip(whole.rows, single.rows, strict=True):
        for name, score in one.scores.items():
            assert score.target.value == pytest.approx(other.scores[name].target.value, abs=1e-4)
            assert score.unlearned.value == pytest.approx(other.scores[name].unlearned.value, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forget": "empty.jsonl"}, "The forget set 'empty.jsonl' holds no records"),
        ({"retain": "same"}, "3 of the 3 records to forget are also to be retained"),
        ({"survives": "int5"}, "There is no later step 'int5'; did you mean"),
        ({"survives": "prune20+int4+gptq"}, "Weights can be quantized once"),
        ({"survives": "nf4:32"}, "'nf4:32' has no group size"),
        ({"survives": "int4+prune20"}, "put the steps in the order unlearn, prune, quantize"),
        ({"target": None}, "'retrained' was not written by compress-model; say with --target"),
        ({"relearn": "some"}, "'some' is not a list of whole numbers"),
        ({"forget": None}, "An audit needs a forget set; name it with --forget"),
        ({"seed": "-1"}, "-1 is not in the range 0<=x<=4294967295"),
    ],
)
def test_wrong_use_is_one_sentence(
    audit: Callable[..., Ended],
    models: dict[str, Path],
    sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
):
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    if changes.get("retain") == "same":
        changes = {"retain": sets["forget"]}
    shutil.copytree(models["retrained"], tmp_path / "retrained")
    assert_one_sentence(audit("retrained", **changes), 2, words)


def test_texts_longer_than_the_models_positions_are_refused(
    command: Command, sets: dict[str, Path], tmp_path: Path, write_decoder: Callable[..., Path]
):
    model = write_decoder(tmp_path / "model", "OPTForCausalLM", max_position_embeddings=40)
    named = ["--target", model, "--forget", sets["forget"], "--retain", sets["retain"], "--relearn", "0"]
    sentence = "The model has positions for 40 tokens, and 64 come at once; use a smaller seqlen."
    assert_one_sentence(command("audit", model, *named), 2, sentence)


def test_models_with_different_tokenizers_are_refused(
    audit: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
):
    other = Path(shutil.copytree(models["retrained"], tmp_path / "other"))
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    assert_one_sentence(audit(other), 2, "have different tokenizers")


def test_a_packed_model_of_another_tool_is_audited_as_it_is(
    command: Command, audit: Callable[..., Ended], models: dict[str, Path], tmp_path: Path
):
    packed = tmp_path / "packed"
    done = command("quantize", models["target"], "--method", "rtn", "--bits", "8", "-o", packed)
    assert done.code == 0, done.err
    (packed / "compression.json").unlink()
    assert_one_sentence(audit(packed), 2, "is quantized already, so no further step can follow")
    found = result(audit(packed, "--json", survives=None, relearn="0,2"))
    assert [row.name for row in found.rows] == ["as it is"]
    assert found.rows[0].knowledge.recovery.value == pytest.approx(1, abs=0.05)
    assert any("not trained to relearn" in note for note in found.notes)


def test_an_ensemble_is_audited_as_it_is(
    command: Command,
    audit: Callable[..., Ended],
    models: dict[str, Path],
    sets: dict[str, Path],
    tmp_path: Path,
):
    everything = tmp_path / "everything.jsonl"
    everything.write_text("\n".join(sets[name].read_text() for name in ("forget", "retain")))
    ensemble = tmp_path / "ensemble"
    small = ("--shards", 1, "--slices", 2, "--orders", 1, "--rank", 2, "--epochs", 1)
    assert command("s3t", "train", models["dense"], everything, "-o", ensemble, *small).code == 0
    assert command("s3t", "delete", ensemble, "--forget", sets["forget"]).code == 0
    changes = {"retrained": models["dense"]}
    assert_one_sentence(audit(ensemble, **changes), 2, "is an ensemble of S3T, so no further step can follow")
    assert_one_sentence(
        audit(ensemble, target=None, survives=None), 2, "was trained by S3T; say with --target"
    )
    found = result(audit(ensemble, "--json", survives=None, relearn="0,2", **changes))
    assert [row.name for row in found.rows] == ["as it is"]
    assert found.rows[0].knowledge.recovery.high < 0.1
    assert any("not trained to relearn" in note for note in found.notes)
    assert len(read_lineage(ensemble).audits) == 1


def test_the_cache_keeps_the_models_that_were_used_last(
    audit: Callable[..., Ended], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keep_in(monkeypatch, tmp_path)
    monkeypatch.setitem(contestants.KEPT, "models", 1)
    found = result(audit(models["dense"], "--json", survives="int8,int4,prune20"))
    assert [row.name for row in found.rows][1:] == ["int8", "int4", "prune20"]
    (kept,) = [folder for folder in (tmp_path / "audit" / "models").iterdir() if folder.is_dir()]
    steps = yaml.safe_load((kept / "recipe.yaml").read_text())["steps"]
    assert [step["bits"] for step in steps] == [4]  # of the target; nobody needs pruned ones again


# --- inside a recipe ---


class Swap(Method["Swap.Options"]):
    """Unlearns by becoming another model: the one that never learned."""

    name = "swap"
    family = "unlearning"
    paper = Paper("Made up for tests")
    needs_calibration = False

    class Options(ForgetOptions):
        by: str

    def plan(self, shape: Any, options: Any) -> Any:
        return shape

    def apply(self, model: Any, options: Any, context: Any) -> StepReport:
        other = Checkpoint.open(options.by)
        for name in other.tensors:
            context.draft.write({name: other.read(name)})
        sets = {"forget": options.forget, "retain": options.retain}
        return StepReport("Swapped.", {name: read_records(sets[name], name).described for name in sets})


@pytest.fixture
def recipe(
    models: dict[str, Path], sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a recipe that unlearns by swapping, prunes and quantizes."""
    monkeypatch.setitem(registry.METHODS["unlearning"], "swap", f"{__name__}:Swap")
    monkeypatch.setattr(registry, "import_module", lambda name: _modules(name))
    registry.method_names.cache_clear()
    monkeypatch.setattr(registry, "method_names", registry.method_names.__wrapped__)

    def write(
        by: str = "retrained", later: int = 2, records: dict[str, Path] = sets, **sections: Any
    ) -> Path:
        swap = {"method": "swap", "by": str(models[by])}
        swap |= {name: str(records[name]) for name in ("forget", "retain")}
        steps = [swap, {"method": "magnitude", "ratio": 0.2}, {"method": "rtn", "bits": 4}][: later + 1]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(models["target"]), "steps": steps, **sections}))
        return path

    return write


def _modules(name: str) -> Any:
    import importlib
    import sys

    return sys.modules[name] if name == __name__ else importlib.import_module(name)


def test_a_recipe_audits_its_own_result(
    command: Command, recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
):
    asked = {"retrained": str(models["retrained"]), "survives": ["int3"], "relearn": [], "strict": True}
    out = tmp_path / "out"
    ended = command("run", recipe(audit=asked), "-o", out)
    assert ended.code == 0, ended.err
    assert "Forgotten, and it stays so after" in ended.out
    assert "unlearned again" not in ended.err
    (kept,) = read_lineage(out).audits
    found = Forgetting.model_validate(kept)
    names = ["full precision", "recipe: magnitude", "recipe: magnitude+rtn", "int3"]
    assert [row.name for row in found.rows] == names
    assert [row.kind for row in found.rows] == ["forgotten"] * 4
    assert found.model.name == "out"
    card = (out / "README.md").read_text()
    assert "## Does it stay forgotten?" in card
    assert "| recipe: magnitude+rtn |" in card
    # The command finds everything in the folder, and the model before its later steps in the cache.
    again = command("audit", out, "--retrained", models["retrained"], "--survives", "int3", "--relearn", "0")
    assert again.code == 0, again.err
    assert "unlearned again" not in again.err
    assert len(read_lineage(out).audits) == 2


def test_the_model_before_later_steps_is_unlearned_again_where_it_is_not_kept(
    command: Command, recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path, monkeypatch
):
    out = tmp_path / "out"
    assert command("run", recipe(audit=False), "-o", out).code == 0
    assert read_lineage(out).audits == []
    keep_in(monkeypatch, tmp_path / "cache")
    words = ["--retrained", models["retrained"], "--survives", "", "--relearn", "0"]
    ended = command("audit", out, *words)
    assert ended.code == 0, ended.err
    assert "unlearned again" in ended.err
    assert read_lineage(out).audits[0]["kind"] == "forgotten"


def test_a_recipe_that_stores_another_dtype_is_audited(
    command: Command, recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
):
    """The model it was made from is known by what its files hold, not by what they are rounded to."""
    out, asked = tmp_path / "out", {"retrained": str(models["retrained"]), "survives": [], "relearn": []}
    assert command("run", recipe(audit=asked, dtype="bfloat16"), "-o", out).code == 0
    stored, parent = Checkpoint.open(models["target"]), read_lineage(out).parent
    assert (parent.sha256, parent.bytes) == (stored.sha256, stored.nbytes)
    ended = command("audit", out, "--retrained", models["retrained"], "--survives", "", "--relearn", "0")
    assert ended.code == 0, ended.err
    assert "unlearned again" not in ended.err


@pytest.fixture
def own_sets(sets: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the sets, which a test may edit."""
    return {name: Path(shutil.copy(file, tmp_path)) for name, file in sets.items()}


@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_a_set_that_has_changed_since_is_not_audited_as_that_of_the_step(
    command: Command,
    recipe: Callable[..., Path],
    own_sets: dict[str, Path],
    models: dict[str, Path],
    tmp_path: Path,
    kind: str,
):
    out = tmp_path / "out"
    assert command("run", recipe(later=0, records=own_sets, audit=False), "-o", out).code == 0
    words = ["audit", out, "--retrained", models["retrained"], "--survives", "", "--relearn", "0"]
    before = shutil.copy(own_sets[kind], tmp_path / "before.jsonl")
    own_sets[kind].write_text(own_sets[kind].read_text().replace("live", "dwell"))
    said = f"'{own_sets[kind]}' is not what it was when the model was unlearned; name that with --{kind}."
    assert_one_sentence(command(*words), 2, said)
    ended = command(*words, f"--{kind}", before)
    assert ended.code == 0, ended.err


def test_a_model_is_unlearned_again_from_the_same_records_alone(
    command: Command,
    recipe: Callable[..., Path],
    own_sets: dict[str, Path],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Another project may have other records under the same path; its model is kept beside this one's."""
    keep_in(monkeypatch, tmp_path / "cache")
    asked = {"retrained": str(models["retrained"]), "survives": [], "relearn": []}
    kept, before = tmp_path / "cache" / "audit" / "unlearned", own_sets["forget"].read_text()
    assert command("run", recipe(records=own_sets, audit=asked), "-o", tmp_path / "one").code == 0
    (one,) = kept.iterdir()
    own_sets["forget"].write_text(before.replace("live", "dwell"))
    assert command("run", recipe(records=own_sets, audit=asked), "-o", tmp_path / "two").code == 0
    assert len(list(kept.iterdir())) == 2
    shutil.rmtree(one)
    words = ["audit", tmp_path / "one", "--retrained", models["retrained"], "--survives", ""]
    words += ["--relearn", "0"]
    assert_one_sentence(command(*words), 2, "so that it can be unlearned again")
    own_sets["forget"].write_text(before)
    ended = command(*words)
    assert ended.code == 0, ended.err
    assert "unlearned again" in ended.err
    assert one.is_dir()


def test_a_strict_audit_fails_the_run_and_leaves_the_result(
    command: Command, recipe: Callable[..., Path], models: dict[str, Path], tmp_path: Path
):
    asked = {"retrained": str(models["retrained"]), "survives": [], "relearn": [], "strict": True}
    ended = command("run", recipe("target", audit=asked), "-o", tmp_path / "out", "-q")
    assert_one_sentence(ended, 1, "Not forgotten, because")
    assert read_lineage(tmp_path / "out").audits[0]["kind"] == "not forgotten"


def test_a_recipe_that_asks_for_no_audit_gets_a_short_one(
    command: Command, recipe: Callable[..., Path], tmp_path: Path
):
    assert command("run", recipe(later=0), "-o", tmp_path / "out").code == 0
    (kept,) = read_lineage(tmp_path / "out").audits
    assert [row["name"] for row in kept["rows"]] == ["full precision", "int4"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"audit": {"survives": ["int5"]}}, "There is no later step 'int5'"),
        ({"audit": {"retained": "x"}}, "There is no option 'retained'; did you mean 'retrained'"),
        ({"audit": {"world": "nowhere.jsonl"}}, "The world set 'nowhere.jsonl' does not exist"),
        ({"audit": {}, "steps": []}, "has no step of unlearning"),
    ],
)
def test_an_audit_that_cannot_be_done_is_refused_before_the_run(
    command: Command, recipe: Callable[..., Path], tmp_path: Path, sections: dict[str, Any], words: str
):
    assert_one_sentence(command("run", recipe(**sections), "-o", tmp_path / "out"), 2, words)
    assert not (tmp_path / "out").exists()
