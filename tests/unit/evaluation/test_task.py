"""Labelled files: read, run through encoders, scored, compared; and what is wrong with bad ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pydantic import ValidationError

from compress.calibration.text.examples import (
    QuestionExample,
    TaskFile,
    TextExample,
    WordsExample,
    read_task_file,
)
from compress.commands.evaluate import evaluate as command
from compress.engine.config import config_of
from compress.errors import BadInput
from compress.evaluation import evaluate as module
from compress.evaluation import task
from compress.evaluation.evaluate import evaluate
from compress.evaluation.task import TaskEvaluation, best_answer
from compress.evaluation.task_score import macro_f1, mcnemar, normalized, score, token_f1
from compress.report.compare import side_by_side as compare
from compress.report.scorecard import Figure, Measurement, Scorecard
from compress.storage.checkpoint import Checkpoint

Encoder = Callable[..., Path]
FLOPS = Figure(value=1, unit="flops")
FAMILIES = ("Bert", "DistilBert", "Roberta", "MPNet")
TEXT_TASK, WORD_TASK, QUESTION_TASK = "sequence classification", "token classification", "question answering"

TEXTS = [
    "the cat sat",
    "a dog ran under the blue tree .",
    "red",
    "who sat on the mat ?",
    "unhappiness , the dog",
]
TEXT_ROWS = [{"text": text, "label": number % 3} for number, text in enumerate(TEXTS)]
WORD_ROWS = [
    {"words": text.split(), "labels": [number % 3 for number in range(len(text.split()))]} for text in TEXTS
]
QUESTION_ROWS = [
    {"question": "who sat ?", "context": "the red cat sat on the mat .", "answers": ["cat"]},
    {"question": "who ran under the tree ?", "context": "a dog ran .", "answers": ["a dog", "dog"]},
]


def write(folder: Path, rows: list[Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(file)


def predictions(model: Path, file: str) -> list[Any]:
    dense = Checkpoint.open(model)
    return TaskEvaluation(file, dense).predictions(dense, lambda share: None)


def loaded(model: Path, cls: Any) -> tuple[Any, Any]:
    return cls.from_pretrained(model).eval(), hf.AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_predictions_are_those_of_transformers_one_by_one(
    family: str, tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For texts, words and questions; in one chunk with padding as in chunks of one."""

    def found(folder: Path, rows: list[Any]) -> list[Any]:
        file, answers = write(tmp_path, rows), []
        for limit in (1 << 14, 1):
            monkeypatch.setattr(task, "CHUNK_TOKENS", limit)
            answers.append(predictions(folder, file))
        assert answers[0] == answers[1]
        return answers[0]

    folder = tiny_encoder(f"{family}ForSequenceClassification", "texts", num_labels=3)
    model, tokenizer = loaded(folder, hf.AutoModelForSequenceClassification)
    inputs = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    expected = [int(model(ids).logits.argmax()) for ids in inputs]
    assert found(folder, TEXT_ROWS) == expected

    folder = tiny_encoder(f"{family}ForTokenClassification", "words", num_labels=3)
    model, _ = loaded(folder, hf.AutoModelForTokenClassification)
    expected = []
    for text in TEXTS:
        encoded = tokenizer(text.split(), is_split_into_words=True, return_tensors="pt")
        labels = model(encoded.input_ids).logits[0].argmax(-1).tolist()
        words = encoded.word_ids()
        expected.append({word: labels[words.index(word)] for word in range(len(text.split()))})
    assert found(folder, WORD_ROWS) == expected

    folder = tiny_encoder(f"{family}ForQuestionAnswering", "questions")
    model, _ = loaded(folder, hf.AutoModelForQuestionAnswering)
    typed = getattr(model.config, "type_vocab_size", 1) > 1
    expected = []
    for row in QUESTION_ROWS:
        encoded = tokenizer(
            row["question"],
            row["context"],
            return_tensors="pt",
            return_offsets_mapping=True,
            return_token_type_ids=typed,
        )
        spans, texts = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids()
        output = model(**encoded)
        inside = [position for position, text in enumerate(texts) if text == 1]
        begin, end = max(
            ((b, e) for b in inside for e in inside if b <= e < b + 30),
            key=lambda pair: float(output.start_logits[0, pair[0]] + output.end_logits[0, pair[1]]),
        )
        expected.append(row["context"][spans[begin][0] : spans[end][1]])
    assert found(folder, QUESTION_ROWS) == expected


