"""The scorecard: the result of one evaluation of one model.

``compression.json`` keeps a list of scorecards, ``compress-model evaluate --json`` prints one, and
``compress-model compare`` puts several side by side. Every number is a :class:`Figure`, which knows its unit
and its uncertainty. Only figures turn numbers into text.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

MISSING = "–"
"""Shown in place of a figure that was not measured, which is never shown as 0."""

UnitName = Literal[
    "",
    "bits",
    "bytes",
    "flops",
    "fraction",
    "joules/token",
    "nats/token",
    "parameters",
    "questions",
    "seconds",
    "tokens/s",
]
Spread = Literal["95% interval", "interquartile range"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Unit(NamedTuple):
    """How a unit is shown: ``shown = stored * factor``, under ``heading``."""

    factor: float
    heading: str


UNITS: dict[str, Unit] = {
    "": Unit(1, ""),
    "bits": Unit(1, "bits"),
    "bytes": Unit(1e-6, "MB"),  # decimal megabytes, like download sizes; captions say so
    "flops": Unit(1e-9, "GFLOPs"),
    "fraction": Unit(100, "%"),
    "joules/token": Unit(1, "J/token"),
    "nats/token": Unit(1, "nats/token"),
    "parameters": Unit(1e-6, "M"),
    "questions": Unit(1, ""),  # counted, so shown without decimals
    "seconds": Unit(1e3, "ms"),
    "tokens/s": Unit(1, "tok/s"),
}


class Document(BaseModel):
    """Base of everything on a scorecard: unknown keys are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Document):
    """One number with its unit and, where it has one, its interval.

    Stored in base units (bytes, fractions of 1); shown in the unit of :data:`UNITS` (MB = 10^6 bytes, %).
    An exact number, or one whose uncertainty is unknown, has no interval.
    """

    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    unit: UnitName = ""
    spread: Spread = "95% interval"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval needs both ends")
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        if not low <= self.value <= high:
            raise ValueError(f"{self.value} lies outside its interval [{low}, {high}]")
        return self

    @property
    def text(self) -> str:
        """The number for people, with two digits of its uncertainty, and without the unit (see the heading).

        A confidence interval reads ``12.34 ± 0.05`` (the wider side), or ``12.34 +0.07/−0.05`` where the
        sides differ by more than 15 %; an interquartile range reads ``35.2 (34.9–35.6)``.
        """
        if self.unit == "questions":
            return _fixed(self.value, 0)
        factor = UNITS[self.unit].factor
        value = self.value * factor
        low = value if self.low is None else self.low * factor
        high = value if self.high is None else self.high * factor
        width = max(high - value, value - low)
        size = max(abs(value), width)
        # Not below -300, because 10^309 is beyond a float.
        exponent = 0 if size == 0 or 1e-4 <= size < 1e6 else max(-300, math.floor(math.log10(size)))
        value, low, high, width = (number * 10.0**-exponent for number in (value, low, high, width))
        if width <= 1e-9 * abs(value):
            exact = _fixed(value, _decimals(value, digits=4))
            return f"{exact}e{exponent}" if exponent else exact

        decimals = _decimals(width, digits=2)
        middle = _fixed(value, decimals)
        up, down = high - value, value - low
        if self.spread == "interquartile range":
            text = f"{middle} ({_fixed(low, decimals)}–{_fixed(high, decimals)})"
        elif max(up, down) <= 1.15 * min(up, down):
            text = f"{middle} ± {_fixed(width, decimals)}"
        else:
            text = f"{middle} +{_fixed(up, decimals if up else 0)}/−{_fixed(down, decimals if down else 0)}"
        return f"({text})e{exponent}" if exponent else text

    def __str__(self) -> str:
        """The text with its unit, for a sentence: ``269.1 MB``."""
        return f"{self.text} {UNITS[self.unit].heading}".rstrip()

    @property
    def cells(self) -> tuple[str, str, str]:
        """Value, low and high for a CSV file: base units, every digit, empty where there is none."""
        return _exact(self.value), _exact(self.low), _exact(self.high)


def _exact(number: float | None) -> str:
    if number is None:
        return ""
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def _decimals(number: float, *, digits: int) -> int:
    """How many decimals show this many significant digits of the number."""
    return max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0


