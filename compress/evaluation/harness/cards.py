"""What the harness puts on the scorecards of two models: how they were asked, and how they answered."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, unknown
from compress.evaluation.harness.answers import Answers
from compress.evaluation.harness.ask import Wanted, ask, check_installed, installed, prepare
from compress.evaluation.harness.subject import Subject
from compress.evaluation.kick import FOLDER, SUITES
from compress.report.scorecard import Harness, HarnessProtocol
from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.evaluation.harness.tasks import Questions
    from compress.evaluation.kick.judge import Judge

log = logging.getLogger(__name__)

TEXT, QUICK = "text", "quick"
"""Suites: text alone, and text with a few questions where lm-eval is installed."""


def wanted_of(
    suite: str,
    tasks: Sequence[str],
    limit: int | None,
    folders: Sequence[str | Path],
    task_file: str | None = None,
    needing: Mapping[str, object] = MappingProxyType({}),
    **how: Any,
) -> Wanted | None:
    """What to ask, or None if nothing is to be asked.

    Args:
        suite: ``text``, ``quick``, ``kick`` or ``kick-hub``.
        tasks: names of tasks, in place of those of a suite.
        limit: largest number of questions of each task, in place of the suite's.
        folders: with files of further tasks.
        task_file: labelled examples for an encoder, which is asked nothing else.
        needing: what has no effect unless something is asked -> its value.
        how: further attributes of `Wanted`.

    Raises:
        BadInput: there is no such suite, or tasks are named beside it; an encoder is asked, or an option is
            given that needs questions.
        CompressError: lm-eval is not installed.
    """
    how["folders"] = (FOLDER, *map(Path, folders))
    if suite not in (TEXT, *SUITES):
        raise unknown("suite", suite, (TEXT, *SUITES))
    if tasks and suite != TEXT:
        raise BadInput(f"The suite '{suite}' has tasks of its own; leave out --suite or --tasks.")
    if task_file is not None and (tasks or suite != TEXT):
        raise BadInput("Encoders are scored on a task file or not at all; leave out --suite and --tasks.")
    if tasks:
        check_installed()
        return Wanted(tuple(tasks), limit=limit, **how)
    if suite == TEXT:
        asked = {"--limit": limit, "--fewshot": how.get("fewshot"), **needing}
        asked["--chat-template"] = how.get("chat_template") or None
        if given := [name for name, value in asked.items() if value is not None]:
            raise BadInput(f"{given[0]} needs questions; name them with --suite or --tasks.")
        return None
    if suite == QUICK and not installed() and all(value is None for value in needing.values()):
        log.warning("Only text is scored, because lm-eval is missing: pip install 'compress-model[eval]'.")
        return None
    check_installed()
    chosen = SUITES[suite]
    return Wanted(tuple(chosen.tasks), limit=limit or chosen.limit, suite=suite, **how)


def samples_folder(folder: Path) -> None:
    """Create the folder for questions and answers, before the work that makes them.

    Raises:
        BadInput: it is no folder, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileExistsError:
        raise BadInput(f"'{folder}' is a file; name a folder for questions and answers.") from None
    except OSError as error:
        raise BadInput(
            f"The folder '{folder}' for questions and answers cannot be written ({error.strerror}); name "
            "another one."
        ) from error


@dataclass(frozen=True)
class Exam:
    """The questions for a model and the dense model, found and checked before anything else is done.

    Attributes:
        wanted: what was asked for.
        dense, model: the models; the same one if there is only one.
        questions: of both, which are the same unless they have chat templates of their own.
        judge: compares the answers to tasks that have no right one; None asks nobody.
    """

    wanted: Wanted
    dense: Subject
    model: Subject
    questions: tuple[list[Questions], list[Questions]]
    judge: Judge | None = None

    @classmethod
    def of(
        cls, wanted: Wanted, dense: Subject, model: Subject, progress: Progress, judge: Path | None = None
    ) -> Exam:
        """Find the questions. Raises the errors of `ask` that concern tasks, and those of `LocalJudge`."""
        from compress.evaluation.kick.judge import LocalJudge

        first = prepare(wanted, dense, progress)
        second = prepare(wanted, model, progress) if wanted.chat_template and model is not dense else first
        found = cls(wanted, dense, model, (first, second))
        if judge is None:
            return found
        if model is dense:
            raise BadInput("A judge compares a model with the dense one; name that with --baseline.")
        if not found._judged_tasks:
            raise BadInput(
                f"None of these tasks needs a judge ({', '.join(each.name for each in first)}); a task "
                "without right answers says so in its file, as 'metadata: {judged: true}'."
            )
        folders = [dense.folder, model.folder]
        return replace(
            found, judge=LocalJudge(judge, folders, dense.device, lambda share: progress("judging", share))
        )

    @property
    def _judged_tasks(self) -> set[str]:
        """The tasks that have no right answers."""
        return {each.name for each in self.questions[0] if each.metadata("judged")}

    def fields(
        self, margin: float, samples: Path | None, progress: Progress
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """``harness_protocol`` and ``harness`` of both scorecards.

        Args:
            margin: the loss that does not matter, as a share of all questions.
            samples: a folder for questions and answers.
            progress: called with a text and the share that is done.

        Raises:
            BadInput, CompressError: as `ask` does, or the judge cannot be loaded.
        """
        from compress.evaluation.pairs import alone, judge

        seed = self.wanted.seed
        dense = ask(self.dense, self.wanted, self.questions[0], samples, progress)
        first = self._with_protocol(self.dense, dense, alone(dense, seed, self.dense.name))
        if self.model is self.dense:
            return first, first
        model = ask(self.model, self.wanted, self.questions[1], samples, progress)
        harness = self._with_judgements(judge(dense, model, margin, seed), dense, model)
        return first, self._with_protocol(self.model, model, harness)

    def _with_judgements(
        self, harness: Harness, dense: Sequence[Answers], model: Sequence[Answers]
    ) -> Harness:
        """The results with what the judge says of the tasks that have no right answers."""
        from compress.evaluation.kick.judge import compared

        if self.judge is None:
            return harness
        before = {each.asked.task: each for each in dense}
        found = {
            each.asked.task: compared(
                each.prompts, before[each.asked.task].text, each.text, self.judge, self.wanted.seed
            )
            for each in model
            if each.asked.task in self._judged_tasks
        }
        tasks = [result.model_copy(update={"judged": found.get(result.task)}) for result in harness.tasks]
        return harness.model_copy(update={"tasks": tuple(tasks)})

    def _with_protocol(self, subject: Subject, answers: list[Answers], harness: Any) -> dict[str, Any]:
        protocol = HarnessProtocol(
            suite=self.wanted.suite,
            tasks=tuple(each.asked for each in answers),
            chat_template=self.wanted.chat_template,
            seed=self.wanted.seed,
            lm_eval=version("lm-eval"),
            kernel=subject.kernel_name,
            compute_dtype=subject.dtype_name,
        )
        return {"harness_protocol": protocol, "harness": harness}