@torch.no_grad()
def test_the_second_text_is_told_to_the_model(tiny_encoder: Encoder, tmp_path: Path):
    folder = tiny_encoder("BertForSequenceClassification", num_labels=3)
    model, tokenizer = loaded(folder, hf.AutoModelForSequenceClassification)
    evaluation = TaskEvaluation(
        write(tmp_path, [{"text": "the cat", "text_pair": "a dog", "label": 0}, *TEXT_ROWS]),
        Checkpoint.open(folder),
    )
    encoded = tokenizer("the cat", "a dog", return_token_type_ids=True, return_tensors="pt")
    assert encoded.token_type_ids.any()
    found = task.outputs(
        task.StreamedModel(evaluation.dense), [one for inputs in evaluation.inputs for one in inputs]
    )
    torch.testing.assert_close(found[0], model(**encoded).logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], model(encoded.input_ids).logits[0], atol=1e-3)


def file_of(kind: Any, *examples: Any) -> TaskFile:
    return TaskFile(kind, examples, "made up", "0" * 64)


def test_accuracy_agreement_and_pairs():
    file = file_of(TEXT_TASK, *(TextExample("x", label=label) for label in (0, 1, 1, 0)))
    found = score(file, [0, 1, 0, 0], [0, 0, 1, 1], FLOPS)
    assert found.accuracy.value == 0.5
    assert found.agreement.value == 0.25
    assert (found.gained, found.lost) == (1, 2)
    assert found.mcnemar_p.value == 1.0
    assert (found.f1, found.macro_f1, found.exact_match) == (None, None, None)
    dense = score(file, [0, 1, 0, 0], None, FLOPS)
    assert (dense.accuracy.value, dense.agreement.value, dense.mcnemar_p) == (0.75, 1, None)


def test_wilsons_interval_by_its_formula():
    right, total, z = 17, 20, 1.959963984540054
    file = file_of(TEXT_TASK, *(TextExample("x", label=0) for _ in range(total)))
    accuracy = score(file, [0] * right + [1] * (total - right), None, FLOPS).accuracy
    share, weight = right / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert accuracy.low == pytest.approx(middle - half, abs=1e-9)
    assert accuracy.high == pytest.approx(middle + half, abs=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (9, 2), (2, 9), (5, 5), (30, 12)])
def test_mcnemar_is_twice_the_binomial_tail(lost: int, gained: int):
    few, both = min(lost, gained), lost + gained
    tail = sum(math.comb(both, k) for k in range(few + 1)) / 2**both
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail), abs=1e-12)


def test_words_count_each_and_examples_whole():
    file = file_of(
        WORD_TASK,
        WordsExample(("a", "b", "c"), (0, 1, 1)),
        WordsExample(("d",), (2,)),
        WordsExample(("e", "f"), (0, 0)),  # of which the second was cut off
    )
    dense = [{0: 0, 1: 1, 2: 1}, {0: 2}, {0: 0}]
    model = [{0: 0, 1: 0, 2: 1}, {0: 2}, {0: 1}]
    found = score(file, dense, model, FLOPS)
    assert found.accuracy.value == pytest.approx(3 / 5)
    assert found.accuracy.low < 3 / 5 < found.accuracy.high
    assert found.agreement.value == pytest.approx(3 / 5)
    assert (found.gained, found.lost) == (0, 2)
    # label 0: 1 of 2 found, 1 too many; label 1: 1 of 2 found, 1 too many; label 2: right
    assert found.macro_f1.value == pytest.approx((2 / 4 + 2 / 4 + 1) / 3)


