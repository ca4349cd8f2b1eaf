"""Inputs of encoders: one example each, as the tokenizer makes them, and what calibration draws of them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compress.calibration.text.encoder_inputs import calibration_inputs, encode, load_task_tokenizer, padded
from compress.calibration.text.examples import QuestionExample, TextExample, WordsExample
from compress.calibration.text.settings import Calibration
from compress.calibration.text.sources import Documents
from compress.engine.config import config_of
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint

Encoder = Callable[..., Path]
CLASSIFIER = "BertForSequenceClassification"
TEXTS = ["the cat sat on the mat .", "a dog ran", "the red tree", "who sat under the blue tree ?"]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def drawn(model: Path, source: str, seed: int = 0, **settings: Any) -> Any:
    wanted = Calibration(source=source, **{"nsamples": 4, "seqlen": 40} | settings)
    return calibration_inputs(Checkpoint.open(model), wanted, seed)


def texts_of(model: Path, windows: Any) -> list[str]:
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(row[mask]) for row, mask in zip(windows.tokens, windows.mask, strict=True)]


def test_each_text_is_an_input_of_its_own(tiny_encoder: Encoder, tmp_path: Path):
    model = tiny_encoder(CLASSIFIER)
    windows = drawn(model, write(tmp_path, [{"text": text} for text in TEXTS]))
    assert sorted(texts_of(model, windows)) == sorted(f"[CLS] {text} [SEP]" for text in TEXTS)
    assert windows.tokens.shape == (4, 9)
    assert windows.tokens[~windows.mask].eq(0).all()
    assert (~windows.mask).any()
    assert windows.token_types is None
    assert windows.document_hashes == set(Documents(tuple(TEXTS), "").hashes)
    described = windows.describe()
    assert (described["windows"], described["tokens"], described["nsamples"]) == (4, 9 + 5 + 5 + 9, 4)
    json.dumps(described)


def test_labels_make_no_difference_to_calibration(tiny_encoder: Encoder, tmp_path: Path):
    model = tiny_encoder(CLASSIFIER)
    bare = drawn(model, write(tmp_path, [{"text": text} for text in TEXTS]))
    labelled = drawn(model, write(tmp_path, [{"text": text, "label": 1} for text in TEXTS]))
    assert bare.sha256 == labelled.sha256


def test_the_seed_draws_and_seqlen_cuts(tiny_encoder: Encoder, tmp_path: Path):
    model = tiny_encoder(CLASSIFIER)
    source = write(tmp_path, [{"text": text} for text in TEXTS])
    few = {"nsamples": 2, "seqlen": 6}
    one, again, other = (drawn(model, source, seed, **few) for seed in (0, 0, 1))
    assert one.sha256 == again.sha256 != other.sha256
    assert len(one) == 2
    assert one.tokens.shape[1] <= 6
    assert len(one.document_hashes) == 2
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for text in texts_of(model, one))


def test_nothing_is_longer_than_the_positions_of_the_model(tiny_encoder: Encoder, tmp_path: Path):
    long = write(tmp_path, [{"text": "cat " * 100}])
    bert = tiny_encoder(CLASSIFIER)
    roberta = tiny_encoder("RobertaForSequenceClassification", "roberta")
    assert drawn(bert, long, seqlen=2048).tokens.shape == (1, 40)
    assert drawn(roberta, long, seqlen=2048).tokens.shape == (1, 39)  # one position is padding's


def test_too_few_texts_are_told(tiny_encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = write(tmp_path, [{"text": text} for text in TEXTS])
    with caplog.at_level(logging.WARNING):
        assert len(drawn(tiny_encoder(CLASSIFIER), source, nsamples=9)) == 4
    assert "only 4 of the 9 inputs" in caplog.text


def test_other_sources_give_a_document_an_input(tiny_encoder: Encoder, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[0])
    model = tiny_encoder("BertForMaskedLM")
    assert texts_of(model, drawn(model, str(file))) == [f"[CLS] {TEXTS[0]} [SEP]"]


def test_a_pair_is_told_apart(tiny_encoder: Encoder, tmp_path: Path):
    model = tiny_encoder(CLASSIFIER)
    rows = [{"text": "the cat", "text_pair": "a dog ran"}, {"text": "a mat"}]
    windows = drawn(model, write(tmp_path, rows))
    by_text = dict(zip(texts_of(model, windows), windows.token_types.tolist(), strict=True))
    assert by_text == {
        "[CLS] the cat [SEP] a dog ran [SEP]": [0, 0, 0, 0, 1, 1, 1, 1],
        "[CLS] a mat [SEP]": [0] * 8,
    }


def test_words_and_questions_calibrate_without_labels(tiny_encoder: Encoder, tmp_path: Path):
    tagger = tiny_encoder("BertForTokenClassification")
    words = drawn(tagger, write(tmp_path, [{"words": ["the", "unhappiness"]}]))
    assert texts_of(tagger, words) == ["[CLS] the un ##happi ##ness [SEP]"]
    answerer = tiny_encoder("BertForQuestionAnswering", "answerer")
    rows = [{"question": "who sat ?", "context": "the cat sat ."}]
    assert texts_of(answerer, drawn(answerer, write(tmp_path, rows))) == [
        "[CLS] who sat ? [SEP] the cat sat . [SEP]"
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"messages": [{"role": "user", "content": "hi"}]}], {}, "lacks 'text'"),
        ([{"text": "the cat"}], {"chat_template": True}, "does not read conversations"),
        ([{"text": "the cat", "label": "purple"}], {}, "purple"),
    ],
)
def test_what_does_not_fit_is_refused(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, tiny_encoder: Encoder, tmp_path: Path
):
    with pytest.raises(BadInput, match=message):
        drawn(tiny_encoder(CLASSIFIER), write(tmp_path, rows), **settings)


def test_conversations_are_refused_by_an_encoder_without_a_task(tiny_encoder: Encoder, tmp_path: Path):
    source = write(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(BadInput, match="conversations"):
        drawn(tiny_encoder("BertForMaskedLM"), source)


def encoded(model: Path, task: Any, example: Any, longest: int) -> tuple[list[Any], Any]:
    checkpoint = Checkpoint.open(model)
    tokenizer = load_task_tokenizer(checkpoint, task)
    return next(encode([example], tokenizer, config_of(checkpoint), longest)), tokenizer


def test_a_long_text_is_cut_and_keeps_its_end_token(tiny_encoder: Encoder):
    model = tiny_encoder(CLASSIFIER)
    (one,), tokenizer = encoded(model, "sequence classification", TextExample("cat " * 20), 10)
    assert one.cut
    assert len(one.tokens) == 10
    assert one.tokens[-1] == tokenizer.sep_token_id
    (whole,), _ = encoded(model, "sequence classification", TextExample("cat " * 8), 10)
    assert not whole.cut
    assert len(whole.tokens) == 10


def test_the_first_token_of_each_word(tiny_encoder: Encoder):
    model = tiny_encoder("BertForTokenClassification")
    example = WordsExample(("the", "unhappiness", "sat", "on"))
    (one,), _ = encoded(model, "token classification", example, 40)
    assert one.places == {0: 1, 1: 2, 2: 5, 3: 6}
    assert not one.cut
    (short,), _ = encoded(model, "token classification", example, 7)
    assert short.places == {0: 1, 1: 2, 2: 5}
    assert short.cut


def test_windows_over_a_context_overlap_and_cover_it(tiny_encoder: Encoder):
    model = tiny_encoder("BertForQuestionAnswering")
    context = "the cat sat on the red mat . a dog ran under the blue tree ."
    example = QuestionExample("who sat ?", context)
    inputs, _ = encoded(model, "question answering", example, 14)
    assert len(inputs) > 1
    assert all(len(one.tokens) <= 14 for one in inputs)
    words = [[context[begin:end] for begin, end in one.places.values()] for one in inputs]
    assert words[0] == context.split()[: len(words[0])]
    assert {span for one in inputs for span in one.places.values()} == set(
        encoded(model, "question answering", example, 40)[0][0].places.values()
    )
    for before, after in itertools.pairwise(words):
        assert before[-4:] == after[:4]
    assert all(one.types == [0] * 5 + [1] * (len(one.tokens) - 5) for one in inputs)


def test_a_question_that_fills_the_input_is_refused(tiny_encoder: Encoder):
    example = QuestionExample("who " * 20, "the cat")
    with pytest.raises(BadInput, match="no room for its context"):
        encoded(tiny_encoder("BertForQuestionAnswering"), "question answering", example, 20)


def test_a_slow_tokenizer_cannot_tell_words(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(BadInput, match="fast tokenizer"):
        load_task_tokenizer(
            Checkpoint.open(tiny_encoder("BertForTokenClassification")), "token classification"
        )


def test_padding_is_on_the_right_and_masked(tiny_encoder: Encoder):
    model = tiny_encoder(CLASSIFIER)
    inputs = [encoded(model, "sequence classification", TextExample(text), 40)[0][0] for text in TEXTS[:2]]
    windows = padded(inputs, 7)
    assert windows.mask.tolist() == [[True] * 9, [True] * 5 + [False] * 4]
    assert torch.equal(windows.tokens[1, 5:], torch.full((4,), 7))
