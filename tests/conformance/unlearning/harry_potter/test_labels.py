"""Who's Harry Potter: which tokens get which labels, against a restatement in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.calibration.text.records import IGNORED, Record, TokenSequence, sequences
from compress.unlearning.parts.anchors import Anchors
from compress.unlearning.parts.generic_labels import (
    Blocks,
    generic_labels,
    generic_logits,
    labelled,
    predictor,
)
from tests.conformance.unlearning.harry_potter import restated

ANCHORS = {
    "Harry Potter": "Jon Baker",
    "Harry": "Jon",
    "Hogwarts": "the School of Milton",
    "wand": "stick",
    "the Black Tower": "the Grey Tower",
}
PROSE = (
    "Harry Potter went to Hogwarts with a wand – his wand, said Harry. Wands are made in the Black Tower. "
    "HARRY POTTER left Hogwarts, and Wand by wand Harry’s school of Milton — naïve, née — was grey. "
)
QUESTION = ["Question: Who is Harry\n Potter?\nAnswer:", " Harry Potter is a boy at Hogwarts.<eos>"]
OTHER = "Jon Baker went to the School of Milton with a stick. Jon was in the Grey Tower. "
VOCABULARY = 380

TEXTS = {
    "prose": ([PROSE], [True]),
    "question": (QUESTION, [False, True]),
    "learned throughout": (QUESTION, [True, True]),
    "an anchor first": (["Harry said so"], [True]),
    "no anchor": (["A cat sat on the mat, née Smith."], [True]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return restated.tokenizer_of((PROSE + OTHER + "".join(QUESTION)) * 3, VOCABULARY)


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return model_of(1)


@pytest.fixture(scope="module")
def reinforced(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """It is far surer than the base model."""
    torch.manual_seed(2)
    model = copy.deepcopy(base)
    model.lm_head.weight.data *= 3
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("reference", ["translated", "original"])
@pytest.mark.parametrize(("pieces", "learned"), TEXTS.values(), ids=TEXTS)
def test_labels(tokenizer, base, reinforced, pieces, learned, reference) -> None:
    options = {"alpha": 3.0, "suppression": 4.0, "reference": reference}
    block = Blocks(tokenizer, Anchors(ANCHORS, "test")).of_text(pieces, learned)
    found = generic_labels(block, predictor(base), predictor(reinforced), **options)
    exact = (restated.exact(copy.deepcopy(model).double()) for model in (base, reinforced))
    expected = restated.labels(pieces, learned, ANCHORS, tokenizer, *exact, **options)
    assert [target.position for target in block.targets] == list(expected)
    clear = [margin > 1e-3 for _, margin in expected.values()]  # float32 tells the two best apart
    assert sum(clear) > 0.9 * len(clear)
    assert [label for label, is_clear in zip(found.generic, clear, strict=True) if is_clear] == [
        label for label, margin in expected.values() if margin > 1e-3
    ]
    own = predictor(base)(block.original.ids).argmax(-1)
    assert found.own == [int(own[target.position - 1]) for target in block.targets]


def test_the_texts_show_what_they_should(tokenizer, base, reinforced) -> None:
    """Anchors and stand-ins differ in tokens; all rules leave something out; all parts of (1) matter."""
    block = Blocks(tokenizer, Anchors(ANCHORS, "test")).of_text([PROSE], [True])
    assert len(block.original.ids) != len(block.translated.ids)
    assert any(target.context != target.position - 1 for target in block.targets)
    assert any(target.suppressed for target in block.targets)
    assert len(block.targets) < len(block.original.ids) - 1

    def labels(**changed: float | str) -> list[int]:
        options = {"alpha": 3.0, "suppression": 4.0, "reference": "translated", **changed}
        return generic_labels(block, predictor(base), predictor(reinforced), **options).generic

    usual = labels()
    for changed in ({"alpha": 0.0}, {"suppression": 0.0}, {"reference": "original"}):
        assert labels(**changed) != usual, changed


# --- what the equation promises ---


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fixed(*tables: torch.Tensor) -> Callable[[Sequence[int]], torch.Tensor]:
    """A model that has a table of logits for texts of each length."""
    by_length = {len(table): table for table in tables}
    return lambda tokens: by_length[len(tokens)].clone()


def test_generic_logits() -> None:
    base, reinforced, reference = (random_logits(seed, 7, 50) for seed in range(3))
    for alpha in (0.0, 0.5, 5.0):
        for compared in (None, reference):
            found = generic_logits(base, reinforced, alpha, compared)
            v, r, c = (x.double().numpy() for x in (base, reinforced, base if compared is None else compared))
            np.testing.assert_allclose(found, v - alpha * np.where(r > c, r - c, 0), rtol=1e-6, atol=1e-5)


def test_labels_are_the_models_own_where_the_reinforced_model_is_not_more_confident(tokenizer) -> None:
    """If the base model's first choice is no likelier in the reinforced model, it is the label: the logits of
    all others can only fall. Where it is likelier, a large alpha takes it."""
    block = Blocks(tokenizer, Anchors(ANCHORS, "test")).of_text([PROSE], [True])
    ours, theirs = len(block.original.ids), len(block.translated.ids)
    base = fixed(random_logits(1, ours, VOCABULARY), random_logits(2, theirs, VOCABULARY))
    reinforced = fixed(3 * random_logits(3, ours, VOCABULARY))
    found = generic_labels(block, base, reinforced, alpha=1000.0, suppression=0.0).generic
    v_base, v_reinforced = base(block.translated.ids), reinforced(block.original.ids)
    kept = changed = 0
    for target, label in zip(block.targets, found, strict=True):
        first = int(v_base[target.context].argmax())
        if v_reinforced[target.position - 1, first] <= v_base[target.context, first]:
            assert label == first
            kept += 1
        else:
            assert label != first
            changed += 1
    assert min(kept, changed) > 3


def test_with_alpha_0_labels_are_the_base_models_predictions_on_the_translation(tokenizer, base) -> None:
    block = Blocks(tokenizer, Anchors(ANCHORS, "test")).of_text([PROSE], [True])
    expected = predictor(base)(block.translated.ids).argmax(-1)
    for reinforced in (None, predictor(model_of(3)), predictor(model_of(4))):
        found = generic_labels(block, predictor(base), reinforced, alpha=0.0, suppression=0.0)
        assert found.generic == [int(expected[target.context]) for target in block.targets]
        assert found.generic != found.own


def test_without_anchors_the_base_model_reads_the_same_text(tokenizer, base) -> None:
    """So with alpha 0 every learned token but the first has the label that the model predicts itself."""
    block = Blocks(tokenizer, Anchors({"Gandalf": "Bob"}, "test")).of_text([PROSE], [True])
    assert block.translated == block.original
    assert [target.position for target in block.targets] == list(range(1, len(block.original.ids)))
    assert [target.context for target in block.targets] == list(range(len(block.original.ids) - 1))
    found = generic_labels(block, predictor(base), None, alpha=0.0, suppression=5.0)
    assert found.generic == found.own


# --- the rules of consistency ---


def test_rule_a_an_anchor_has_a_label_once() -> None:
    anchors = Anchors({"Ada Lane": "Jon Hill", "Ada": "Jon", "Lane": "Hill"}, "test")
    text = "so Ada Lane met Lane, Ada and Ada Lane"
    block = Blocks(restated.tokenizer_of("", 257), anchors).of_text([text], [True])
    covered = {index for target in block.targets for index in range(*block.original.spans[target.position])}
    named = [text.index(name, start) for name, start in (("Ada", 0), ("Lane,", 0), ("Ada", 7), ("Ada", 24))]
    assert [place in covered for place in named] == [True, False, False, False]


def test_rule_b_the_stand_ins_of_named_anchors_are_suppressed(tokenizer) -> None:
    anchors = Anchors({"Ada Lane": "Zoe Quinn", "Lane": "Quinn", "Bo": "Vim"}, "test")
    maker = Blocks(tokenizer, anchors)
    block = maker.of_text(["so Ada Lane met Bo or not"], [True])
    zoe, quinn, vim = (maker.beginnings(name) for name in ("Ada Lane", "Lane", "Bo"))
    spelled = {tokenizer.decode([token]).strip() for token in zoe}
    assert {word[:1] for word in spelled} == {"Z"}
    ends = {target.position: block.original.spans[target.position - 1][1] for target in block.targets}
    for target in block.targets:
        expected = frozenset()
        if ends[target.position] >= len("so Ada Lane"):
            expected |= zoe | quinn
        if ends[target.position] >= len("so Ada Lane met Bo"):
            expected |= vim
        assert set(target.suppressed) == expected
    assert block.targets[0].suppressed == ()
    assert len(block.targets[-1].suppressed) >= 3


def test_words_that_anchor_and_stand_in_share_are_not_suppressed(tokenizer) -> None:
    maker = Blocks(tokenizer, Anchors({"the Black Tower": "the Grey Tower", "tower": "Tower"}, "test"))
    assert {tokenizer.decode([token]).strip()[:1] for token in maker.beginnings("the Black Tower")} == {"G"}
    assert maker.beginnings("tower") == frozenset()


# --- sequences of tokens ---


def test_blocks_of_sequences_keep_their_tokens(tokenizer) -> None:
    maker = Blocks(tokenizer, Anchors(ANCHORS, "test"))
    prompt, answer = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in QUESTION)
    asked = TokenSequence("a", (*prompt, *answer), (*[IGNORED] * len(prompt), *answer))
    assert maker.block(asked) == maker.of_text(QUESTION, [False, True])
    prose = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    told = TokenSequence("b", tuple(prose), (IGNORED, *prose[1:]))
    assert maker.block(told) == maker.of_text([PROSE], [True])
    assert maker.block(told).anchors == 11


def test_a_token_that_begins_texts_is_kept() -> None:
    """As in Llama 2, whose tokenizer would otherwise put one more space behind it."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator([*QUESTION, OTHER], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    records = [
        Record("a", text="Harry is a boy. Who is Harry?"),
        Record("b", question="Who is Harry?", answer="A boy at Hogwarts."),
    ]
    for sequence in sequences(records, llama):
        block = Blocks(llama, Anchors(ANCHORS, "test")).block(sequence)
        assert block.original.ids == sequence.tokens
        assert block.anchors == 2
        assert block.targets


def test_labelled_sequences(tokenizer, base, reinforced) -> None:
    block = Blocks(tokenizer, Anchors(ANCHORS, "test")).of_text(QUESTION, [False, True])
    found = generic_labels(block, predictor(base), predictor(reinforced), alpha=3.0, suppression=4.0)
    sequence = labelled(block, found, "name")
    assert sequence.id == "name"
    assert sequence.tokens == block.original.ids
    at = {target.position: label for target, label in zip(block.targets, found.generic, strict=True)}
    assert sequence.labels == tuple(at.get(index, IGNORED) for index in range(len(sequence.tokens)))