def test_macro_f1_is_over_the_labels_that_occur():
    assert macro_f1([0, 0, 1], [0, 2, 1]) == pytest.approx((2 / 3 + 1) / 2)


def test_squad_normalises_and_overlaps():
    assert normalized("  The U.S.  Senate, an\tassembly! ") == "us senate assembly"
    assert normalized("theatre") == "theatre"
    assert token_f1("the big cat", "a cat") == pytest.approx(2 / 3)
    assert token_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert token_f1("dog", "cat") == 0
    assert (token_f1("", ""), token_f1("the", "an"), token_f1("cat", "")) == (1, 1, 0)


def test_answers_are_scored_by_the_best_of_the_right_ones():
    file = file_of(
        QUESTION_TASK,
        QuestionExample("?", "c", ("big dog", "The cat")),
        QuestionExample("?", "c", ("a mat",)),
        QuestionExample("?", "c", ()),
    )
    found = score(file, ["cat", "mat", "tree"], ["Cat.", "red mat", ""], FLOPS)
    assert found.exact_match.value == pytest.approx(2 / 3)
    assert found.f1.value == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found.agreement.value == pytest.approx(1 / 3)
    assert (found.gained, found.lost) == (1, 1)


def test_the_best_answer_is_within_one_window_and_ordered():
    context = "aa bb cc dd"
    places = [{2: (0, 2), 3: (3, 5)}, {2: (6, 8), 3: (9, 11)}]
    low = [-9.0, -9.0]
    windows = [
        torch.tensor([[0.0, 0.0], low, [1.0, 5.0], [6.0, 2.0]]),  # begin after end would be 11
        torch.tensor([[3.0, 3.0], [50.0, 50.0], [4.0, 0.0], [0.0, 5.0]]),  # the question would be 100
    ]
    assert best_answer(context, places, windows, no_answer=False) == "cc dd"
    assert best_answer(context, places, windows, no_answer=True) == "cc dd"  # 9 beats the least, 0
    windows[0][0] = torch.tensor([6.0, 6.0])
    windows[1][0] = torch.tensor([5.0, 5.0])
    assert best_answer(context, places, windows, no_answer=True) == ""
    assert best_answer(context, places, windows, no_answer=False) == "cc dd"


TEXT_MODEL, WORD_MODEL = "BertForSequenceClassification", "BertForTokenClassification"


@pytest.mark.parametrize(
    ("architecture", "rows", "message"),
    [
        (TEXT_MODEL, ["{not json"], "line 1 is not JSON"),
        (TEXT_MODEL, [TEXT_ROWS[0], [1]], "line 2 is not a JSON object"),
        (TEXT_MODEL, [], "holds no examples"),
        (TEXT_MODEL, [{"text": "cat"}], "lacks 'label', which sequence classification needs"),
        (TEXT_MODEL, [{"label": 0}], "lacks 'text'"),
        (TEXT_MODEL, [{"text": " ", "label": 0}], "'text' is not a text"),
        (TEXT_MODEL, [{"text": "cat", "label": "gud"}], "'gud'.*good"),
        (TEXT_MODEL, [{"text": "cat", "label": 2}], "label '2'"),
        (TEXT_MODEL, [{"text": "cat", "label": True}], "label 'true'"),
        (WORD_MODEL, [{"words": ["cat", "dog"], "labels": ["good"]}], "2 words have 1 labels"),
        (WORD_MODEL, [{"words": "cat", "labels": ["good"]}], "not a list of texts"),
        (WORD_MODEL, [{"words": [], "labels": []}], "'words' is empty"),
        ("BertForQuestionAnswering", [{"question": "?", "context": "cat"}], "lacks 'answers'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    architecture: str, rows: list[Any], message: str, tmp_path: Path
):
    config = hf.BertConfig(id2label={0: "bad", 1: "good"}, architectures=[architecture])
    kind = {TEXT_MODEL: TEXT_TASK, WORD_MODEL: WORD_TASK}.get(architecture, QUESTION_TASK)
    with pytest.raises(BadInput, match=message):
        read_task_file(write(tmp_path, rows), config, kind)


def test_labels_by_name_and_by_id_and_a_file_that_is_missing(tmp_path: Path):
    config = hf.BertConfig(id2label={0: "bad", 1: "good"}, architectures=[TEXT_MODEL])
    file = write(tmp_path, [{"text": "cat", "label": "good"}, "", {"text": "dog", "label": 0, "more": 1}])
    read = read_task_file(file, config, TEXT_TASK)
    assert [example.label for example in read.examples] == [1, 0]
    with pytest.raises(BadInput, match="no task file"):
        read_task_file(tmp_path / "none.jsonl", config, TEXT_TASK)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("LlamaForCausalLM", {}, "is a decoder"),
        ("BertForMaskedLM", {}, "has no task head"),
        (TEXT_MODEL, {"num_labels": 1}, "does not choose one label"),
        (TEXT_MODEL, {"problem_type": "multi_label_classification"}, "does not choose one label"),
    ],
)
def test_a_model_without_such_a_task_is_refused(
    architecture: str, settings: dict[str, Any], message: str, tiny_encoder: Encoder, tmp_path: Path
):
    with pytest.raises(BadInput, match=message):
        TaskEvaluation(write(tmp_path, TEXT_ROWS), Checkpoint.open(tiny_encoder(architecture, **settings)))


