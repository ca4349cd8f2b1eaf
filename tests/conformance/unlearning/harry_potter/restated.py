"""Who's Harry Potter, told once more: over bytes instead of the tokenizer's spans, in float64, word by word.

Nothing here is imported from the method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

LITTLE_WORDS = {"the", "of", "a"}
"""Words of the stand-ins in these tests that no text can be told by."""


def tokenizer_of(text: str, size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs, trained on a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


class Segment(NamedTuple):
    """A stretch of text: one character that stays, or an anchor that is replaced."""

    original: str
    translated: str
    anchor: str | None


def forms(anchors: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Form of an anchor, stand-in in that form, anchor."""
    for anchor, stand_in in anchors.items():
        yield anchor, stand_in, anchor
    for anchor, stand_in in anchors.items():
        yield anchor.upper(), stand_in.upper(), anchor
        if anchor.islower():
            yield anchor[0].upper() + anchor[1:], stand_in[0].upper() + stand_in[1:], anchor


def segments(text: str, anchors: Mapping[str, str]) -> list[Segment]:
    found: list[Segment] = []
    at = 0
    while at < len(text):
        best: Segment | None = None
        for form, stand_in, anchor in forms(anchors):
            pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, form.split())) + r"(?!\w)"
            match = re.compile(pattern).match(text, at)
            if match and (best is None or len(match[0]) > len(best.original)):
                best = Segment(match[0], stand_in, anchor)
        found.append(best or Segment(text[at], text[at], None))
        at += len(found[-1].original)
    return found


def token_bytes(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens of a text and the number of bytes that are read after each."""
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens, read = [], 0
    for piece in pieces:
        for token in tokenizer(piece, add_special_tokens=False)["input_ids"]:
            name = tokenizer.convert_ids_to_tokens(token)
            read += len(name.encode()) if name == "<eos>" else len(bytes(back[c] for c in name))
            tokens.append((token, read))
    return tokens


def beginnings(anchor: str, stand_in: str, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    taken = {word.lower() for word in anchor.split()} | LITTLE_WORDS
    word = next((word for word in stand_in.split() if word.lower() not in taken), None)
    found: set[int] = set()
    for form in {word, word.upper(), word[0].upper() + word[1:]} if word else ():
        for before in ("", "a "):
            tokens = token_bytes(tokenizer, [before + form])
            found.add(next(token for token, read in tokens if read > len(before)))
    return found


def labels(
    pieces: Sequence[str],
    learned: Sequence[bool],
    anchors: Mapping[str, str],
    tokenizer: PreTrainedTokenizerFast,
    base: Callable[[Sequence[int]], np.ndarray],
    reinforced: Callable[[Sequence[int]], np.ndarray],
    *,
    alpha: float,
    suppression: float,
    reference: str,
) -> dict[int, tuple[int, float]]:
    """Index of a token -> its generic label, and by how much the label's logit is above all others."""
    per_piece = [segments(piece, anchors) for piece in pieces]
    ours = token_bytes(tokenizer, pieces)
    theirs = token_bytes(tokenizer, ["".join(segment.translated for segment in piece) for piece in per_piece])
    # Corresponding places: number of bytes read of the original -> of the translation.
    places = {0: 0}
    anchored: list[tuple[int, int, str]] = []
    here = there = 0
    for segment in (segment for piece in per_piece for segment in piece):
        size, translated = len(segment.original.encode()), len(segment.translated.encode())
        if segment.anchor is None:
            places |= {here + n: there + n for n in range(size + 1)}
        else:
            anchored.append((here, here + size, segment.anchor))
            places[here + size] = there + translated
        here, there = here + size, there + translated
    holds = {
        long: {short for short in anchors if re.search(rf"(?<!\w){re.escape(short)}(?!\w)", long)}
        for long in anchors
    }
    flags = [
        flag
        for piece, flag in zip(pieces, learned, strict=True)
        for _ in tokenizer(piece, add_special_tokens=False)["input_ids"]
    ]
    v_base, v_original = base([token for token, _ in theirs]), base([token for token, _ in ours])
    v_reinforced = reinforced([token for token, _ in ours])
    found: dict[int, tuple[int, float]] = {}
    for t in range(1, len(ours)):
        start, end = ours[t - 1][1], ours[t][1]
        at = [j for j, (_, read) in enumerate(theirs) if read == places.get(start)]
        again = any(
            first < end
            and start < last
            and any(anchor in holds[earlier] for _, before, earlier in anchored if before <= first)
            for first, last, anchor in anchored
        )
        if not flags[t] or not at or again:
            continue
        compared = v_base[at[-1]] if reference == "translated" else v_original[t - 1]
        generic = np.empty(v_base.shape[1])
        for k in range(len(generic)):
            generic[k] = v_base[at[-1], k] - alpha * max(0.0, v_reinforced[t - 1, k] - compared[k])
        suppressed: set[int] = set()
        for _, last, anchor in anchored:
            if last <= start:
                for short in holds[anchor]:
                    suppressed |= beginnings(short, anchors[short], tokenizer)
        for k in suppressed:
            generic[k] -= suppression
        order = np.argsort(generic)
        found[t] = int(order[-1]), float(generic[order[-1]] - generic[order[-2]])
    return found


def exact(model: torch.nn.Module) -> Callable[[Sequence[int]], np.ndarray]:
    """The logits of a float64 model: [S, V]."""

    def predict(tokens: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(tokens)])).logits[0].numpy()

    return predict
