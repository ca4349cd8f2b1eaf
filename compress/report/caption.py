"""The sentences below a comparison: what its numbers mean, how they were made, and what to doubt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.report.asked import Difference
from compress.report.choose import short
from compress.report.columns import ALL_TASKS, FORGETTING, printable
from compress.report.forgetting import Forgetting
from compress.report.scorecard import Figure, Judged, Scorecard, TaskAsked


def caption(
    cards: list[Scorecard], dense: Scorecard | None, audits: Sequence[Forgetting | None]
) -> list[str]:
    """Sentences that say what the numbers mean and how they were made."""
    lines = _text_caption(cards) + _examples_caption(cards) + _tasks_caption(cards)
    if audit := next(filter(None, audits), None):
        lines.append(_audit_caption(audit))
    lines.append(
        "MB = 10^6 bytes. Size is the size of the weight files; bits per parameter = 8 × size ÷ the model's "
        "own parameters."
        + ("" if dense else " Sizes have no ratio, because no scorecard of the dense model was given.")
    )
    return lines + _machine_caption(cards)


def _text_caption(cards: list[Scorecard]) -> list[str]:
    lines: list[str] = []
    scored, protocol = next(((card, card.protocol) for card in cards if card.protocol), (None, None))
    if scored and protocol:
        lines.append(
            f"Text: {printable(protocol.text)} (sha256 {short(protocol.text_sha256)}), {protocol.windows:,} "
            f"windows of {protocol.context_tokens:,} tokens with stride {protocol.stride_tokens:,}; "
            f"{protocol.tokens_scored:,} tokens were scored in {protocol.compute_dtype}, with seed "
            f"{protocol.seed}."
        )
        if protocol.positions is not None:
            lines.append(
                f"The windows are longer than the {protocol.positions:,} tokens that the dense model was "
                "made for, so the figures say little about it."
            )
        lines.append(
            f"{_dense(scored)} "
            "Perplexity ratio, KL(dense ‖ model) over the full vocabulary and top-1 agreement compare each "
            "model with it token by token."
        )
        lines.append(
            "± is a 95 % interval (its wider side) clustered by window: Student's t, which is paired for the "
            "ratio, and Wilson's interval for the agreement."
        )
    return lines


def _machine_caption(cards: list[Scorecard]) -> list[str]:
    lines: list[str] = []
    measured = [card.cost.measured for card in cards if card.cost.measured]
    if measured:
        before = sorted(m.baseline_resident_bytes for m in measured)
        lines.append(
            "Peak memory is the resident set of a fresh process, with interpreter and libraries, which take "
            f"{_range(Figure(value=size, unit='bytes').text for size in before)} MB before the model "
            "is loaded."
        )
        machines = machines_of(cards)
        prefill = _range(f"{n:,}" for n in sorted(m.prefill_tokens for m in measured))
        decode = _range(f"{n:,}" for n in sorted(m.decode_tokens or 0 for m in measured) if n)
        lines.append(
            f"Speed was measured at batch size 1 on {'; '.join(machines)}, as the median (interquartile "
            f"range) of a {'forward pass' if _labelled(cards) else 'prefill'} of {prefill} tokens"
            f"{f' and a greedy decode of {decode} tokens' if decode else ''}."
        )
        if any(m.decode_energy for m in measured):
            lines.append(
                "Energy is what processor and memory took during the decode, with all that ran beside it."
            )
        if len(machines) > 1:
            lines.append(
                "Models were timed on different machines or numbers of threads, so speeds do not compare."
            )
    return lines


def _examples_caption(cards: list[Scorecard]) -> list[str]:
    """Sentences about the examples, what counts as right, the intervals and the test."""
    card, protocol = next(((card, card.task_protocol) for card in cards if card.task_protocol), (None, None))
    if card is None or protocol is None:
        return []
    task = protocol.task
    cut = f", {protocol.cut:,} of them cut off" if protocol.cut else ""
    inputs = f" in {protocol.inputs:,} inputs" if protocol.inputs != protocol.examples else ""
    return [
        f"Examples: {printable(protocol.file)} (sha256 {short(protocol.file_sha256)}), "
        f"{protocol.examples:,} for {task}{inputs}{cut}, at most {protocol.longest_tokens:,} tokens long, "
        f"scored in {protocol.compute_dtype}.",
        f"{_dense(card)} Agreement is the share of predictions that are equal to its own; p is that of "
        f"McNemar's exact two-sided test on the examples {RIGHT[task]} by only one of the two models.",
        INTERVALS[task],
        "FLOPs (a multiplication with its addition counts as two) and latency are for one input of mean "
        f"length, {protocol.mean_tokens:,} tokens.",
    ]


RIGHT = {
    "sequence classification": "labelled right",
    "token classification": "with every word labelled right",
    "question answering": "answered exactly right",
}
INTERVALS = {
    "sequence classification": "± is Wilson's 95 % interval (its wider side).",
    "token classification": (
        "± is a 95 % interval of Student's t clustered by example (its wider side). Macro F1 is the mean "
        "over the labels that occur."
    ),
    "question answering": (
        "± is a 95 % interval (its wider side): Wilson's, and Student's t for F1. Answers are normalised as "
        "in SQuAD."
    ),
}


def _range(texts: Iterable[str]) -> str:
    """``a``, or ``a to b`` from sorted texts; "" from none."""
    ends = list(dict.fromkeys(texts))
    return " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""


def _labelled(cards: list[Scorecard]) -> bool:
    return any(card.task for card in cards)


def machines_of(cards: Sequence[Scorecard]) -> list[str]:
    """The machines that models were timed on: one, if their speeds and memory compare."""
    measured = [card.cost.measured for card in cards if card.cost.measured]
    return sorted({f"{m.device}, {m.threads} thread{'s' * (m.threads > 1)}" for m in measured})


def _tasks_caption(cards: list[Scorecard]) -> list[str]:
    """Sentences about the tasks of lm-eval, the intervals, the star and the verdict."""
    protocols = [card.harness_protocol for card in cards if card.harness_protocol]
    if not protocols:
        return []
    tasks: dict[str, TaskAsked] = {}
    for asked in (asked for protocol in protocols for asked in protocol.tasks):
        tasks.setdefault(asked.task, asked)
    first = protocols[0]
    suite = f" of the suite {first.suite}" if first.suite else ""
    return [
        f"Tasks{suite}, asked by lm-eval {first.lm_eval} {'with' if first.chat_template else 'without'} the "
        f"chat template, with seed {first.seed}: {'; '.join(_asked(tasks.values()))}.",
        "A score is the mean over the questions, ± is its 95 % interval, and * marks a score that differs "
        "from the dense model's on the same questions (p < 0.05, corrected for the number of tasks by Holm). "
        "Lost: questions that the dense model answers rightly and this one wrongly; gained: the reverse; "
        "flips: the share of questions that are either.",
        *([] if any(card.protocol or card.task_protocol for card in cards) else [_dense(cards[0])]),
    ]


def _audit_caption(audit: Forgetting) -> str:
    used = audit.protocol.sets["forget"]
    floor = "a model that never learned it" if audit.retrained else "chance"
    return (
        f"What was unlearned: {used.records:,} records of {printable(used.source)} (sha256 "
        f"{short(used.sha256)}) were asked for in several ways. Recovery is 0 for a model that knows as much "
        f"as {floor}, and 1 for one that has forgotten nothing: of the model as it is, and after the later "
        "step of the audit after which it is highest. Utility is compared with the model before unlearning."
    )


def _dense(card: Scorecard) -> str:
    return f"The dense model is {printable(card.baseline.name)} (sha256 {short(card.baseline.sha256)})."


def _asked(tasks: Iterable[TaskAsked]) -> list[str]:
    """Tasks that were asked alike, together."""
    groups: dict[str, list[str]] = {}
    for asked in tasks:
        examples = f"{asked.fewshot} example{'s' * (asked.fewshot != 1)} in front" if asked.fewshot else ""
        how = [f"{asked.questions:,} questions", *([examples] if examples else []), f"by {asked.metric}"]
        groups.setdefault(", ".join(how), []).append(printable(asked.task))
    return [f"{', '.join(names)} ({how})" for how, names in groups.items()]


def notes(
    cards: Sequence[Scorecard],
    different: Sequence[Sequence[Difference]],
    audits: Sequence[Forgetting | None],
) -> list[str]:
    """Sentences about single models: verdicts, judges, audits, what to doubt, and what was asked
    differently."""
    answered = [(card.model.name, card.harness) for card in cards if card.harness]
    lines = [
        *(f"{name}: {harness.verdict.sentence}" for name, harness in answered if harness.verdict),
        *(
            f"{name}, {result.task}: {_said(result.judged)}"
            for name, harness in answered
            for result in harness.tasks
            if result.judged
        ),
        *(f"{card.model.name}: {audit.sentence}" for card, audit in zip(cards, audits, strict=True) if audit),
        *(f"{name}, warning: {text}" for name, harness in answered for text in harness.warnings),
        *(_note(difference) for of_one in different for difference in of_one),
    ]
    return list(map(printable, lines))


def _said(judged: Judged) -> str:
    return (
        f"the judge {judged.judge[:8]} prefers {judged.wins} answers of this model and {judged.losses} of "
        f"the dense one (p = {judged.p.text}); {judged.ties} pairs are ties, and {judged.unread} got "
        "no verdict. A score counts ties as halves."
    )


WHERE: dict[tuple[str, ...], str] = {(ALL_TASKS,): "the verdict", (FORGETTING,): "the audit"}


def _note(difference: Difference) -> str:
    where = WHERE.get(difference.where) or ", ".join(difference.where)
    return f"† {difference.model}, {where}: {difference.why}."