def test_models_with_other_labels_do_not_compare(tiny_encoder: Encoder, tmp_path: Path):
    dense = tiny_encoder(TEXT_MODEL, "dense", num_labels=3)
    other = tiny_encoder(TEXT_MODEL, "other", num_labels=4)
    evaluation = TaskEvaluation(write(tmp_path, TEXT_ROWS), Checkpoint.open(dense))
    with pytest.raises(BadInput, match="same task and labels"):
        evaluation.predictions(Checkpoint.open(other), lambda share: None)


def test_models_with_other_tokenizers_do_not_compare(tiny_encoder: Encoder, tmp_path: Path):
    dense = tiny_encoder(TEXT_MODEL, "dense", num_labels=3)
    other = tiny_encoder(TEXT_MODEL, "other", seed=1, num_labels=3)
    tokens = (other / "tokenizer.json").read_text()
    for one, two in (("cat", "?"), ("dog", "cat"), ("?", "dog")):
        tokens = tokens.replace(f'"{one}":', f'"{two}" :')
    (other / "tokenizer.json").write_text(tokens)
    with pytest.raises(BadInput, match="does not number tokens as the dense model"):
        evaluate(str(other), baseline=str(dense), task_file=write(tmp_path, TEXT_ROWS))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the child process that is timed (test_measure.py), and holds what it was asked."""
    asked: list[dict[str, Any]] = []

    def measure(folder: Path, settings: Any, **wanted: Any) -> Measurement:
        asked.append(wanted)
        return Measurement(
            peak_resident_bytes=2,
            baseline_resident_bytes=1,
            prefill=Figure(value=200, low=100, high=400, unit="tokens/s", spread="interquartile range"),
            prefill_tokens=wanted["prefill_tokens"],
            prefill_repetitions=wanted["repetitions"],
            threads=1,
            device="made up",
            kernel="torch",
            storage_dtype="float32",
        )

    monkeypatch.setattr(module, "measure", measure)
    return asked


def test_the_scorecards_of_two_models(
    tiny_encoder: Encoder, tmp_path: Path, unmeasured: list[dict[str, Any]]
):
    dense = tiny_encoder(TEXT_MODEL, "dense", num_labels=3)
    other = tiny_encoder(TEXT_MODEL, "other", seed=1, num_labels=3, intermediate_size=24)
    file = write(tmp_path, TEXT_ROWS)
    cards = evaluate(str(other), baseline=str(dense), task_file=file)
    labels = [row["label"] for row in TEXT_ROWS]
    expected, given = predictions(dense, file), predictions(other, file)
    for card, found in zip(cards, (expected, given), strict=True):
        assert card.task.accuracy.value == sum(map(int.__eq__, found, labels)) / 5
        assert card.fidelity is None
    assert cards[1].task.agreement.value == sum(map(int.__eq__, expected, given)) / 5
    protocol = cards[1].task_protocol
    assert (protocol.examples, protocol.inputs, protocol.cut, protocol.longest_tokens) == (5, 5, 0, 10)
    assert [asked["prefill_tokens"] for asked in unmeasured] == [protocol.mean_tokens] * 2

    table = compare(cards)
    keys = [column.key for column in table.columns]
    assert {"accuracy", "agreement", "mcnemar_p", "flops_ratio", "latency"} <= set(keys)
    assert not {"perplexity", "decode", "f1", "exact_match", "macro_f1"} & set(keys)
    ratio = table.rows[1].cells["flops_ratio"]
    assert 0.5 < ratio.value < 1
    latency = table.rows[1].cells["latency"]
    tokens = protocol.mean_tokens
    assert (latency.low, latency.value, latency.high) == (tokens / 400, tokens / 200, tokens / 100)
    assert any("McNemar" in line for line in table.caption)
    with pytest.raises(ValidationError, match="come together"):
        Scorecard.model_validate(cards[0].model_dump() | {"task_protocol": None})


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("architecture", "rows", "metric"),
    [
        (TEXT_MODEL, TEXT_ROWS, "accuracy"),
        (WORD_MODEL, WORD_ROWS, "macro_f1"),
        ("BertForQuestionAnswering", QUESTION_ROWS, "f1"),
    ],
)
def test_a_copy_of_the_dense_model_agrees_wholly(
    architecture: str, rows: list[Any], metric: str, tiny_encoder: Encoder, tmp_path: Path
):
    labels = {} if "Question" in architecture else {"num_labels": 3}
    dense = tiny_encoder(architecture, "dense", **labels)
    copy = tiny_encoder(architecture, "copy", **labels)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))  # another sha256
    one, other = evaluate(str(copy), baseline=str(dense), task_file=write(tmp_path, rows))
    assert one.model.sha256 != other.model.sha256
    assert other.task.agreement.value == 1
    assert (other.task.gained, other.task.lost, other.task.mcnemar_p.value) == (0, 0, 1)
    assert getattr(one.task, metric) == getattr(other.task, metric) is not None


@pytest.mark.usefixtures("unmeasured")
def test_the_command_line(tiny_encoder: Encoder, tmp_path: Path):
    from click.testing import CliRunner

    model, file = tiny_encoder(TEXT_MODEL, num_labels=3), write(tmp_path, TEXT_ROWS)
    cards = tmp_path / "cards.json"
    done = CliRunner().invoke(command, [str(model), "--task-file", file, "--json", str(cards)])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.stdout
    (card,) = json.loads(cards.read_text())
    assert card["task"]["agreement"]["value"] == 1

    refused = CliRunner().invoke(command, [str(model), "--task-file", file, "--text", "wikipedia"])
    assert isinstance(refused.exception, BadInput)
    assert "--text has no effect" in str(refused.exception)
    no_text = CliRunner().invoke(command, [str(model), "--text", file])
    assert isinstance(no_text.exception, BadInput)
    assert "--task-file" in str(no_text.exception)


def test_a_model_is_not_scored_on_what_it_was_calibrated_on(
    tiny_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from types import SimpleNamespace

    model, file = tiny_encoder(TEXT_MODEL, num_labels=3), write(tmp_path, TEXT_ROWS)
    read = read_task_file(file, config_of(Checkpoint.open(model)), TEXT_TASK)
    calibrated = {"document_sha256": sorted(read.document_hashes)[:1]}
    lineage = SimpleNamespace(chain=lambda: [SimpleNamespace(calibration=calibrated)])
    monkeypatch.setattr("compress.evaluation.beforehand.read_lineage", lambda folder: lineage)
    with pytest.raises(BadInput, match="calibrated on 1 of the documents"):
        evaluate(str(model), task_file=file)
