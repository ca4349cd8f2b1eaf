"""Windows of tokens: what they are cut from, in what order, with what padding."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress.calibration.text import tokens as tokenising
from compress.calibration.text import windows
from compress.calibration.text.sources import Documents
from compress.calibration.text.windows import calibration_windows, evaluation_windows, overlap
from compress.errors import BadInput

LONGEST, MOST = 40, 12  # tokens in a document, documents
PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "user": 3, "assistant": 4}
WORDS = {f"{d}.{i}": len(SPECIAL) + d * LONGEST + i for d in range(MOST) for i in range(LONGEST)}
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} <eos>{% endfor %}"


def make_tokenizer(
    bos: bool = False, eos: bool = True, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Every word of document d at position i, "d.i", is one token, so a token tells where it is from."""
    core = Tokenizer(models.WordLevel(SPECIAL | WORDS, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer


def make_documents(lengths: list[int], source: str = "made up") -> Documents:
    texts = (" ".join(f"{d}.{i}" for i in range(length)) for d, length in enumerate(lengths))
    return Documents(tuple(texts), source)


def origin(token: int) -> tuple[int, int]:
    """(document, position in it) of a token that is not special."""
    return divmod(token - len(SPECIAL), LONGEST)


def word(document: int, position: int) -> int:
    return WORDS[f"{document}.{position}"]


TOKENIZERS = {bos: make_tokenizer(bos) for bos in (False, True)}
lengths_of_documents = st.lists(st.integers(1, LONGEST), min_size=1, max_size=MOST)


@given(lengths=lengths_of_documents, seqlen=st.integers(2, 16), seed=st.integers(0, 2**31), bos=st.booleans())
@settings(max_examples=80)
def test_calibration_windows_hold_whole_documents_or_packed_short_ones(lengths, seqlen, seed, bos):
    room = seqlen - bos
    cut = sum(length // room for length in lengths)
    packed = sum(length + 1 for length in lengths if length < room) // room
    documents = make_documents(lengths)
    if cut + packed == 0:
        with pytest.raises(BadInput, match="less than one window"):
            calibration_windows(TOKENIZERS[bos], documents, 1000, seqlen, seed)
        return

    found = calibration_windows(TOKENIZERS[bos], documents, 1000, seqlen, seed)

    assert found.tokens.shape == (cut + packed, seqlen)
    assert found.tokens.dtype == torch.int64
    assert found.mask.all()
    used = set()
    seen = Counter()
    for row in found.tokens.tolist():
        assert (row[0] == BOS) == bos
        row = row[bos:]
        assert BOS not in row
        assert PAD not in row
        seen.update(token for token in row if token != EOS)
        document, position = origin(row[0]) if row[0] != EOS else (None, None)
        used |= {origin(token)[0] for token in row if token != EOS}
        if (
            document is not None and lengths[document] >= room
        ):  # cut: nothing but the next `room` of its tokens
            assert position % room == 0
            assert row == [word(document, position + i) for i in range(room)]
            continue
        for before, after in pairwise(row):  # packed: documents in full and in order, EOS after each
            if before == EOS:
                assert after == EOS or origin(after)[1] == 0
                assert lengths[origin(after)[0]] < room
            elif after == EOS:
                assert origin(before)[1] == lengths[origin(before)[0]] - 1
            else:
                assert origin(after) == (origin(before)[0], origin(before)[1] + 1)
    assert max(seen.values()) == 1
    assert used <= set(range(len(lengths)))
    assert found.document_hashes >= {documents.hashes[d] for d in used}


@given(lengths=lengths_of_documents, context=st.integers(2, 16), bos=st.booleans())
@settings(max_examples=80)
def test_evaluation_windows_hold_every_token_once_in_order(lengths, context, bos):
    documents = make_documents(lengths)
    expected, room = [], context - bos
    for d, length in enumerate(lengths):
        kept = length - (length % room == 1 and not bos)  # a window of one token has nothing to predict
        expected += [word(d, i) for i in range(kept)]
    if not expected:
        with pytest.raises(BadInput, match="no text to predict"):
            evaluation_windows(TOKENIZERS[bos], documents, context)
        return

    found = evaluation_windows(TOKENIZERS[bos], documents, context)

    real = found.tokens[found.mask].tolist()
    assert [token for token in real if token != BOS] == expected
    assert found.num_tokens == len(real)
    for tokens, mask in zip(found.tokens.tolist(), found.mask.tolist()):
        assert (tokens[0] == BOS) == bos
        count = sum(mask)
        assert mask == [True] * count + [False] * (context - count)
        assert tokens[count:] == [PAD] * (context - count)
        assert len({origin(token)[0] for token in tokens[bos:count]}) == 1


def test_seed_decides_everything():
    documents = make_documents([LONGEST] * MOST)

    def draw(seed):
        return calibration_windows(TOKENIZERS[False], documents, 5, 8, seed)

    assert torch.equal(draw(1).tokens, draw(1).tokens)
    assert draw(1).sha256 == draw(1).sha256
    assert not torch.equal(draw(1).tokens, draw(2).tokens)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_long_document_is_sampled_and_not_just_begun():
    one = Documents((" ".join(f"{d}.{i}" for d in range(MOST) for i in range(LONGEST)),), "one")
    rows = calibration_windows(TOKENIZERS[False], one, 4, 8, seed=0).tokens
    assert len(rows) == 4
    assert rows[:, 0].tolist() != [len(SPECIAL) + 8 * i for i in range(4)]


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("lengths", [[8] * 6, [3, 4, 2, 5, 3, 4]])
def test_a_document_that_comes_twice_counts_once(lengths: list[int], chat_template: bool):
    """Otherwise what is held out for a check is also what was fitted to."""
    tokenizer = make_tokenizer(template=TEMPLATE)
    once = make_documents(lengths)
    respaced = tuple(f" {text.replace(' ', '  ')}" for text in once.entries)
    twice = Documents((*once.entries, *respaced), once.source)
    wanted, found = (
        calibration_windows(tokenizer, documents, 50, 8, seed=0, chat_template=chat_template)
        for documents in (once, twice)
    )
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.document_hashes == wanted.document_hashes


def test_limited_evaluation_spreads_over_the_documents():
    documents = make_documents([LONGEST] * 4)
    found = evaluation_windows(TOKENIZERS[False], documents, context=LONGEST // 2, limit=4)
    assert [origin(token) for token in found.tokens[:, 0].tolist()] == [(d, 0) for d in range(4)]
    assert len(evaluation_windows(TOKENIZERS[False], documents, context=LONGEST // 2, limit=100)) == 8


@pytest.mark.parametrize("piece", [7, 50])
def test_long_texts_are_tokenised_piece_by_piece(monkeypatch, piece):
    lines = "\n".join(" ".join(f"{d}.{i}" for i in range(LONGEST) if d or i < 4) for d in range(3))
    documents = Documents((lines,), "lines")
    whole = evaluation_windows(TOKENIZERS[False], documents, 6)
    monkeypatch.setattr(tokenising, "PIECE", len(lines.split("\n")[1]) + piece)
    calls = []
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "__call__", counting(type(tokenizer).__call__, calls))
    assert torch.equal(evaluation_windows(tokenizer, documents, 6).tokens, whole.tokens)
    assert len(calls) > 2


def counting(call, calls):
    def counted(self, text, *args, **kwargs):
        calls.append(text)
        return call(self, text, *args, **kwargs)

    return counted


def test_too_little_text_is_told(caplog):
    documents = make_documents([20, 20])
    with caplog.at_level(logging.WARNING, logger="compress"):
        found = calibration_windows(TOKENIZERS[False], documents, nsamples=10, seqlen=8, seed=0)
    assert len(found) == 4
    assert "only 4 of the 10 windows" in caplog.text
    with pytest.raises(BadInput, match="made up holds less than one window of 64 tokens"):
        calibration_windows(TOKENIZERS[False], documents, nsamples=10, seqlen=64, seed=0)


def test_packing_needs_an_end_of_text_token():
    tokenizer = make_tokenizer(eos=False)
    assert len(calibration_windows(tokenizer, make_documents([16, 16]), 4, 8, seed=0)) == 4
    with pytest.raises(BadInput, match="no end-of-text token"):
        calibration_windows(tokenizer, make_documents([16, 3]), 4, 8, seed=0)


@pytest.mark.parametrize(("nsamples", "seqlen"), [(0, 8), (-1, 8), (4, 1)])
def test_sizes_that_make_no_sense(nsamples, seqlen):
    with pytest.raises(BadInput, match=r"must be [12] or more"):
        calibration_windows(TOKENIZERS[False], make_documents([20]), nsamples, seqlen, seed=0)


def test_chat_rows_are_padded_on_the_right_and_never_begin_twice():
    said = [[("user", "0.0 0.1"), ("assistant", "0.2")], [("user", "1.0")]]
    entries = tuple(tuple({"role": role, "content": text} for role, text in talk) for talk in said)
    documents = Documents((*entries, "2.0 2.1 2.2 2.3 2.4 2.5 2.6 2.7"), "talks")
    tokenizer = make_tokenizer(bos=True, template=TEMPLATE)

    found = calibration_windows(tokenizer, documents, nsamples=3, seqlen=8, seed=0, chat_template=True)

    user, assistant = SPECIAL["user"], SPECIAL["assistant"]
    expected = {
        (BOS, user, word(0, 0), word(0, 1), EOS, assistant, word(0, 2), EOS),
        (BOS, user, word(1, 0), EOS, PAD, PAD, PAD, PAD),
        (BOS, user, *(word(2, i) for i in range(6))),
    }
    assert set(map(tuple, found.tokens.tolist())) == expected
    assert torch.equal(found.mask, found.tokens != PAD)
    assert found.document_hashes == set(documents.hashes)
    assert found.describe()["chat_template"] is True


def test_chat_rows_in_which_nothing_is_left_to_predict_are_no_windows():
    """A template may show only what some roles say."""
    shown = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    said = [("system", "0.0 0.1 0.2"), ("user", "1.0 1.1"), ("user", "2.0")]
    talks = Documents(tuple(({"role": role, "content": text},) for role, text in said), "talks")
    found = calibration_windows(make_tokenizer(template=shown), talks, 3, 8, seed=0, chat_template=True)
    assert found.tokens[found.mask].tolist() == [word(1, 0), word(1, 1)]
    assert len(found) == 1


def test_chat_that_cannot_be():
    talk = Documents((({"role": "user", "content": "0.0"},),), "talks")
    with pytest.raises(BadInput, match="no chat template"):
        calibration_windows(TOKENIZERS[False], talk, 1, 8, seed=0, chat_template=True)
    refusing = make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInput, match=r"conversation 1 of talks .roles must alternate"):
        calibration_windows(refusing, talk, 1, 8, seed=0, chat_template=True)
    with pytest.raises(BadInput, match="talks holds conversations"):
        calibration_windows(TOKENIZERS[False], talk, 1, 8, seed=0)
    with pytest.raises(BadInput, match="talks holds conversations"):
        evaluation_windows(TOKENIZERS[False], talk, 8)


def test_overlap_is_noticed_across_sources():
    ours = calibration_windows(TOKENIZERS[False], make_documents([20, 20, 20], "a"), 50, 8, seed=0)
    same = make_documents([20, 20], "b")
    respaced = Documents(tuple(text.replace(" ", "\n ") + "\n" for text in same.entries), "c")
    other = Documents((" ".join(f"7.{i}" for i in range(20)),), "d")
    assert overlap(ours, evaluation_windows(TOKENIZERS[False], same, 8)) == set(same.hashes)
    assert overlap(ours, evaluation_windows(TOKENIZERS[False], respaced, 8)) == set(same.hashes)
    assert not overlap(ours, evaluation_windows(TOKENIZERS[False], other, 8))


def test_only_documents_that_were_drawn_count_as_used():
    documents = make_documents([8] * MOST)
    found = calibration_windows(TOKENIZERS[False], documents, 1, 8, seed=0)
    assert found.document_hashes == {documents.hashes[origin(int(found.tokens[0, 0]))[0]]}


def test_selected_windows_have_their_own_hash():
    found = calibration_windows(TOKENIZERS[False], make_documents([20, 20]), 4, 8, seed=3)
    whole = found.sha256
    some = found.select(torch.tensor([True, False, False, True]))
    assert torch.equal(some.tokens, found.tokens[[0, 3]])
    assert some.mask.shape == (2, 8)
    assert some.sha256 != whole
    assert some.document_hashes == found.document_hashes


def test_provenance_is_json_and_the_hash_covers_tokens_mask_and_shape():
    found = calibration_windows(TOKENIZERS[False], make_documents([20, 20]), 4, 8, seed=3)
    about = json.loads(json.dumps(found.describe()))
    assert {key: about[key] for key in ("source", "windows", "seqlen", "nsamples", "seed")} == {
        "source": "made up",
        "windows": 4,
        "seqlen": 8,
        "nsamples": 4,
        "seed": 3,
    }
    assert about["document_sha256"] == sorted(found.document_hashes)
    ids, mask = found.tokens, found.mask
    shorter = mask.clone()
    shorter[0, -1] = False
    hashes = {
        windows.Windows(t, m, "x").sha256
        for t, m in [
            (ids, mask),
            (ids, shorter),
            (ids + 1, mask),
            (ids.view(8, 4), mask.view(8, 4)),
        ]
    }
    assert len(hashes) == 4
    assert found.sha256 in hashes
