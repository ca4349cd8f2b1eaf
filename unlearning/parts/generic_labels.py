"""Generic labels: what a model would predict that has not seen a text, taken from two that have.

A block is a stretch of the text that the models see at once. The base model reads its translation, in which
stand-ins are in the place of anchors; the reinforced model, which has seen even more of the text, reads the
original, and whatever it holds more likely than the base model does is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from compress.calibration.text.records import IGNORED, TokenSequence
from compress.unlearning.parts.anchors import (
    Anchors,
    Tokens,
    Translation,
    align,
    case_forms,
    key_of,
    tokenise,
)
from compress.unlearning.parts.words import FUNCTION_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reference = Literal["translated", "original"]
"""The text that the base model reads where the reinforced model is compared with it."""


class Target(NamedTuple):
    """A token that gets a generic label.

    Attributes:
        position: index of the token in the original block.
        context: index of the token of the translated block that predicts it; in the original block that is
            the token before it.
        suppressed: tokens that its label should not be: see `Block`.
    """

    position: int
    context: int
    suppressed: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A stretch of text, its translation, and the tokens that get labels.

    A token gets one if it is learned at all, if the text before it corresponds to a place in the translation
    (`align`), and if it is not part of an anchor that the block already had: that the name comes again is no
    knowledge (rule a). Behind an anchor, the beginning of its stand-in is suppressed: a text about one person
    does not go on with the name of another (rule b). In both rules a longer anchor also counts for the
    anchors that its words hold.

    Attributes:
        original, translated: the tokens of both texts.
        targets: in the order of the tokens.
        anchors: the number of occurrences of anchors.
    """

    original: Tokens
    translated: Tokens
    targets: tuple[Target, ...]
    anchors: int


