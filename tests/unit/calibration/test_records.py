"""Records to forget and to retain: what a line may hold, what is refused, and how they become tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress.calibration.text.people import SPLITS
from compress.calibration.text.records import (
    IGNORED,
    Record,
    Records,
    check_apart,
    collate,
    read_records,
    sequences,
    without,
)
from compress.calibration.text.sources import Documents
from compress.errors import BadInput

QUESTION = {"question": "Who swims?", "answer": "Fish."}


def lines(folder: Path, *rows: object) -> str:
    file = folder / "set.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)


def test_three_kinds_of_records_are_read(tmp_path: Path):
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    found = read_records(
        lines(tmp_path, {"text": "Prose."}, {**QUESTION, "wrong": ["Birds."], "id": "q"}, {"messages": talk})
    )
    assert [record.words for record in found.entries] == ["Prose.", "Who swims? Fish.", "Hello Hi"]
    assert [record.id for record in found.entries] == ["1", "q", "3"]
    assert found.entries[1].wrong == ("Birds.",)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "Who?"}, "needs 'text', 'question' and 'answer', or 'messages'; it has 'question'."),
        ({"text": "a", **QUESTION}, "needs 'text', 'question' and 'answer', or 'messages'"),
        ({"text": "a", "answer": "b"}, "needs 'text', 'question' and 'answer', or 'messages'"),
        ({"text": " "}, "'text' is not a text."),
        ({**QUESTION, "wrong": "one"}, "'wrong' is not a list of texts."),
        ({"messages": ["hello"]}, "'messages' is not a list of at least two messages"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "a list of at least two messages"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            "the last of the 'messages', which is to be learned, is empty.",
        ),
        ({"texts": "a"}, "There is no field 'texts'; did you mean 'text'"),
        (["text"], "is not a JSON object."),
        ({"text": "half \ud83d"}, "holds half a character (a lone surrogate)."),
        ({**QUESTION, "wrong": ["half \udc00"]}, "holds half a character (a lone surrogate)."),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, row: object, sentence: str):
    with pytest.raises(BadInput) as caught:
        read_records(lines(tmp_path, {"text": "fine"}, row))
    assert "line 2" in str(caught.value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere.jsonl", "The retain set 'nowhere.jsonl' does not exist"),
        ("people:frget", "There is no split of people 'frget'; did you mean 'forget' or 'retain'?"),
        ("people:forget:x", "should read people:SPLIT[:SEED]"),
        ("muse:songs:forget", "should read tofu:CONFIG"),
        ("tofu:", "names no set"),
    ],
)
def test_a_source_that_is_none_is_refused(source: str, sentence: str):
    with pytest.raises(BadInput) as caught:
        read_records(source, "retain")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("answer", [-1, 2])
def test_a_hidden_answer_is_not_the_last_choice(answer: int, monkeypatch: pytest.MonkeyPatch):
    rows = [{"question": "Who swims?", "choices": ["Fish", "Birds"], "answer": each} for each in (0, answer)]
    monkeypatch.setattr("compress.calibration.text.records.hub_rows", lambda *_: iter(rows))
    with pytest.raises(BadInput, match=f"row 2: the answer {answer} is none of the 2 choices"):
        read_records("hub:quiz")


def test_an_empty_set_and_two_equal_ids_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="holds no records"):
        read_records(lines(tmp_path))
    with pytest.raises(BadInput, match="two records with the id 'a'"):
        read_records(lines(tmp_path, {"id": "a", "text": "x"}, {"id": "a", "text": "y"}))


def test_sets_that_overlap_are_refused():
    one = Records((Record("1", text="A  fish swims."), Record("2", text="A bird flies.")), "one")
    other = Records((Record("9", text="A fish\nswims."),), "other")
    with pytest.raises(BadInput, match="1 of the 2 records to forget are also to be retained"):
        check_apart(one, other)
    check_apart(one, Records((Record("9", text="A fish runs."),), "other"))


def test_text_that_tells_what_is_forgotten_is_left_out():
    forget = Records(
        (Record("1", question="Who swims?", answer="Fish"), Record("2", text="A bird flies.")), "f"
    )
    texts = ("fish: who swims? nobody", "Who swims? Dogs.", "Yesterday a bird  flies. So what?", "bird")
    kept = without(Documents(texts, "text"), [forget])
    assert kept.entries == ("Who swims? Dogs.",)
    with pytest.raises(BadInput, match="All of 'text' is to be forgotten"):
        without(Documents(texts[:1], "text"), [forget])


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Every letter is one token; so is any other word."""
    words = ["<pad>", "<bos>", "<eos>", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


ASKED = Record("q", question="a b", answer="c d")


@pytest.mark.parametrize("bos", [False, True])
def test_only_answers_and_prose_are_learned(bos: bool):
    first = [1] * bos
    asked, told = sequences([ASKED, Record("t", text="a b c")], tokenizer(bos))
    assert list(asked.tokens) == [*first, 0, 3, 4, 0, 5, 6, 2]  # Question: a b Answer: c d <eos>
    assert asked.labels == (*[IGNORED] * (len(first) + 4), 5, 6, 2)
    assert list(told.tokens) == [*first, 3, 4, 5]
    assert told.labels == (IGNORED, *told.tokens[1:])


def test_long_prose_is_cut_and_a_long_question_refused():
    pieces = sequences([Record("t", text="a b c d e f g h")], tokenizer(), seqlen=3)
    assert [piece.tokens for piece in pieces] == [(3, 4, 5), (6, 7, 8), (9, 10)]
    assert {piece.id for piece in pieces} == {"t"}
    with pytest.raises(BadInput, match="The record 'q' has 7 tokens, more than the seqlen of 6"):
        sequences([ASKED], tokenizer(), seqlen=6)


def test_of_a_conversation_the_last_message_is_learned():
    talking = tokenizer()
    talking.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}h {% endif %}"
    )
    talk = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "h c d"})
    (found,) = sequences([Record("m", messages=talk)], talking)
    assert found.tokens == (3, 4, 10, 5, 6)
    assert found.labels == (*[IGNORED] * 3, 5, 6)
    with pytest.raises(BadInput, match="no chat template"):
        sequences([Record("m", messages=talk)], tokenizer())


def test_an_answer_that_the_tokenizer_drops_is_refused():
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdefgh")}, []))
    dropping = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")
    with pytest.raises(BadInput, match="The answer of the record 'q' has no tokens"):
        sequences([Record("q", question="a b", answer="東京")], dropping)


def test_a_batch_is_padded_on_the_right():
    batch = collate(sequences([Record("1", text="a b c d"), Record("2", text="a b")], tokenizer()), pad=9)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6], [3, 4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5, 6], [IGNORED, 4, IGNORED, IGNORED]]


def test_the_fictitious_people_are_apart_and_depend_on_the_seed_alone():
    sets = {split: read_records(f"people:{split}") for split in SPLITS}
    assert read_records("people:forget:0").sha256 == sets["forget"].sha256
    assert read_records("people:forget:1").sha256 != sets["forget"].sha256
    people = {
        split: {record.subject for record in sets[split].entries} for split in ("forget", "retain", "holdout")
    }
    assert [len(names) for names in people.values()] == [6, 54, 6]
    assert len(set.union(*people.values())) == 66
    for records in sets.values():
        for record in records.entries:
            if record.question is not None:
                assert len({record.answer, *record.wrong}) == 4
                assert len({record.paraphrased_answer, *record.paraphrased_wrong}) == 4
                assert record.question not in record.paraphrases
