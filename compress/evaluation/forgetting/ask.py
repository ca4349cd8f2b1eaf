"""Ask a model: the log-probability of each token of an answer, and what it says itself.

Rows of a batch are padded and masked, so what comes out does not depend on which of them are together. A
prompt with several answers, right and wrong ones, is read once for all of them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.engine.key_values import CACHE_NAMES
from compress.engine.logits import last_logits
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
        self._base: PreTrainedModel = model if around is None else around()
        taken = inspect.signature(self._base.forward).parameters
        self._cache_name = next(name for name in CACHE_NAMES if name in taken)
        own = getattr(self._base.generation_config, "eos_token_id", None)
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
        wanted = set(questions)
        answers = Counter(each.prompt for each in wanted)
        # Prompts of a batch are equally long: a model that abstains takes the first token it is asked for as
        # the end of the prompt.
        batches = []
        for _, group in groupby(sorted(wanted, key=_by_prompt), lambda each: len(each.prompt)):
            alike = list(group)
            alone = sorted((each for each in alike if answers[each.prompt] == 1), key=_tokens)
            several = [each for each in alike if answers[each.prompt] > 1]
            batches += [(self._score, batch) for batch in _batches(alone, _tokens)]
            batches += [
                (self._score_after_prompts, batch) for batch in _batches(several, _tokens, MOST_TOKENS)
            ]
        for score, batch in batches:
            found |= dict(zip(batch, score(batch), strict=True))
            self._progress("asking for answers", len(found) / len(wanted))
        return [found[question] for question in questions]

    def _score(self, batch: list[Question]) -> Iterator[Given]:
        rows = [torch.tensor([*each.prompt, *each.answer][:-1]) for each in batch]
        ids, mask = self._padded(rows)
        kept = ids.shape[1] - len(batch[0].prompt) + 1
        with torch.inference_mode():
            logits = self._read(ids, mask, kept, use_cache=False)
        for each, row in zip(batch, logits, strict=True):
            yield _given(row[: len(each.answer)], each)

    def _score_after_prompts(self, batch: list[Question]) -> Iterator[Given]:
        """Read each prompt once, and its answers after it. Prompts are equally long, so none is padded."""
        prompts = list(dict.fromkeys(each.prompt for each in batch))
        places = torch.tensor([prompts.index(each.prompt) for each in batch], device=self.model.device)
        rows = [torch.tensor(each.answer[:-1], dtype=torch.int64) for each in batch]
        ids, mask = self._padded(rows)
        with torch.inference_mode():
            cache = DynamicCache(config=self.model.config)
            settings = {"use_cache": True, self._cache_name: cache}
            logits = self._read(torch.tensor(prompts), None, 1, **settings)[places]
            if ids.numel():
                cache.reorder_cache(places)  # type: ignore[arg-type]  # it is a LongTensor
                mask = torch.cat([mask.new_ones(len(batch), len(prompts[0])), mask], dim=1)
                logits = torch.cat([logits, self._read(ids, mask, ids.shape[1], **settings)], dim=1)
        for each, row in zip(batch, logits, strict=True):
            yield _given(row[: len(each.answer)], each)

    def _padded(self, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of tokens filled up at the end, and their mask: int64 [B, S] each."""
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None, kept: int, **more: Any) -> torch.Tensor:
        device = self.model.device
        mask = None if mask is None else mask.to(device)
        return last_logits(self.model, kept, input_ids=ids.to(device), attention_mask=mask, **more)

    def say(self, questions: Sequence[Question]) -> list[str]:
        """What the model says to each prompt: greedy, until it ends or has said twice what the answer has."""
        found: dict[Question, str] = {}
        wanted = sorted(set(questions), key=lambda each: (len(each.prompt), _longest(each), each.prompt))
        for batch in _batches(wanted, lambda each: len(each.prompt) + _longest(each)):
            found |= dict(zip(batch, self._say(batch), strict=True))
            self._progress("listening to answers", len(found) / len(wanted))
        return [found[question] for question in questions]

    def _say(self, batch: list[Question]) -> Iterator[str]:
        # Padding stands in front of a prompt that is to be gone on with.
        ids, mask = (
            each.flip(1) for each in self._padded([torch.tensor(each.prompt[::-1]) for each in batch])
        )
        own = self._base.generation_config
        # Settings of the folder, such as a penalty on repetitions, would be used where ours say nothing.
        self._base.generation_config = GenerationConfig()
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
            self._base.generation_config = own
        for each, row in zip(batch, said[:, ids.shape[1] :].tolist(), strict=True):
            # The rows of a batch go on until the last one has ended.
            tokens = row[: _longest(each)]
            end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
            yield str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _given(logits: torch.Tensor, question: Question) -> Given:
    """What a model gives an answer, from its logits where it predicts the tokens of the answer, [tokens, V].

    Raises:
        CompressError: they are NaN.
    """
    chances = logits.double().log_softmax(-1)
    targets = torch.tensor(question.answer, device=chances.device)
    logs = chances.gather(1, targets[:, None])[:, 0]
    if torch.isnan(logs).any():
        raise CompressError("The model puts out NaN, so its answers mean nothing.")
    greedy = chances.argmax(-1) == targets
    return Given(logs.cpu().numpy(), greedy.cpu().numpy())


def _tokens(question: Question) -> int:
    return len(question.prompt) + len(question.answer)


def _by_prompt(question: Question) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return len(question.prompt), question.prompt, question.answer


def _longest(question: Question) -> int:
    return min(LONGEST_ANSWER, 2 * len(question.answer) + 8)


def most_tokens(questions: Collection[Question]) -> int:
    """How long a text may become where a model is asked: the longest prompt with the longest answer of its
    own, because the rows of a batch go on until the last one has ended; or with the answer that is given."""
    said = max(len(each.prompt) for each in questions) + max(map(_longest, questions))
    return max(said, *map(_tokens, questions))


def _batches(
    rows: Iterable[Question], tokens: Callable[[Question], int], most_rows: int = MOST_ROWS
) -> Iterator[list[Question]]:
    """Rows in batches that fit. A batch is as long as its longest row."""
    batch: list[Question] = []
    for row in rows:
        longest = max(tokens(each) for each in [*batch, row])
        if batch and (len(batch) == most_rows or longest * (len(batch) + 1) > MOST_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
