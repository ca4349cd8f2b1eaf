"""A local model that judges which of two answers is better; optional, for tasks that have no right answer.

Judges prefer what they read first (Zheng et al. 2023, arXiv:2306.05685), so every pair is shown in both
orders, and an answer wins only if it wins in both; anything else is a tie. Replies that name no verdict
are counted, not guessed, and take no part. The judge is pinned by its hash, and may not be of the family it
judges, since models prefer their like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from compress.errors import BadInput
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

Outcome = Literal["win", "loss", "tie", "unread"]

Reply = Callable[[Sequence[str]], Sequence[str]]
"""Gives the judge's reply to each prompt."""


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a model's answers beside the dense model's.

    Attributes:
        outcomes: of each question, for the model; "unread" where a reply named no verdict.
        judge: sha256 of the judge's weights.
    """

    outcomes: tuple[Outcome, ...]
    judge: str

    @property
    def unread(self) -> float:
        """Share of the questions with a reply that could not be parsed."""
        return self.outcomes.count("unread") / len(self.outcomes)

    @property
    def scores(self) -> np.ndarray:
        """1 for a win, 0.5 for a tie, 0 for a loss; float64 [questions that were read]."""
        worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
        return np.array([worth[outcome] for outcome in self.outcomes if outcome != "unread"])


def judge(
    questions: Sequence[str], dense: Sequence[str], model: Sequence[str], reply: Reply, sha256: str
) -> Judgement:
    """Compare the answers of a model with the dense model's, question by question.

    Args:
        questions: as the models saw them.
        dense: the dense model's answers.
        model: the model's answers.
        reply: the judge.
        sha256: of the judge's weights.

    Raises:
        BadInput: there is no question, or the numbers of questions and answers differ.
    """
    if not len(questions) == len(dense) == len(model) or not questions:
        raise BadInput(
            f"{len(questions)} questions with {len(dense)} and {len(model)} answers cannot be judged."
        )
    pairs = list(zip(questions, dense, model, strict=True))
    prompts = [PROMPT.format(question=asked, first=one, second=other) for asked, one, other in pairs]
    prompts += [PROMPT.format(question=asked, first=other, second=one) for asked, one, other in pairs]
    verdicts = [verdict(text) for text in reply(prompts)]
    halves = zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)
    return Judgement(tuple(_outcome(there, back) for there, back in halves), sha256)


def verdict(text: str) -> str | None:
    """A, B or C, if a reply names exactly one of them."""
    named = set(VERDICT.findall(text))
    return named.pop() if len(named) == 1 else None


def local_judge(folder: Path, sha256: str, evaluated: Sequence[Path], batch_size: int = 4) -> Reply:
    """A judge from a folder, which answers greedily.

    Args:
        folder: of the judge, in Hugging Face's layout.
        sha256: what its weights have to be.
        evaluated: folders of the models it will judge.
        batch_size: prompts at a time.

    Raises:
        BadInput: the judge is another one than expected, or of the family of a model that is judged.
    """
    found = Checkpoint.open(folder).sha256
    if found != sha256:
        raise BadInput(f"The judge in '{folder}' has the hash {found[:16]}..., expected {sha256[:16]}...")
    for other in evaluated:
        if family(folder) == family(other):
            raise BadInput(
                f"The judge in '{folder}' is of the family {family(folder)}, as is '{other}'; models prefer "
                "answers of their like, so choose a judge of another family."
            )
    return _replies(folder, batch_size)


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


def _replies(folder: Path, batch_size: int) -> Reply:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def reply(prompts: Sequence[str]) -> list[str]:
        said: list[str] = []
        for start in range(0, len(prompts), batch_size):
            texts = [_chat(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            output = model.generate(**inputs, max_new_tokens=REPLY_TOKENS, do_sample=False)
            said += tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return said

    return reply
