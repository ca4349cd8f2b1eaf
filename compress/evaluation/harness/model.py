"""A model as lm-eval asks it: lm-eval's own `HFLM` around the model that `compress.load` gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import CompressError
from compress.evaluation.harness.cache import Requests

ROWS = 16
"""Most rows of a batch on a CPU; up to so many decode natively."""

TOKENS = 2048
"""Most tokens of a batch on a CPU, with padding: more are no faster, and take memory for their logits."""


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
        self._longest = 1
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._requests, self._answered = requests, answered
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
        return self._with_remembered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        return self._with_remembered("generate_until", requests, super().generate_until)

    def _with_remembered(self, kind: str, requests: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        """The answers to all requests, of which only those are asked that are not remembered."""
        known = [None if _is_random(request.args) else self._find(kind, request) for request in requests]
        asked = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        self._longest = max((len(self.tok_encode(request.args[0])) for request in asked), default=1)
        fresh = iter(ask(asked, disable_tqdm=True) if asked else [])
        return [next(fresh) if answer is None else answer for answer in known]

    def _find(self, kind: str, request: Any) -> Any:
        answer = self._requests.find(kind, request.args)
        if answer is not None:
            self._answered()
        return tuple(answer) if isinstance(answer, list) else answer

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Remember an answer: lm-eval calls this after each of them."""
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and math.isnan(value):
            raise CompressError("The model puts out NaN, so its answers mean nothing.")
        if not _is_random(request):
            self._requests.keep(kind, request, answer)
        self._answered()

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Any]:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        if self.device.type != "cpu":
            return int(super()._batch_scheduler(pos, n_reordered_requests))
        _, context, continuation = n_reordered_requests[pos]
        return self._rows(len(context) + len(continuation))

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return int(super()._detect_batch_size(requests, pos))
        return self._rows(self._longest)

    def _rows(self, tokens: int) -> int:
        """Rows of a batch on a CPU, whose memory lm-eval cannot try out, since it ends where it is short."""
        return max(1, min(ROWS, TOKENS // min(tokens, self.max_length)))


def _is_random(request: Any) -> bool:
    """Whether the answer to a request is drawn at random, so that it is not remembered."""
    settings = request[1] if len(request) > 1 else None
    return isinstance(settings, dict) and bool(settings.get("do_sample", False))
