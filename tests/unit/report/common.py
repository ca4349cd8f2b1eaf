"""Scorecards of models that were never made."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from compress.report.scorecard import (
    Cost,
    Fidelity,
    Figure,
    Harness,
    HarnessProtocol,
    Measurement,
    ModelIdentity,
    Protocol,
    Scorecard,
    TaskAsked,
    TaskResult,
    Verdict,
)
from compress.storage.lineage import Lineage

WHEN = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = "a|<script>alert('x')</script> $x_1$ [bold] & \"b\""


def identity(name: str) -> ModelIdentity:
    return ModelIdentity(name=name, sha256=sha256(name.encode()).hexdigest())


def card(
    name: str = "dense", *, size: int = 400_000_000, measured: bool = True, day: int = 0, **changes
) -> Scorecard:
    """A scorecard; ``changes`` go into its protocol, or ``baseline`` into the card."""
    baseline = identity(changes.pop("baseline", "dense"))
    protocol = {
        "text": "factbook",
        "text_sha256": "0" * 64,
        "context_tokens": 512,
        "stride_tokens": 256,
        "windows": 9,
        "tokens_scored": 4599,
        "compute_dtype": "float32",
        "seed": 7,
        "kernel": "torch",
    }
    nats = {"unit": "nats/token"}
    return Scorecard(
        model=identity(name),
        baseline=baseline,
        loads_with="transformers",
        protocol=Protocol(**protocol | changes),
        fidelity=Fidelity(
            perplexity=Figure(value=13.66, low=13.06, high=14.27),
            perplexity_ratio=Figure(value=1.0904, low=1.08, high=1.101),
            kl_mean=Figure(value=0.121, low=0.115, high=0.127, **nats),
            kl_standard_error=0.003,
            kl_median=Figure(value=0.05, **nats),
            kl_p99=Figure(value=0.9, **nats),
            kl_max=Figure(value=3.5, **nats),
            top1_agreement=Figure(value=0.862, low=0.858, high=0.866, unit="fraction"),
            rms_delta_p=Figure(value=0.04, unit="fraction"),
        ),
        cost=Cost(
            weight_bytes=size,
            parameters=200_000_000,
            measured=Measurement(
                peak_resident_bytes=940_000_000,
                baseline_resident_bytes=301_000_000,
                prefill=Figure(value=812.3, low=796, high=820, unit="tokens/s", spread="interquartile range"),
                prefill_tokens=512,
                prefill_repetitions=5,
                threads=2,
                device="a processor",
                kernel="reference",
                storage_dtype="bfloat16",
            )
            if measured
            else None,
        ),
        when=WHEN + timedelta(days=day),
        versions={"torch": "2.13.0"},
    )


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def dumped(*cards: Scorecard) -> list[dict]:
    return [one.model_dump(mode="json") for one in cards]


KICK = ("kick_factoid", "kick_choice", "kick_open")


def asked(task: str, **changes: Any) -> TaskAsked:
    """How a task was asked; the hash follows from all else."""
    how = {"task": task, "questions": 500, "fewshot": 0, "metric": "exact_match", "chance": 0.25} | changes
    return TaskAsked(**{"sha256": sha256(repr(how).encode()).hexdigest()} | how)


def result(task: str, score: float, dense: float | None, holm_p: float = 1.0) -> TaskResult:
    """A result with round numbers; ``dense`` is the dense model's score, None on its own scorecard."""
    own = {
        "task": task,
        "score": Figure(value=score, low=max(0, score - 0.04), high=min(1, score + 0.04), unit="fraction"),
        "others": {"contains": Figure(value=score, unit="fraction")},
    }
    if dense is None:
        return TaskResult(**own)
    change = score - dense
    return TaskResult(
        **own,
        change=Figure(value=change, low=change - 0.02, high=change + 0.02, unit="fraction"),
        lost=30,
        gained=10,
        p=Figure(value=holm_p / 2),
        holm_p=Figure(value=holm_p),
        matching=score >= 0.95 * dense,
    )


def verdict(kind: str, change: float = -0.04, margin: float = 0.01, questions: int = 1500) -> Verdict:
    return Verdict(
        kind=kind,
        margin=margin,
        change=Figure(value=change, low=change - 0.01, high=change + 0.01, unit="fraction"),
        worse_p=Figure(value=0.001),
        margin_p=Figure(value=0.9),
        questions=questions,
        needed=9000 if kind == "undecided" else None,
        sentence=f"The sentence that says {kind}.",
    )


def answered(
    name: str = "dense",
    scores: dict[str, float] | None = None,
    *,
    holm_p: float = 1.0,
    kind: str = "undecided",
    margin: float = 0.01,
    text: bool = True,
    changes: dict[str, dict[str, Any]] | None = None,
    protocol: dict[str, Any] | None = None,
    warnings: tuple[str, ...] = (),
    **of_card: Any,
) -> Scorecard:
    """The scorecard of a model that answered tasks; the dense one has a score of 0.6 in each.

    Args:
        scores: task -> score, by default those of KICK.
        text: whether it was scored on text, too.
        changes: task -> how it was asked differently.
        protocol: how all tasks were asked differently.
        of_card: as for `card`.
    """
    scores = scores or dict.fromkeys(KICK, 0.6)
    whole = card(name, **of_card)
    dense = whole.is_dense
    tasks = tuple(asked(task, **(changes or {}).get(task, {})) for task in scores)
    how = {"suite": "kick", "chat_template": False, "seed": 0, "lm_eval": "0.4.13", "kernel": "torch"}
    found = {
        "harness_protocol": HarnessProtocol(tasks=tasks, **how | (protocol or {})),
        "harness": Harness(
            tasks=tuple(
                result(task, score, None if dense else 0.6, holm_p) for task, score in scores.items()
            ),
            verdict=None if dense else verdict(kind, margin=margin, questions=500 * len(scores)),
            warnings=warnings,
        ),
    }
    return whole.model_copy(update=found | ({} if text else {"protocol": None, "fidelity": None}))


def lineage(name: str, *methods: str, parent: Lineage | None = None) -> Lineage:
    """How a model was made by these methods."""
    document = {
        "name": name,
        "created": WHEN,
        "parent": {
            "id": f"parent of {name}",
            "revision": None,
            "sha256": "0" * 64,
            "bytes": 1,
            "parameters": 1,
            "lineage": parent.model_dump() if parent else None,
        },
        "dtype": None,
        "seed": 3,
        "calibration": {"source": "factbook", "nsamples": 16, "seqlen": 512, "sha256": "1" * 64},
        "steps": [
            {
                "method": method,
                "family": "pruning",
                "paper": "A paper",
                "options": {"ratio": 0.25, "note": HOSTILE},
                "summary": f"what {method} did",
                "details": {},
                "seconds": 1,
                "peak_memory_bytes": 1,
                "resumed": False,
            }
            for method in methods
        ],
        "result": {
            "bytes": 1,
            "predicted_bytes": 1,
            "parameters": 1,
            "bits_per_parameter": 8,
            "layers": 1,
            "loads_with": "transformers",
            "files": {},
        },
        "reload": {"loaded_by": "transformers", "max_difference": 0, "tokens": 1},
        "device": "cpu",
        "versions": {"compress-model": "9.8.7"},
    }
    return Lineage.model_validate(document)


def made(folder: Path, history: Lineage, *cards: Scorecard) -> Path:
    """A folder with a compression.json."""
    folder.mkdir()
    whole = history.model_copy(update={"evaluations": dumped(*cards)})
    (folder / "compression.json").write_text(whole.model_dump_json())
    return folder