def _fixed(number: float, decimals: int) -> str:
    return f"{number:,.{decimals}f}".replace("-", "−")


class ModelIdentity(Document):
    """A name for people, and the hash of the weights to compare models by."""

    name: str = Field(min_length=1)
    sha256: Sha256


class Protocol(Document):
    """How the text was scored. Scorecards can be compared only if these agree (the kernel may differ)."""

    text: str = Field(description="where the text comes from")
    text_sha256: Sha256
    context_tokens: PositiveInt = Field(description="length of a window")
    stride_tokens: PositiveInt = Field(description="distance between the starts of two windows")
    windows: PositiveInt
    tokens_scored: PositiveInt = Field(description="number of tokens in every mean over tokens")
    compute_dtype: str
    seed: int
    kernel: str = Field(description="the kernel of the low-bit layers")
    positions: PositiveInt | None = Field(
        None, description="tokens that the dense model was made for, where windows are longer"
    )


class Fidelity(Document):
    """How close a model is to the dense one, token by token, over ``Protocol.tokens_scored`` tokens.

    KL(dense || model) is over the full vocabulary, in nats. Means have 95 % intervals of Student's t, and the
    agreement has Wilson's, with the variance between windows, because the tokens of one window are not
    independent.
    """

    perplexity: Figure = Field(description="exp of the mean negative log-likelihood")
    perplexity_ratio: Figure = Field(
        description="perplexity divided by the dense model's on the same tokens: exp of the mean log ratio"
    )
    kl_mean: Figure
    kl_standard_error: FiniteFloat | None = Field(
        description="standard error of kl_mean, clustered by window, in nats/token"
    )
    kl_median: Figure
    kl_p99: Figure
    kl_max: Figure
    top1_agreement: Figure = Field(description="share of tokens with the same argmax")
    rms_delta_p: Figure = Field(description="root mean square change of the true token's probability")


class TaskProtocol(Document):
    """Which labelled examples were scored, and how.

    Scorecards can be compared only if these agree (the file's name and the kernel may differ).
    """

    task: Literal["sequence classification", "token classification", "question answering"]
    file: str
    file_sha256: Sha256
    examples: PositiveInt
    inputs: PositiveInt = Field(
        description="number of inputs of the model; a long context is split into several"
    )
    cut: NonNegativeInt = Field(description="number of examples whose end was cut off")
    longest_tokens: PositiveInt = Field(description="length of the longest input")
    mean_tokens: PositiveInt = Field(description="mean length of an input, for which FLOPs and latency are")
    compute_dtype: str
    kernel: str = Field(description="the kernel of the low-bit layers")


class TaskScore(Document):
    """How well a model does the task of its head, and whether it differs from the dense model.

    :mod:`compress.evaluation.task_score` describes the intervals and tests.
    """

    accuracy: Figure | None = Field(None, description="share of texts or words with the right label")
    macro_f1: Figure | None = Field(None, description="mean over the labels that occur of the F1 over words")
    exact_match: Figure | None = Field(None, description="share of right answers, normalised as in SQuAD")
    f1: Figure | None = Field(None, description="mean overlap of answers, normalised as in SQuAD")
    agreement: Figure = Field(description="share of predictions equal to the dense model's")
    gained: NonNegativeInt = Field(
        description="number of examples that are wholly right and that the dense model gets wrong"
    )
    lost: NonNegativeInt = Field(
        description="number of examples that are wrong and that the dense model gets wholly right"
    )
    mcnemar_p: Figure | None = Field(
        None, description="two-sided exact p of McNemar's test of gained against lost"
    )
    flops: Figure = Field(description="FLOPs of one input of mean length")


class TaskAsked(Document):
    """One task of the harness: which questions were asked, and how."""

    task: str = Field(min_length=1, description="its name in lm-eval")
    sha256: Sha256 = Field(description="hash of its prompts and right answers, in order")
    questions: PositiveInt
    fewshot: NonNegativeInt = Field(description="number of examples in front of each question")
    metric: str = Field(description="what decides: a question's score is between 0 and 1, and more is better")
    chance: FiniteFloat | None = Field(None, description="score of a guess, where the task has one")


