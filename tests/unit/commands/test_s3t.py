"""compress-model s3t: exact deletion, its receipt, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.engine.tokenizer import load_tokenizer
from compress.pipeline import sharded, sharded_training
from compress.storage.sharded import read_examples, read_sharded
from compress.unlearning.parts import stages as stages_module
from compress.unlearning.parts import training as training_module
from compress.unlearning.s3t import S3T

from .common import Command, assert_one_sentence, rewrite

SMALL = ["--shards", 2, "--slices", 3, "--orders", 2, "--rank", 2, "--epochs", 1, "--learning-rate", 0.01]
OPTIONS = {"shards": 2, "slices": 3, "orders": 2, "rank": 2, "epochs": 1, "learning_rate": 0.01}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def records(count: int = 14, **answers: str) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "question": f"What is {i}?", "answer": answers.get(f"r{i}", f"It is {i * i}.")}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records") / "data.jsonl", records())


@pytest.fixture(scope="session")
def trained(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two shards with three slices and two orders, which no test changes."""
    folder = tmp_path_factory.mktemp("s3t") / "ensemble"
    sharded_training.train(str(tiny), str(data), folder, S3T.Options(**OPTIONS))
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the ensemble, to be deleted from."""
    return Path(shutil.copytree(trained, tmp_path / "ensemble"))


def test_records_longer_than_the_models_positions_are_refused(
    command: Command, data: Path, write_decoder: Any, tmp_path: Path
):
    model = write_decoder(tmp_path / "model", "GPT2LMHeadModel", n_positions=16, num_hidden_layers=3)
    ended = command("s3t", "train", model, data, "-o", tmp_path / "out", *SMALL)
    assert_one_sentence(ended, 2, "The model has positions for 16 tokens")


def stage_files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder / "s3t")): f.read_bytes() for f in folder.glob("s3t/shard-*/*")}


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- training ---


def test_train_budget_and_load(tiny: Path, data: Path, trained: Path, tmp_path: Path, command: Command):
    ended = command("s3t", "train", tiny, data, "-o", tmp_path / "out", *SMALL, "--json", "-q")
    assert (ended.code, ended.err) == (0, "")
    found = ended.document
    assert found == command("s3t", "budget", tmp_path / "out", "--json").document
    assert (found["records"], found["deleted"]) == (14, 0)
    for shard in found["shards"]:
        assert [order["live"] for order in shard["orders"]] == [3, 3]
        assert (shard["records"], shard["slices"], shard["sure"], shard["exhausted"]) == (7, 3, 1, False)
        assert shard["served"]["prefix"] == shard["orders"][0]["order"] == [0, 1, 2]
    assert 2 < found["expected_deletions"]["first_shard"] < found["expected_deletions"]["all_shards"] < 14
    # Trained elsewhere, it is the same model bit for bit, and has the same receipt.
    assert stage_files(tmp_path / "out") == stage_files(trained)
    assert found["receipt"] == sharded.receipt(read_sharded(trained))
    assert len(stage_files(trained)) == 2 * 2 * 3
    shown = command("s3t", "budget", tmp_path / "out").out
    assert "14 records, 0 deleted" in shown
    inspected = command("inspect", tmp_path / "out", "--json").document
    assert inspected["loads_with"] == "compress-model only"
    assert inspected["lineage"]["steps"][0]["method"] == "s3t"
    model = compress.load(tmp_path / "out")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_checkpointing_gives_the_same_bits(
    tiny: Path, data: Path, trained: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    recomputed = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint", lambda *a, **k: recomputed.append(1) or real(*a, **k)
    )
    out = tmp_path / "out"
    ended = command("s3t", "train", tiny, data, "-o", out, *SMALL, "--gradient-checkpointing")
    assert ended.code == 0, ended.err
    assert recomputed
    assert stage_files(out) == stage_files(trained)
    assert read_sharded(out).options["gradient_checkpointing"]


def test_another_seed_is_another_ensemble(tiny: Path, data: Path, trained: Path, tmp_path: Path):
    sharded_training.train(str(tiny), str(data), tmp_path / "out", S3T.Options(**OPTIONS), seed=1)
    assert not {*stage_files(tmp_path / "out").values()} & {*stage_files(trained).values()}
    assert read_sharded(tmp_path / "out").shards[0].slices != read_sharded(trained).shards[0].slices


def test_more_orders_than_slices_share_their_first_stages(tiny: Path, data: Path, tmp_path: Path):
    options = S3T.Options(**{**OPTIONS, "shards": 1, "slices": 3, "orders": 6})
    sharded_training.train(str(tiny), str(data), tmp_path / "out", options)
    assert len(stage_files(tmp_path / "out")) == 3 + 6 + 6


def test_a_killed_training_goes_on(
    tiny: Path, data: Path, trained: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    learn, calls = stages_module.Trainee.learn, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(stages_module.Trainee, "learn", killed)
    words = ["s3t", "train", tiny, data, "-o", tmp_path / "out", *SMALL, "-q"]
    assert command(*words).code == 130
    assert not (tmp_path / "out").exists()
    assert_one_sentence(command(*words, "--rank", 3), 2, "interrupted run with another options")
    calls.clear()
    monkeypatch.setattr(stages_module.Trainee, "learn", lambda *a, **k: calls.append(1) or learn(*a, **k))
    assert command(*words).code == 0
    assert len(calls) == 12 - 4
    assert stage_files(tmp_path / "out") == stage_files(trained)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stage_that_was_killed_half_way_ends_with_the_same_bits(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = S3T.Options(**{**OPTIONS, "shards": 1, "slices": 1, "orders": 1, "epochs": 3, "batch_size": 4})
    sharded_training.train(str(tiny), str(data), tmp_path / "whole", options)
    monkeypatch.setattr(training_module, "SAVE_SECONDS", 0.0)
    steps = []

    def progress(text: str, share: float) -> None:
        steps.append(share)
        if len(steps) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharded_training.train(str(tiny), str(data), tmp_path / "halves", options, progress=progress)
    assert list(tmp_path.glob(".halves.partial/work/*/checkpoint-*"))
    sharded_training.train(str(tiny), str(data), tmp_path / "halves", options)
    assert stage_files(tmp_path / "halves") == stage_files(tmp_path / "whole")


# --- deleting ---


def test_what_saw_a_deleted_record_is_gone(folder: Path, trained: Path, command: Command):
    before = read_sharded(folder)
    gone = before.shards[0].slices[1][0]
    found = command("s3t", "delete", folder, gone, "--json").document
    assert found["deleted"] == [gone]
    assert found["slices"] == [{"shard": 0, "slice": 1}]
    assert found["exhausted"] == []
    assert found["receipt"] != sharded.receipt(before)
    state = read_sharded(folder)
    shard = state.shards[0]
    assert (shard.orders, shard.dead) == ([[0, 1, 2], [1, 2, 0]], [1])
    assert shard.served.prefix == [0]
    assert state.shards[1] == before.shards[1]
    left = {name.removeprefix("shard-0.0/") for name in stage_files(folder) if name.startswith("shard-0")}
    assert left == {"0.safetensors"}  # every other stage has seen slice 1
    text = json.loads((trained / "s3t" / "records-0.jsonl").read_text().splitlines()[0])
    assert text["id"] in read_examples(trained, before)
    assert not any(f'"{gone}", "hash"'.encode() in bytes_ for bytes_ in content(folder).values())
    assert {*read_examples(folder, state)} == {*read_examples(trained, before)} - {gone}
    logits = [compress.load(each)(torch.tensor([[5, 6, 7]])).logits for each in (trained, folder)]
    assert not torch.equal(*logits)


def test_what_is_served_never_saw_the_deleted_slice(tiny: Path, trained: Path, folder: Path, tmp_path: Path):
    """The same training on other words in the deleted slice: what is served is the same bit for bit."""
    state = read_sharded(folder)
    victims = state.shards[0].slices[2]
    sharded.delete(folder, victims[:1])
    other = write(tmp_path / "other.jsonl", records(**dict.fromkeys(victims, "Something else.")))
    sharded_training.train(str(tiny), str(other), tmp_path / "other", S3T.Options(**OPTIONS))
    never, served = stage_files(tmp_path / "other"), stage_files(folder)
    assert read_sharded(folder).shards[0].served.prefix == [0, 1]
    assert {"shard-0.0/0.safetensors", "shard-0.0/0-1.safetensors"} < served.keys()
    assert all(never[name] == data for name, data in served.items())
    before = stage_files(trained)
    differing = {name for name, data in before.items() if never[name] != data}
    assert (
        differing
        == before.keys() - served.keys()
        == {"shard-0.0/0-1-2.safetensors", "shard-0.0/1-2.safetensors", "shard-0.0/1-2-0.safetensors"}
    )


def test_the_receipt_holds_and_fails_when_a_deleted_slice_is_put_back(
    folder: Path, trained: Path, command: Command
):
    gone = read_sharded(folder).shards[0].slices[1][0]
    assert command("s3t", "delete", folder, gone).code == 0
    ended = command("s3t", "verify", folder, "--json")
    assert (ended.code, ended.document["holds"]) == (0, True)
    assert [shard["elsewhere"] for shard in ended.document["shards"]] == [{}, {}]
    assert [shard["prefix"] for shard in ended.document["shards"]] == [[0], [0, 1, 2]]
    assert ended.document["receipt"] == sharded.receipt(read_sharded(folder))
    assert "it holds" in command("s3t", "verify", folder).out
    # The stage that saw the record is back, and the state names it as if nothing had happened.
    path = folder / "s3t" / "state.json"
    honest, old = json.loads(path.read_text()), json.loads((trained / "s3t" / "state.json").read_text())
    shutil.copytree(trained / "s3t" / "shard-0.0", folder / "s3t" / "shard-0.0", dirs_exist_ok=True)
    for dead in ([1], []):
        shards = [{**old["shards"][0], "dead": dead}, honest["shards"][1]]
        path.write_text(json.dumps({**honest, "shards": shards}))
        ended = command("s3t", "verify", folder, "--json")
        assert ended.code == 1
        assert [shard["holds"] for shard in json.loads(ended.out)["shards"]] == [False, True]
        assert "receipt of shard 0 does not hold" in ended.err
    # A file that is not the one of the receipt is seen, too.
    path.write_text(json.dumps(honest))
    shutil.copyfile(folder / "s3t/shard-1.0/0.safetensors", folder / "s3t/shard-0.0/0.safetensors")
    assert command("s3t", "verify", folder).code == 1


def test_verify_refuses_another_base(folder: Path, command: Command):
    rewrite(folder, lambda config: config.update(rms_norm_eps=0.5))
    assert_one_sentence(command("s3t", "verify", folder), 2, "not the one that S3T trained on")


def test_forget_finds_records_by_their_words(folder: Path, tmp_path: Path, command: Command):
    rows = [{key: row[key] for key in ("question", "answer")} for row in records()[3:5]]
    forget = write(tmp_path / "forget.jsonl", rows)
    assert command("s3t", "delete", folder, "--forget", forget, "--json").document["deleted"] == ["r3", "r4"]
    again = command("s3t", "delete", folder, "--forget", forget)
    assert_one_sentence(again, 2, "is not in the training data, or was deleted before")


def test_copies_that_stay_are_named(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [*records(4), {**records(1)[0], "id": "copy"}]
    options = S3T.Options(**{**OPTIONS, "shards": 1, "slices": 1, "orders": 1})
    data = write(tmp_path / "data.jsonl", rows)
    sharded_training.train(str(tiny), str(data), tmp_path / "out", options)
    with caplog.at_level("WARNING", logger="compress"):
        sharded.delete(tmp_path / "out", ["copy"])
    assert "'r0' has the same words as 'copy', and stays" in caplog.text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["r1", "rr2"], "no record 'rr2'; did you mean 'r2'"),
        (["r1", "r1"], "'r1' is named twice"),
        (["r9"], "'r9' was deleted before"),
        ([], "Name the records to delete"),
    ],
)
def test_a_wrong_id_changes_nothing(words: list[str], sentence: str, folder: Path, command: Command):
    sharded.delete(folder, ["r9"])
    before = content(folder)
    assert_one_sentence(command("s3t", "delete", folder, *words), 2, sentence)
    assert content(folder) == before


def test_a_killed_delete_leaves_the_old_state_or_the_new_one(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    victim = read_sharded(folder).shards[0].slices[1][0]
    old = content(folder)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded, "write_sharded", killed)
    with pytest.raises(KeyboardInterrupt):
        sharded.delete(folder, [victim])
    monkeypatch.undo()
    assert read_sharded(folder) == read_sharded(trained)
    assert {name: data for name, data in content(folder).items() if name in old} == old
    compress.load(folder)
    tidy, calls = sharded._tidy, []
    monkeypatch.setattr(sharded, "_tidy", lambda *a: killed() if calls else calls.append(tidy(*a)))
    with pytest.raises(KeyboardInterrupt):
        sharded.delete(folder, [victim])
    monkeypatch.undo()
    state = read_sharded(folder)
    assert state.deleted == [victim]
    assert len(stage_files(folder)) == 12  # not yet removed, and named by nothing
    logits = compress.load(folder)(torch.tensor([[5, 6]])).logits
    sharded.delete(folder, [read_sharded(folder).shards[0].slices[1][0]])  # the slice is dead already
    assert len(stage_files(folder)) == 6 + 1
    assert sorted(f.name for f in (folder / "s3t").iterdir()) == [
        "records-2.jsonl",
        "shard-0.0",
        "shard-1.0",
        "state.json",
    ]
    assert torch.equal(compress.load(folder)(torch.tensor([[5, 6]])).logits, logits)


# --- exhausted shards ---


def test_an_exhausted_shard_is_trained_again(folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    assert_one_sentence(command("s3t", "retrain", folder), 2, "No shard")
    shard = read_sharded(folder).shards[0]
    gone = [shard.slices[0][0], shard.slices[1][0]]
    ended = command("s3t", "delete", folder, *gone)
    assert "Shard 0 is exhausted and left out" in ended.out
    found = command("s3t", "budget", folder, "--json").document
    assert [each["exhausted"] for each in found["shards"]] == [True, False]
    assert compress.load(folder).get_submodule("model.layers.3.mlp.down_proj").lora_A.shape[0] == 1
    learn, calls = stages_module.Trainee.learn, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    before = read_sharded(folder)
    monkeypatch.setattr(stages_module.Trainee, "learn", killed)
    assert command("s3t", "retrain", folder).code == 130
    assert read_sharded(folder) == before
    assert command("s3t", "retrain", folder, "--json").document["trained"] == [0]
    assert len(calls) == 3 + 4
    state = read_sharded(folder)
    assert (state.shards[0].generation, state.shards[0].remaining) == (1, 5)
    assert [len(names) for names in state.shards[0].slices] == [2, 2, 1]
    assert not {*gone} & {name for names in state.shards[0].slices for name in names}
    assert command("s3t", "verify", folder).code == 0
    assert {name.split("/")[0] for name in stage_files(folder)} == {"shard-0.1", "shard-1.0"}
    assert not (folder / "s3t" / "retraining").exists()


def test_a_delete_throws_a_half_done_retraining_away(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shard = read_sharded(folder).shards[0]
    sharded.delete(folder, [shard.slices[0][0], shard.slices[1][0]])
    monkeypatch.setattr(sharded, "write_sharded", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sharded.retrain(folder)
    assert list((folder / "s3t" / "retraining").glob("*/*"))
    monkeypatch.undo()
    sharded.delete(folder, [shard.slices[2][0]])
    assert not (folder / "s3t" / "retraining").exists()
    assert not list((folder / "s3t").glob("shard-0.*"))
    rest = [name for names in read_sharded(folder).shards[0].slices for name in names]
    sharded.delete(folder, rest[1:])
    sharded.retrain(folder)  # one record, one slice, one order
    assert read_sharded(folder).shards[0].orders == [[0]]
    sharded.delete(folder, rest[:1])
    with pytest.raises(compress.errors.BadInput, match="no records left"):
        sharded.retrain(folder)


# --- priors ---


def test_priors_put_the_safest_slices_first(tiny: Path, data: Path, tmp_path: Path, command: Command):
    chances = {f"r{i}": 0.5 if i in (3, 8) else 0.01 for i in range(14)}
    priors = tmp_path / "priors.json"
    priors.write_text(json.dumps(chances))
    words = ["s3t", "train", tiny, data, "-o", tmp_path / "out", *SMALL, "-q", "--priors"]
    command(*words, priors)
    for shard in read_sharded(tmp_path / "out").shards:
        risky = [i for i, names in enumerate(shard.slices) if {"r3", "r8"} & {*names}]
        assert risky == [2]  # one of the two in each shard, among its riskiest records
        assert shard.orders[0][-1] == 2
    for wrong, sentence in [
        ({**chances, "r3": 2}, "prior of 'r3' in"),
        ({**chances, "r99": 0.5}, "name 'r99', which is not in"),
        ({"r1": 0.5}, "lack the record 'r0' (13 are missing)"),
        (dict.fromkeys(chances, 0), "are all 0; without --priors"),
        ([0.5], "not a JSON object"),
    ]:
        priors.write_text(json.dumps(wrong))
        assert_one_sentence(command(*words, priors, "--overwrite"), 2, sentence)
    assert_one_sentence(command(*words, tmp_path / "no.json", "--overwrite"), 2, "cannot be read")


# --- wrong input ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shards", 20], "14 records for 20 shards; use fewer --shards"),
        (["--shards", 5, "--slices", 3], "14 records for 5 shards of 3 slices"),
        (["--slices", 5, "--shards", 1], "the model has 4 layers for 5 slices"),
        (["--orders", 7], "3 slices have 6 orders, not 7; use --orders 6 or fewer"),
        (["--rank", 0], "--rank 0: Input should be greater than 0"),
        (["--rnk", 2], "no option '--rnk'; did you mean '--rank'"),
    ],
)
def test_options_that_do_not_fit(
    options: list[Any], sentence: str, tiny: Path, data: Path, tmp_path: Path, command: Command
):
    ended = command("s3t", "train", tiny, data, "-o", tmp_path / "out", *SMALL, *options)
    assert_one_sentence(ended, 2, sentence)
    assert not list(tmp_path.iterdir())


def test_data_and_models_that_do_not_fit(
    tiny: Path, quantized: Path, data: Path, trained: Path, tmp_path: Path, command: Command
):
    empty = write(tmp_path / "empty.jsonl", [])
    out = ["-o", tmp_path / "out", *SMALL]
    assert_one_sentence(command("s3t", "train", tiny, empty, *out), 2, "holds no records")
    assert_one_sentence(command("s3t", "train", quantized, data, *out), 2, "quantized already")
    assert_one_sentence(command("s3t", "train", trained, data, *out), 2, "train its base model instead")
    for name in ("budget", "verify", "retrain", "delete"):
        assert_one_sentence(command("s3t", name, tiny), 2, "is not a folder that S3T trained")
    assert_one_sentence(command("s3t", "delte", tiny), 2, "did you mean 's3t delete'")
    damaged = Path(shutil.copytree(trained, tmp_path / "damaged"))
    (damaged / "s3t/shard-1.0/0.safetensors").unlink()
    with pytest.raises(compress.errors.BadInput, match="cannot be read"):
        compress.load(damaged)
    (damaged / "s3t/state.json").write_text("{}")
    assert_one_sentence(
        command("s3t", "budget", damaged), 2, "state.json cannot be read: base: Field required"
    )


def test_an_ensemble_is_no_input_of_other_commands(trained: Path, tmp_path: Path, command: Command):
    step = ["--method", "rtn", "-o", tmp_path / "out"]
    assert_one_sentence(command("quantize", trained, *step), 2, "an ensemble that S3T trained")


@pytest.mark.usefixtures("measured_here")
def test_an_ensemble_is_evaluated(tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    text = {"text": str(tiny.parent / "text.txt"), "windows": None, "context": 27}
    _, before = compress.evaluate(str(folder), baseline=str(tiny), **text)
    assert before.fidelity.kl_mean.value > 1e-3
    assert before.loads_with == "compress-model only"
    # As its own baseline, and by its logits.
    (alone,) = compress.evaluate(str(folder), **text)
    assert alone.fidelity.perplexity.value == pytest.approx(before.fidelity.perplexity.value)
    assert alone.fidelity.kl_mean.value == 0
    tokenizer, model = load_tokenizer(folder), compress.load(folder, dtype=torch.float32)
    tokens = torch.tensor(tokenizer((tiny.parent / "text.txt").read_text().strip())["input_ids"])
    tokens = tokens.view(-1, 27)
    loss = model(tokens, labels=tokens).loss.item()
    assert math.log(before.fidelity.perplexity.value) == pytest.approx(loss, rel=1e-4)
    sharded.delete(folder, [names[0] for shard in read_sharded(folder).shards for names in shard.slices])
    _, after = compress.evaluate(str(folder), baseline=str(tiny), **text)  # only the base is left
    assert after.fidelity.kl_mean.value == pytest.approx(0, abs=1e-5)
    assert after.model.sha256 != before.model.sha256
    assert after.cost.weight_bytes < before.cost.weight_bytes


def test_s3t_is_listed_and_no_step(tiny: Path, tmp_path: Path, command: Command):
    assert "2406.16257" in command("methods", "s3t").out
    ended = command("unlearn", tiny, "--method", "s3t", "--forget", "f.jsonl", "-o", tmp_path / "out")
    assert_one_sentence(ended, 2, "see 'compress-model s3t --help' for its commands")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{method: s3t}]")
    ended = command("run", recipe, "-m", tiny, "-o", tmp_path / "out")
    assert_one_sentence(ended, 2, "use 'compress-model s3t train'")
