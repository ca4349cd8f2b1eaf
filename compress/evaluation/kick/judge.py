"""A local model that judges which of two answers is better; optional, for tasks that have no right answer.

Judges prefer what they read first (Zheng et al. 2023, arXiv:2306.05685), so every pair is shown in both
orders, and an answer wins only if it wins in both; anything else is a tie. Replies that name no verdict
are counted, not guessed, and take no part. A judge is known by the hash of its weights, and may not be of
the family it judges, since models prefer their like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from compress.engine.loading import load
from compress.engine.skeleton import longest_input
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.evaluation.pairs import mean
from compress.report.scorecard import Figure, Judged
from compress.storage.checkpoint import Checkpoint, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = """Two assistants answered the question of a user. Decide which answer is better: more helpful, \
more correct, and to the point. Longer is not better, and the order means nothing. Reply with [[A]] if the \
first is better, [[B]] if the second is better, or [[C]] if they are equally good, and with nothing else.

[Question]
{question}

[Answer of assistant A]
{first}

[Answer of assistant B]
{second}

Verdict:"""

VERDICT = re.compile(r"\[\[([ABC])\]\]")
REPLY_TOKENS = 8

BATCH = 4
"""Prompts that the judge reads at once."""

Outcome = Literal["win", "loss", "tie", "unread"]


class Judge(Protocol):
    """Replies to prompts, and is known by the hash of its weights."""

    @property
    def sha256(self) -> str: ...

    def __call__(self, prompts: Sequence[str]) -> Sequence[str]: ...


def compared(
    questions: Sequence[str], dense: Sequence[str], model: Sequence[str], judge: Judge, seed: int
) -> Judged:
    """Let a judge compare the answers of a model with the dense model's, question by question.

    Args:
        questions: as the models saw them.
        dense: the dense model's answers.
        model: the model's answers.
        judge: it sees every pair in both orders.
        seed: of the bootstrap.

    Returns:
        The counts, with the share of the answers that is preferred and the p of a sign test.

    Raises:
        BadInput: there is no question, or the numbers of questions and answers differ.
    """
    from scipy.stats import binomtest

    found = outcomes(questions, dense, model, judge)
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    scores = np.array([worth[outcome] for outcome in found if outcome in worth])
    wins, losses = found.count("win"), found.count("loss")
    return Judged(
        judge=judge.sha256,
        wins=wins,
        losses=losses,
        ties=found.count("tie"),
        unread=found.count("unread"),
        score=mean(scores, seed) if len(scores) else None,
        p=Figure(value=binomtest(wins, wins + losses).pvalue if wins + losses else 1.0),
    )


def outcomes(
    questions: Sequence[str], dense: Sequence[str], model: Sequence[str], judge: Judge
) -> list[Outcome]:
    """What becomes of each answer of the model. Arguments and errors are those of `compared`."""
    if not len(questions) == len(dense) == len(model) or not questions:
        raise BadInput(
            f"{len(questions)} questions with {len(dense)} and {len(model)} answers cannot be judged."
        )
    pairs = list(zip(questions, dense, model, strict=True))
    prompts = [PROMPT.format(question=asked, first=one, second=other) for asked, one, other in pairs]
    prompts += [PROMPT.format(question=asked, first=other, second=one) for asked, one, other in pairs]
    verdicts = [verdict(text) for text in judge(prompts)]
    halves = zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)
    return [_outcome(there, back) for there, back in halves]


def verdict(text: str) -> str | None:
    """A, B or C, if a reply names exactly one of them."""
    named = set(VERDICT.findall(text))
    return named.pop() if len(named) == 1 else None


class LocalJudge:
    """A judge from a folder, which answers greedily and is loaded when it is asked first.

    Args:
        folder: of the judge, in Hugging Face's layout.
        evaluated: folders of the models it will judge.
        device: where to run it.
        progress: called with the share of the prompts that are answered.
        batch_size: prompts that it reads at once.

    Raises:
        BadInput: it is no checkpoint, or it is of the family of a model that is judged; or, from a call, a
            prompt is too long for it.
    """

    def __init__(
        self,
        folder: Path,
        evaluated: Sequence[Path],
        device: str = "cpu",
        progress: Callable[[float], None] = lambda share: None,
        batch_size: int = BATCH,
    ) -> None:
        self._folder, self._device, self._progress, self._batch_size = folder, device, progress, batch_size
        self.sha256 = Checkpoint.open(folder).sha256
        for other in evaluated:
            if family(folder) == family(other):
                raise BadInput(
                    f"The judge in '{folder}' is of the family {family(folder)}, as is '{other}'; models "
                    "prefer answers of their like, so choose a judge of another family."
                )

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        said: list[str] = []
        for start in range(0, len(prompts), self._batch_size):
            self._progress(start / len(prompts))
            said += self._said(prompts[start : start + self._batch_size])
        self._progress(1.0)
        return said

    def _said(self, prompts: Sequence[str]) -> list[str]:
        tokenizer, model = self._loaded
        texts = [_chat(tokenizer, prompt) for prompt in prompts]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        length, longest = inputs["input_ids"].shape[1] + REPLY_TOKENS, longest_input(model)
        if length > longest:
            raise BadInput(
                f"The judge in '{self._folder}' takes only {longest} tokens, and a prompt with its reply has "
                f"{length}; choose a judge that takes more."
            )
        with torch.inference_mode():
            output = model.generate(**inputs.to(self._device), max_new_tokens=REPLY_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(new, skip_special_tokens=True))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load(self._folder, self._device), load_tokenizer(self._folder)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, model.eval()


def family(folder: Path) -> str:
    """The kind of a model, which its config names ``model_type``."""
    return str(read_config(folder).get("model_type"))


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt in the judge's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return prompt
    said = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def _outcome(there: str | None, back: str | None) -> Outcome:
    """The model is B in the first order and A in the second."""
    if there is None or back is None:
        return "unread"
    if (there, back) == ("B", "A"):
        return "win"
    return "loss" if (there, back) == ("A", "B") else "tie"