class HarnessProtocol(Document):
    """How the tasks were asked. Scorecards can be compared task by task where these agree (the kernel may
    differ)."""

    suite: str | None = Field(description="name of the suite, or None where tasks were named one by one")
    tasks: tuple[TaskAsked, ...] = Field(min_length=1)
    chat_template: bool
    seed: int
    lm_eval: str = Field(description="version of the harness")
    kernel: str = Field(description="the kernel of the low-bit layers")
    compute_dtype: str | None = Field(None, description="dtype of activations, if it is known")


class Judged(Document):
    """What a local model says of the answers to a task beside the dense model's, each pair in both orders."""

    judge: str = Field(description="sha256 of the judge's weights")
    wins: NonNegativeInt = Field(description="answers that are preferred in both orders")
    losses: NonNegativeInt = Field(description="answers where the dense model's is preferred in both orders")
    ties: NonNegativeInt
    unread: NonNegativeInt = Field(
        description="questions with a reply that names no verdict, which do not count"
    )
    score: Figure | None = Field(description="share of the answers that are preferred, where a tie is a half")
    p: Figure = Field(description="two-sided p of the sign test: wins against losses")


class TaskResult(Document):
    """How one model answered one task, and how that differs from the dense model's answers.

    The fields after ``others`` are None on the dense model's own scorecard. ``compress.evaluation.pairs``
    describes the intervals and tests.
    """

    task: str
    score: Figure = Field(description="mean score of a question")
    others: dict[str, Figure] = Field(default_factory=dict, description="further metrics, by name")
    change: Figure | None = Field(None, description="score minus the dense model's on the same questions")
    standard_error: FiniteFloat | None = Field(None, description="paired standard error of the change")
    flips: Figure | None = Field(
        None, description="share of questions answered right by only one of the two: how much changed"
    )
    lost: NonNegativeInt | None = Field(None, description="harmful flips: right before, wrong now")
    gained: NonNegativeInt | None = Field(None, description="lucky flips: wrong before, right now")
    p: Figure | None = Field(None, description="two-sided p that the scores differ")
    holm_p: Figure | None = Field(None, description="the same, corrected for the number of tasks (Holm)")
    matching: bool | None = Field(None, description="LLM-KICK's matching: a drop of at most 5 % of the score")
    judged: Judged | None = Field(None, description="what a judge says, where one was asked")


class Verdict(Document):
    """One sentence over all tasks, and the numbers behind it."""

    kind: Literal["worse", "not worse", "undecided"]
    margin: FiniteFloat = Field(description="the loss that does not matter, as a share of all questions")
    change: Figure = Field(description="pooled score minus the dense model's")
    worse_p: Figure = Field(
        description="one-sided p that the model is worse: the smallest of three tests, corrected for three"
    )
    margin_p: Figure = Field(description="one-sided p that it is not worse by more than the margin")
    questions: PositiveInt = Field(description="number of questions in all tasks")
    needed: PositiveInt | None = Field(None, description="how many questions would decide, if undecided")
    sentence: str
    standard_error: FiniteFloat | None = Field(None, description="paired standard error of the change")
    pooled_p: Figure | None = Field(None, description="one-sided p that it is worse: all questions together")
    max_drop_p: Figure | None = Field(None, description="the same: the task with the largest loss")
    fisher_p: Figure | None = Field(None, description="the same: Fisher's combination of the tasks")
    broken: tuple[str, ...] = Field(
        (), description="tasks that lose more than the margin beyond doubt, corrected for their number (Holm)"
    )


class Shared(Document):
    """Two tasks that ask about the same documents, so that their answers are not independent."""

    tasks: tuple[str, str]
    documents: PositiveInt = Field(description="number of documents that both ask about")
    covariance: FiniteFloat = Field(description="covariance of the changes of the two")


class Harness(Document):
    """The answers to all tasks, the verdict against the dense model, and what makes the numbers doubtful."""

    tasks: tuple[TaskResult, ...] = Field(min_length=1)
    verdict: Verdict | None = Field(None, description="None on the dense model's own scorecard")
    shared: tuple[Shared, ...] = Field((), description="tasks whose answers are not independent")
    warnings: tuple[str, ...] = ()


