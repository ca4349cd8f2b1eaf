"""The floor where there is no retrained model: what somebody who does not know would score.

The wrong answers are of the right type, so they tell how often a guess looks right: how many of its words are
the answer's, and how likely such an answer is to the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from compress.evaluation.forgetting.items import Item, given_of, words_of
from compress.evaluation.forgetting.known import MEMBERSHIP, WAYS, Known
from compress.evaluation.forgetting.metrics import Floats, exact_memorisation, extraction_strength
from compress.evaluation.forgetting.words import rouge_recall


def chance(
    items: Sequence[Item], target: Sequence[Known], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Floats]:
    """The columns of a model that guesses, float64 [N]; NaN for a record without wrong answers.

    Args:
        items: the records.
        target: what the target knows of them, which says how likely its wrong answers are.
        tokenizer: of the models.
    """
    rows = [_guess(item, known, tokenizer) for item, known in zip(items, target, strict=True)]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in (*WAYS, MEMBERSHIP)}


def _guess(item: Item, target: Known, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    if not item.wrong:
        return dict.fromkeys((*WAYS, MEMBERSHIP), np.nan)

    def overlap(start: int) -> float:
        rest = words_of(item.asked.answer[start:], tokenizer)
        others = [words_of(other.answer[start:], tokenizer) for other in item.wrong]
        return float(np.mean([rouge_recall(rest, other) for other in others]))

    alike = [_alike(item.asked.answer, other.answer) for other in item.wrong]
    return {
        "probability": np.nan if target.wrong_probability is None else target.wrong_probability,
        "rouge": overlap(0),
        "extraction": float(np.mean([extraction_strength(same) for same in alike])),
        "memorisation": float(np.mean([exact_memorisation(same) for same in alike])),
        "truth": 0.5,
        "choice": 1 / (1 + len(item.wrong)),
        "paraphrase": overlap(0) if item.rephrased else np.nan,
        "prefilled": overlap(given_of(item.asked)) if item.begun else np.nan,
        MEMBERSHIP: 0.5,
    }


def _alike(answer: Sequence[int], other: Sequence[int]) -> np.ndarray:
    """Which tokens of an answer another one has in the same place."""
    return np.array([place < len(other) and other[place] == token for place, token in enumerate(answer)])
