"""Who's Harry Potter through the way of a recipe: what changes, what does not, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.errors import BadInput
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute
from compress.storage.lineage import Step
from compress.unlearning import harry_potter
from compress.unlearning.parts import training
from compress.unlearning.parts.grid import Grid

ROWS = (
    {"text": "Harry Potter went to Hogwarts with Ron. At Hogwarts, Harry met Ron again."},
    {"question": "Who is Harry Potter?", "answer": "A boy at Hogwarts."},
)
ANCHORS = {"Harry Potter": "Jon Baker", "Harry": "Jon", "Hogwarts": "Milton School", "Ron": "Lee"}


def write(folder: Path, name: str, *rows: Any) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def unlearn(tmp_path: Path, shared_decoder: Callable[..., Path]) -> Callable[..., tuple[Path, Step]]:
    """Unlearns `ROWS`: the folder of the result, and what is known of the step."""

    def run(output: str = "out", architecture: str = "LlamaForCausalLM", **options: Any) -> tuple[Path, Step]:
        step = {
            "method": "harry-potter",
            "forget": write(tmp_path, "forget.jsonl", *ROWS),
            "anchors": write(tmp_path, "anchors.json", ANCHORS),
            "learning_rate": 1e-3,
            "epochs": 1,
            "reinforce_epochs": 2,
            "reinforce_learning_rate": 1e-2,
            "rank": 4,
            **options,
        }
        dense = shared_decoder(architecture)
        recipe = parse_recipe({"model": str(dense), "steps": [step]})
        return tmp_path / output, execute(recipe, tmp_path / output).steps[0]

    return run


@pytest.fixture
def dense(shared_decoder: Callable[..., Path]) -> dict[str, torch.Tensor]:
    return weights(shared_decoder("LlamaForCausalLM"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- what changes ---


@pytest.mark.parametrize(("train", "reinforce"), [("full", "lora"), ("lora", "full")])
def test_the_model_learns_generic_labels(unlearn, dense, train: str, reinforce: str) -> None:
    folder, step = unlearn(train=train, reinforce=reinforce)
    found = changed(dense, weights(folder))
    assert found == {name for name in dense if train == "full" or "_proj" in name}
    assert step.details["changed_tensors"] == len(found)
    assert 0 < step.details["changed_labels"] <= step.details["labels"] < step.details["tokens"]
    assert step.details["anchors"]["found"] == 8
    assert step.details["anchors"]["number"] == 4


def test_gpt2_and_low_rank_updates(unlearn) -> None:
    """Its linears are Conv1D, and its head is its embedding."""
    _, step = unlearn(architecture="GPT2LMHeadModel", train="lora")
    assert step.details["changed_tensors"] > 0


def test_a_model_of_low_rank_updates_is_the_base_model_without_them(unlearn, monkeypatch) -> None:
    """The base model's own predictions do not depend on how the reinforced model is trained."""
    own = []
    label = harry_potter.label

    def watched(*inputs: Any) -> Any:
        labels, details = label(*inputs)
        own.append([pair[1] for pair in labels])
        return labels, details

    monkeypatch.setattr(harry_potter, "label", watched)
    for reinforce in ("lora", "full"):
        unlearn(reinforce, reinforce=reinforce)
    assert own[0] == own[1]