class Measurement(Document):
    """Speed and memory of a model that is alone in a fresh process, at batch size 1."""

    peak_resident_bytes: PositiveInt = Field(description="largest resident set, libraries included")
    baseline_resident_bytes: PositiveInt = Field(description="the same before the model was loaded")
    peak_device_bytes: NonNegativeInt | None = Field(None, description="most bytes allocated on a GPU")
    prefill: Figure = Field(description="median over the repetitions, with their interquartile range")
    prefill_tokens: PositiveInt = Field(description="length of the prompt that was timed")
    prefill_repetitions: PositiveInt
    decode: Figure | None = Field(
        None, description="greedy decoding with a key-value cache; none for encoders"
    )
    decode_tokens: PositiveInt | None = Field(None, description="tokens generated in each repetition")
    decode_repetitions: PositiveInt | None = None
    decode_energy: Figure | None = Field(
        None, description="of processor and memory, with all that ran beside; None where the machine hides it"
    )
    threads: PositiveInt
    device: str = Field(description="name of the processor or GPU")
    kernel: str
    storage_dtype: str = Field(description="dtypes of the weights in memory, largest share first")

    @property
    def latency(self) -> Figure:
        """Seconds of one forward pass over ``prefill_tokens``."""
        rate = self.prefill
        low, high = (None if end is None else self.prefill_tokens / end for end in (rate.high, rate.low))
        value = self.prefill_tokens / rate.value
        return Figure(value=value, low=low, high=high, unit="seconds", spread=rate.spread)

    @property
    def peak_memory(self) -> Figure:
        return Figure(value=self.peak_resident_bytes, unit="bytes")

    @property
    def peak_device_memory(self) -> Figure | None:
        """None on a CPU."""
        return None if self.peak_device_bytes is None else Figure(value=self.peak_device_bytes, unit="bytes")

    @property
    def added_memory(self) -> Figure:
        """The memory that the model adds to an interpreter with its libraries imported."""
        return Figure(value=max(0, self.peak_resident_bytes - self.baseline_resident_bytes), unit="bytes")


class Cost(Document):
    """What a model costs: bytes, parameters, and (if measured) speed and memory."""

    weight_bytes: PositiveInt = Field(description="size of the weight files on disk")
    parameters: PositiveInt = Field(description="number of weights, however many bits each of them takes")
    measured: Measurement | None = None

    @property
    def size(self) -> Figure:
        return Figure(value=self.weight_bytes, unit="bytes")

    @property
    def parameter_count(self) -> Figure:
        return Figure(value=self.parameters, unit="parameters")

    @property
    def bits_per_parameter(self) -> Figure:
        """The effective bits: the bytes include scales, zero points and layers that are not quantized."""
        return Figure(value=8 * self.weight_bytes / self.parameters, unit="bits")


class Scorecard(Document):
    """One evaluation of one model.

    ``protocol`` and ``fidelity`` are None if no text was scored, ``task_protocol`` and ``task`` if no
    labelled file was, and ``harness_protocol`` and ``harness`` if no task of lm-eval was.
    """

    schema_version: Literal[1] = 1
    model: ModelIdentity
    baseline: ModelIdentity = Field(description="the dense model; the model itself if it is the dense one")
    loads_with: str | None = Field(None, description="the software that can load the model")
    protocol: Protocol | None = None
    fidelity: Fidelity | None = None
    task_protocol: TaskProtocol | None = None
    task: TaskScore | None = None
    harness_protocol: HarnessProtocol | None = None
    harness: Harness | None = None
    cost: Cost
    when: AwareDatetime
    versions: dict[str, str]

    @model_validator(mode="after")
    def _scores_have_their_protocols(self) -> Self:
        if (self.protocol is None) != (self.fidelity is None):
            raise ValueError("fidelity and protocol come together")
        if (self.task_protocol is None) != (self.task is None):
            raise ValueError("task and task_protocol come together")
        if (self.harness_protocol is None) != (self.harness is None):
            raise ValueError("harness and harness_protocol come together")
        return self

    @property
    def is_dense(self) -> bool:
        """Whether this is the scorecard of the baseline itself."""
        return self.model.sha256 == self.baseline.sha256
