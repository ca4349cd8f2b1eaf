"""A model as lm-eval asks it: lm-eval's own `HFLM` around the model that ``compress.load`` gives.

lm-eval makes the prompts and tokens, generates, and cuts long texts into windows. Here a model answers from
memory where it can, logits are computed only where they are scored, and a batch has as many rows as fit.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compress.errors import BadInput, CompressError
from compress.evaluation.harness.cache import Requests
from compress.evaluation.harness.prefix import Prefix

MOST = {"cpu": (16, 2048), "cuda": (64, 16384)}
"""Rows and tokens of the largest batch; up to 16 rows decode natively."""

Tokens = tuple[int, ...]


class Scored(NamedTuple):
    """One request: the tokens of a continuation are scored behind those of a context."""

    text: tuple[str, str] | None
    context: list[int]
    continuation: list[int]


class Asked(HFLM):
    """A model that answers the requests of lm-eval, and remembers its answers.

    Args:
        model: on its device.
        tokenizer: of the model.
        batch_size: rows of a batch, or ``auto``.
        requests: what it has answered before.
        answered: called after each answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str,
        requests: Requests,
        answered: Callable[[], None],
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._requests, self._answered = requests, answered
        self._longest = 1
        self._prefix: Prefix | None = None
        self._skips_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache_hook: Any = self

    @property
    def config(self) -> PretrainedConfig:
        """Without the section on quantization: lm-eval looks its method up among those of transformers."""
        config = copy.copy(self._config)
        vars(config).pop("quantization_config", None)
        return config

    def get_model_info(self) -> dict[str, Any]:
        """Nothing, because lm-eval asks the hub for it."""
        return {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._with_remembered("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        ask = super().loglikelihood_rolling

        def one_by_one(requests: list[Any], **_: bool) -> list[Any]:  # lm-eval tells all answers at the end
            return [answer for request in requests for answer in ask([request], disable_tqdm=True)]

        return self._with_remembered("loglikelihood_rolling", requests, one_by_one)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        ask = super().generate_until

        def with_prefix(requests: list[Any], **_: bool) -> list[Any]:
            self._prefix = Prefix.of(self.model, [self.tok_encode(request.args[0]) for request in requests])
            try:
                return ask(requests, disable_tqdm=True)
            finally:
                self._prefix = None

        return self._with_remembered("generate_until", requests, with_prefix)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Generate; each row ends at the tokenizer's end of text, also where the model's settings name none.

        lm-eval goes on with such a row until the whole batch has ended, and takes what it says after its end
        for a part of the answer.
        """
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.eot_token_id} - {None}
        if ends:
            settings["eos_token_id"] = sorted(ends)
        settings["logits_processor"] = LogitsProcessorList([RefuseNaN()])
        moved = self._prefix and self._prefix.put_first(context, settings["attention_mask"])
        if moved:
            context = moved.pop("input_ids")
            settings |= moved
        with torch.inference_mode():
            return super()._model_generate(context, max_length, stop, **settings)

    def _with_remembered(self, kind: str, requests: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        """The answers to all requests, of which only those are asked that are not remembered."""
        known = [None if _is_random(request.args) else self._find(kind, request.args) for request in requests]
        asked = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        self._longest = max((self._length(*request.args) for request in asked), default=1)
        fresh = iter(ask(asked, disable_tqdm=True) if asked else [])
        return [next(fresh) if answer is None else answer for answer in known]

    def is_cut(self, request: Any) -> bool:
        """Whether the beginning of a request is cut off; a text that has no question becomes windows."""
        if len(request) < 2:
            return False
        prompt, answer = request
        if isinstance(answer, dict):
            return len(self.tok_encode(prompt)) > self.max_length - self._most_generated(answer)
        return len(self.tok_encode(prompt + answer)) > self.max_length + 1  # the last token is not read

    def _most_generated(self, settings: dict[str, Any]) -> int:
        return int(settings.get("max_gen_toks") or self.max_gen_toks)

    def _length(self, prompt: str, settings: Any = None) -> int:
        """Tokens of a prompt with its answer."""
        answer = self._most_generated(settings) if isinstance(settings, dict) else 0
        if answer >= self.max_length:
            raise BadInput(
                f"An answer may have {answer} tokens, and the model takes only {self.max_length} with the "
                "question; lower max_gen_toks in the task's file."
            )
        return min(self.max_length, len(self.tok_encode(prompt)) + answer)

    def _find(self, kind: str, request: Any) -> Any:
        answer = self._requests.find(kind, request)
        if answer is not None:
            self._answered()
        return tuple(answer) if isinstance(answer, list) else answer

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Remember an answer: lm-eval calls this after each of them."""
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):
            raise _nan()
        if not _is_random(request):
            self._requests.keep(kind, request, answer)
        self._answered()

    def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what greedy decoding would say.

        Requests that differ in their last token only share a row, such as the letters of a multiple choice.
        """
        scored = [Scored(*request) for request in requests]
        rows: dict[Tokens, list[int]] = {}
        for index, request in enumerate(scored):
            rows.setdefault(self._input(request), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(sorted(rows, key=lambda row: (-len(row), row))):
            longest = [max(len(scored[index].continuation) for index in rows[row]) for row in batch]
            for row, logits in zip(batch, self._last_logits(batch, longest), strict=True):
                for index in rows[row]:
                    answers[index] = self._score(scored[index], logits)
        return [answers[index] for index in range(len(scored))]

    def _input(self, request: Scored) -> Tokens:
        """What the model reads: all but the last token, cut off from the left where it is too long."""
        if len(request.continuation) > self.max_length:
            raise BadInput(
                f"A continuation has {len(request.continuation)} tokens, and the model takes only "
                f"{self.max_length}."
            )
        whole = request.context + request.continuation
        return tuple(whole[-(self.max_length + 1) : -1])

    def _batches(self, rows: list[Tokens]) -> Iterator[list[Tokens]]:
        """Rows in batches that fit, the longest first."""
        while rows:
            count = self.batch_size if isinstance(self.batch_size, int) else self._most_rows(len(rows[0]))
            yield rows[:count]
            rows = rows[count:]

    def _last_logits(self, batch: list[Tokens], wanted: list[int]) -> Iterator[Tensor]:
        """The logits [wanted, vocabulary] at the last positions of each row, in float32.

        Rows are padded on the right, where no earlier position sees it.
        """
        width = len(batch[0])
        first = min(len(row) - count for row, count in zip(batch, wanted, strict=True))
        ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(self.device)
        settings = {"logits_to_keep": width - first} if self._skips_logits else {}
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False, **settings).logits[:, -(width - first) :]
        for row, count, found in zip(batch, wanted, logits, strict=True):
            end = len(row) - first
            yield found[end - count : end].float()

    def _score(self, request: Scored, logits: Tensor) -> tuple[float, bool]:
        targets = torch.tensor(request.continuation, device=logits.device)
        chances = logits[-len(targets) :].log_softmax(-1)
        likelihood = chances.gather(1, targets[:, None]).sum()
        answer = float(likelihood), bool((chances.argmax(-1) == targets).all())
        if request.text is not None:  # a window of a longer text has none
            self.add_partial("loglikelihood", request.text, answer)
        return answer

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Rows of a batch of the current requests, where lm-eval would try how many fit."""
        return self._most_rows(self._longest)

    def _most_rows(self, tokens: int) -> int:
        rows, room = MOST.get(self.device.type, MOST["cpu"])
        return max(1, min(rows, room // tokens))


class RefuseNaN(LogitsProcessor):
    """Stops a model that generates from NaN, of which greedy decoding would make an answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise _nan()
        return scores


def _nan() -> CompressError:
    return CompressError("The model puts out NaN, so its answers mean nothing.")


def _is_random(request: Any) -> bool:
    """Whether the answer to a request is drawn at random, so that it is not remembered."""
    settings = request[1] if len(request) > 1 else None
    return isinstance(settings, dict) and bool(settings.get("do_sample", False))