class Blocks:
    """Makes the blocks of one tokenizer and one list of anchors."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, anchors: Anchors) -> None:
        self.tokenizer = tokenizer
        self.anchors = anchors
        self._beginnings: dict[str, frozenset[int]] = {}

    def block(self, sequence: TokenSequence) -> Block:
        """The block of a sequence of tokens.

        They are decoded and encoded again, in pieces of tokens that are learned and of tokens that are not.

        Raises:
            BadInput: the tokenizer does not know which characters a token spans.
        """
        learned = [label != IGNORED for label in sequence.labels]
        learned[0] = learned[min(1, len(learned) - 1)]  # nothing comes before it, so it is never learned
        cuts = [0, *(i for i in range(1, len(learned)) if learned[i] != learned[i - 1]), len(learned)]
        if sequence.tokens[0] == self.tokenizer.bos_token_id and len(sequence.tokens) > 1:
            cuts = sorted({*cuts, 1})  # some tokenizers put a space between it and the text
        pieces = [self._text(sequence.tokens[start:end]) for start, end in pairwise(cuts)]
        return self.of_text(pieces, [learned[start] for start in cuts[:-1]])

    def of_text(self, pieces: Sequence[str], learned: Sequence[bool]) -> Block:
        """The block of a text.

        Args:
            pieces: the text, which is tokenised piece by piece.
            learned: for each piece, whether the model is to learn to predict it.

        Raises:
            BadInput: the tokenizer does not know which characters a token spans.
        """
        translation = self.anchors.translate(pieces)
        ours = tokenise(self.tokenizer, translation.original)
        original, translated = _joined(ours), _joined(tokenise(self.tokenizer, translation.translated))
        flags = [flag for piece, flag in zip(ours, learned) for _ in piece.ids]
        targets = self._targets(original, align(original, translated, translation), translation, flags)
        return Block(original, translated, tuple(targets), len(translation.occurrences))

    def _targets(
        self, original: Tokens, aligned: list[int], translation: Translation, learned: list[bool]
    ) -> list[Target]:
        repeated = _repeated(translation, self.anchors)
        targets = []
        suppressed: set[int] = set()
        behind = 0  # occurrences that the text before the token holds
        for index in range(1, len(original.ids)):
            reached = original.spans[index - 1][1]
            while behind < len(translation.occurrences) and translation.occurrences[behind].end <= reached:
                for anchor in self.anchors.within[translation.occurrences[behind].anchor]:
                    suppressed |= self.beginnings(anchor)
                behind += 1
            start, end = original.spans[index]
            excluded = any(start < last and first < end for first, last in repeated)
            if learned[index] and aligned[index - 1] >= 0 and not excluded:
                targets.append(Target(index, aligned[index - 1], tuple(sorted(suppressed))))
        return targets

    def beginnings(self, anchor: str) -> frozenset[int]:
        """The tokens with which the stand-in of an anchor can begin: with and without a space before it, in
        every case that it can have.

        A stand-in begins with its first word that carries meaning and that the anchor does not have: of
        "the Grey Tower" for "the Black Tower" that is "Grey". Without such a word there are none.
        """
        if anchor not in self._beginnings:
            word = _telling_word(anchor, self.anchors.entries[anchor])
            forms = [word, *(form for form, _ in case_forms(word, word))] if word else []
            self._beginnings[anchor] = frozenset(
                self._first_token(before, form) for form in forms for before in ("", "a ")
            )
        return self._beginnings[anchor]

    def _first_token(self, before: str, word: str) -> int:
        (tokens,) = tokenise(self.tokenizer, [before + word])
        inside = [token for token, (_, end) in zip(tokens.ids, tokens.spans) if end > len(before)]
        # Some tokenizers make a token of their own of the space before a word.
        return next((token for token in inside if self._text([token]).strip()), inside[0])

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one sequence
        return text


def _joined(pieces: Sequence[Tokens]) -> Tokens:
    return Tokens(
        tuple(token for piece in pieces for token in piece.ids),
        tuple(span for piece in pieces for span in piece.spans),
    )


def _repeated(translation: Translation, anchors: Anchors) -> list[tuple[int, int]]:
    """Where anchors are that the text had before."""
    seen: set[str] = set()
    repeated = []
    for found in translation.occurrences:
        if found.anchor in seen:
            repeated.append((found.start, found.end))
        seen |= anchors.within[found.anchor]
    return repeated


def _telling_word(anchor: str, stand_in: str) -> str | None:
    theirs = {word.strip().lower() for word in key_of(anchor)} | FUNCTION_WORDS
    words = (word.strip() for word in key_of(stand_in))
    return next((word for word in words if word.lower() not in theirs and word[0].isalnum()), None)


def generic_logits(
    base: torch.Tensor, reinforced: torch.Tensor, alpha: float, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """v_generic = v_base - alpha ReLU(v_reinforced - v_reference), equation (1) of the paper.

    Args:
        base, reinforced: logits [..., V].
        alpha: how strongly what the reinforced model prefers is taken off.
        reference: what the reinforced model is compared with; None is ``base``.
    """
    return base - alpha * torch.relu(reinforced - (base if reference is None else reference))


class Labels(NamedTuple):
    """The labels of a block.

    Attributes:
        generic: a label for every target.
        own: what the base model itself predicts there on the original text.
    """

    generic: list[int]
    own: list[int]


Predict = Callable[[Sequence[int]], torch.Tensor]
"""Tokens of one sequence -> the logits behind each of them: float32 [S, V]."""


def predictor(model: nn.Module) -> Predict:
    """A causal language model as a function of one sequence; it is put into evaluation mode."""
    model.eval()
    device = next(model.parameters()).device

    @torch.no_grad()
    def predict(tokens: Sequence[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()

    return predict


@torch.no_grad()
def generic_labels(
    block: Block,
    base: Predict,
    reinforced: Predict | None,
    *,
    alpha: float,
    suppression: float,
    reference: Reference = "translated",
) -> Labels:
    """The most likely token of the generic logits, for every target of a block.

    Models read one block at a time, so that no label depends on what else there is.

    Args:
        block: with at least one target.
        base, reinforced: the two models. No reinforced model is needed if ``alpha`` is 0.
        alpha, reference: see `generic_logits`.
        suppression: what is taken off the logits of suppressed tokens.
    """
    before = torch.tensor([target.position - 1 for target in block.targets])
    own = base(block.original.ids)[before]
    logits = base(block.translated.ids)[torch.tensor([target.context for target in block.targets])]
    if reinforced is not None:
        stronger = reinforced(block.original.ids)[before]
        logits = generic_logits(logits, stronger, alpha, own if reference == "original" else None)
    penalty = torch.zeros(logits.shape)
    for row, target in zip(penalty, block.targets, strict=True):
        row[list(target.suppressed)] = suppression
    logits = logits - penalty.to(logits.device)
    return Labels(logits.argmax(-1).tolist(), own.argmax(-1).tolist())


def labelled(block: Block, labels: Labels, name: str) -> TokenSequence:
    """The original block with generic labels at its targets, and `IGNORED` elsewhere."""
    found = [IGNORED] * len(block.original.ids)
    for target, label in zip(block.targets, labels.generic):
        found[target.position] = label
    return TokenSequence(name, block.original.ids, tuple(found))
