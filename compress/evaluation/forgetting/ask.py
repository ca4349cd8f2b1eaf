"""Ask a model: the log-probability of each token of an answer, and what it says itself.

Rows of a batch are padded and masked, so what comes out does not depend on which of them are together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import CompressError
from compress.evaluation.forgetting.items import Question
from compress.evaluation.forgetting.metrics import Bools, Floats
from compress.system.progress import Progress

MOST_ROWS, MOST_TOKENS = 16, 2048
"""Size of the largest batch."""

LONGEST_ANSWER = 128
"""New tokens at most, and twice as many as the answer has, with a few more."""


class Given(NamedTuple):
    """What a model gives the tokens of an answer: log-probabilities, float64, and whether each is its own."""

    logs: Floats
    greedy: Bools


class Asked:
    """A model that is asked.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: of the model.
        progress: told the share of the questions that are answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress = lambda text, share: None,
    ) -> None:
        self.model, self.tokenizer, self._progress = model, tokenizer, progress
        # A model with low-rank updates of peft stands around the one that it was.
        around: Any = getattr(model, "get_base_model", None)
        base = model if around is None else around()
        self._skips_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        own = getattr(model.generation_config, "eos_token_id", None)
        ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        self._ends = sorted(ends)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else (self._ends[0] if self._ends else 0)

    def score(self, questions: Sequence[Question]) -> list[Given]:
        """Teacher forcing: what the model gives the tokens of each answer.

        Raises:
            CompressError: the model puts out NaN.
        """
        found: dict[Question, Given] = {}
        wanted = sorted(set(questions), key=lambda each: (len(each.prompt) + len(each.answer), each.prompt))
        for batch in _batches(wanted, lambda each: len(each.prompt) + len(each.answer)):
            found |= dict(zip(batch, self._score(batch), strict=True))
            self._progress("asking for answers", len(found) / len(wanted))
        return [found[question] for question in questions]

    def _score(self, batch: list[Question]) -> Iterator[Given]:
        rows = [torch.tensor([*each.prompt, *each.answer][:-1]) for each in batch]
        first = min(len(each.prompt) for each in batch) - 1
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        kept = ids.shape[1] - first
        settings = {"logits_to_keep": kept} if self._skips_logits else {}
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **settings
            ).logits[:, -kept:]
        for each, row in zip(batch, logits, strict=True):
            start = len(each.prompt) - 1 - first
            chances = row[start : start + len(each.answer)].double().log_softmax(-1)
            targets = torch.tensor(each.answer, device=chances.device)
            logs = chances.gather(1, targets[:, None])[:, 0]
            if torch.isnan(logs).any():
                raise CompressError("The model puts out NaN, so its answers mean nothing.")
            greedy = chances.argmax(-1) == targets
            yield Given(logs.cpu().numpy(), greedy.cpu().numpy())

    def say(self, questions: Sequence[Question]) -> list[str]:
        """What the model says to each prompt: greedy, until it ends or has said twice what the answer has."""
        found: dict[Question, str] = {}
        wanted = sorted(set(questions), key=lambda each: (len(each.prompt), _longest(each), each.prompt))
        for batch in _batches(wanted, lambda each: len(each.prompt) + _longest(each)):
            found |= dict(zip(batch, self._say(batch), strict=True))
            self._progress("listening to answers", len(found) / len(wanted))
        return [found[question] for question in questions]

    def _say(self, batch: list[Question]) -> Iterator[str]:
        rows = [torch.tensor(each.prompt[::-1]) for each in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad).flip(1)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
        own = self.model.generation_config
        # Settings of the folder, such as a penalty on repetitions, would be used where ours say nothing.
        self.model.generation_config = GenerationConfig()
        try:
            with torch.inference_mode():
                generate: Any = self.model.generate
                said = generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    max_new_tokens=max(map(_longest, batch)),
                    do_sample=False,
                    eos_token_id=self._ends or None,
                    pad_token_id=self._pad,
                )
        finally:
            self.model.generation_config = own
        for each, row in zip(batch, said[:, ids.shape[1] :].tolist(), strict=True):
            # The rows of a batch go on until the last one has ended.
            tokens = row[: _longest(each)]
            end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
            yield str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _longest(question: Question) -> int:
    return min(LONGEST_ANSWER, 2 * len(question.answer) + 8)


def _batches(rows: list[Question], tokens: object) -> Iterator[list[Question]]:
    """Rows in batches that fit. A batch is as long as its longest row."""
    assert callable(tokens)
    batch: list[Question] = []
    for row in rows:
        longest = max(tokens(each) for each in [*batch, row])
        if batch and (len(batch) == MOST_ROWS or longest * (len(batch) + 1) > MOST_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