def test_proposed_anchors(unlearn, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        folder, step = unlearn(anchors=None)
    assert step.details["anchors"]["source"] == "proposed"
    assert step.details["anchors"]["number"] == 5
    assert '"Harry Potter": "' in caplog.text
    written = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md", ".yaml")]
    assert not any('Harry Potter"' in text for text in written), "names what is to be forgotten"


def test_retained_records_decide_what_is_proposed(unlearn, tmp_path: Path) -> None:
    retain = write(tmp_path, "retain.jsonl", {"text": "Ron and Hogwarts. Hogwarts and Ron."})
    _, step = unlearn(anchors=None, retain=retain)
    assert step.details["anchors"]["number"] == 3
    assert step.details["retain"]["records"] == 1


def test_it_trains_through_rounding(unlearn, dense) -> None:
    """Only linears of layers change, and what changes a code on the grid is counted."""
    folder, step = unlearn(survive=["int4:16"], learning_rate=1e-2, epochs=4)
    after = weights(folder)
    found = changed(dense, after)
    assert found
    assert all("_proj" in name for name in found)
    crossed = sum(Grid(4, 16).crossings(dense[name], after[name]) for name in found)
    assert 0 < step.details["crossed"]["int4:16"] == crossed < step.details["changed_weights"]


# --- what does not ---


def test_with_alpha_0_and_no_anchors_nothing_changes(
    unlearn, dense, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every label is then the model's own prediction. No weight changes, by no bit; and it is said."""
    other = write(tmp_path, "other.json", {"Gandalf": "Bob"})
    folder, step = unlearn(alpha=0, anchors=other, learning_rate=1.0)
    assert changed(dense, weights(folder)) == set()
    assert step.details["changed_labels"] == 0
    assert step.details["labels"] > 50
    assert "nothing changed" in step.summary
    assert "None of the 1 anchors is in" in caplog.text
    assert changed(dense, weights(unlearn("other", alpha=5, anchors=other)[0])) != set()


def test_with_alpha_0_the_reinforced_model_has_no_say(unlearn) -> None:
    """It is not even trained; labels are what the model predicts on the translation."""
    one, step = unlearn("one", alpha=0)
    two, _ = unlearn("two", alpha=0, reinforce="full", reinforce_learning_rate=1.0)
    assert changed(weights(one), weights(two)) == set()
    assert step.details["reinforcing"] == {"steps": 0}
    assert step.details["changed_labels"] > 0


def test_the_same_seed_gives_the_same_model(unlearn) -> None:
    one, two = (weights(unlearn(name, anchors=None)[0]) for name in ("one", "two"))
    assert changed(one, two) == set()


def test_a_killed_run_keeps_its_labels(unlearn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # after every step but the last
    whole, _ = unlearn("whole", batch_size=1)
    train = harry_potter.train

    def killed(*inputs: Any) -> Any:
        if harry_potter.TRAINING in inputs:
            raise Killed
        return train(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(harry_potter, "train", killed)
        with pytest.raises(Killed):
            unlearn("out", batch_size=1)
    monkeypatch.setattr(harry_potter, "two_models", None)  # calling it fails
    folder, step = unlearn("out", batch_size=1)
    assert changed(weights(whole), weights(folder)) == set()
    assert step.details["reinforcing"]["steps"] == 4
    assert step.resumed


def test_labels_of_other_anchors_are_not_kept(
    unlearn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recipe is the same, but the file that it names has changed."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # after every step but the last
    with monkeypatch.context() as patch:
        patch.setattr(harry_potter, "write_changed", killed)
        with pytest.raises(Killed):
            unlearn("out", batch_size=1)
    monkeypatch.setitem(ANCHORS, "Ron", "Kim")
    with pytest.raises(BadInput, match="interrupted run with another set of records; use --fresh"):
        unlearn("out", batch_size=1)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": "{tmp}/list.json"}, "should be one JSON object"),
        ({"anchors": "nowhere.csv"}, "There is no file nowhere.csv"),
        ({"forget": "{tmp}/empty.jsonl"}, "holds no records"),
        ({"forget": "{tmp}/short.jsonl"}, "No record of .* has more than one token"),
        ({"retain": "{tmp}/forget.jsonl"}, "also to be retained"),
        ({"alpha": -1}, "alpha"),
        ({"reinforce": "half"}, "reinforce"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_input_is_refused_in_one_sentence(
    unlearn, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write(tmp_path, "list.json", ["Harry", "Jon"])
    write(tmp_path, "empty.jsonl")
    write(tmp_path, "short.jsonl", {"text": "H"})
    filled = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in options.items()
    }
    with pytest.raises(BadInput, match=message) as caught:
        unlearn(**filled)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_offsets_is_refused(unlearn, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(BadInput, match="tokenizer"):
        unlearn()


# --- batches ---


def test_the_loss_of_a_sequence_does_not_depend_on_its_batch(shared_decoder: Callable[..., Path]) -> None:
    import compress
    from compress.calibration.text.records import IGNORED, TokenSequence, collate

    model = compress.load(shared_decoder("LlamaForCausalLM"))
    short = TokenSequence("a", (5, 6, 7), (IGNORED, 9, IGNORED))
    long = TokenSequence("b", tuple(range(3, 20)), (IGNORED, IGNORED, *range(20, 35)))

    def loss(*chosen: TokenSequence) -> float:
        return harry_potter.mean_loss(model, {"forget": collate(chosen, 0)}).item()

    assert loss(short, long) == pytest.approx((loss(short) + loss(long)) / 2, rel=1e-5)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([short.tokens])).logits[0].double()
    assert loss(short) == pytest.approx(-logits[0].log_softmax(-1)[9].item(), rel=1e-5)
