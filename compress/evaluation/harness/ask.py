"""Ask a model the questions of lm-eval's tasks: each task once, whatever interrupts the work."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput, CompressError
from compress.evaluation.harness.answers import Answers
from compress.evaluation.harness.cache import Finished, Requests, Rows, as_text
from compress.evaluation.harness.subject import Subject
from compress.system.files import write_atomically
from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.evaluation.harness.tasks import Questions

SEED = 1234
"""lm-eval's own default for the examples in front of a question."""

LOOKING = "looking up tasks"


@dataclass(frozen=True)
class Wanted:
    """Which tasks to ask, and how.

    Attributes:
        tasks: names of tasks, groups and tags of lm-eval, or files of tasks.
        folders: with files of further tasks.
        fewshot: examples in front of each question; None leaves it to the task, and a task that is made for
            none keeps none.
        limit: largest number of questions of each task; None asks all.
        batch_size: rows of a batch, or ``auto``.
        chat_template: put each prompt into the model's chat template.
        seed: of the examples and of sampled answers.
        suite: the suite that the tasks are.
    """

    tasks: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int | str = "auto"
    chat_template: bool = False
    seed: int = SEED
    suite: str | None = None


def ask(
    subject: Subject,
    wanted: Wanted,
    questions: Sequence[Questions] | None = None,
    samples: Path | None = None,
    progress: Progress = lambda text, share: None,
) -> list[Answers]:
    """Ask a model, and keep its answers. What was asked in the same way before is not asked again.

    Args:
        subject: the model, and how to run it.
        wanted: the tasks.
        questions: what `prepare` found for them; None finds them now.
        samples: a folder to write each task's questions and answers to, as JSON lines.
        progress: called with a text and the share that is done.

    Returns:
        The answers to each task, in the order of ``wanted``.

    Raises:
        BadInput: as `prepare`; or the model cannot be loaded, or no metric of a task decides.
        CompressError: as `prepare`; or the model puts out NaN, or the cache cannot be written.
    """
    from compress.evaluation.harness.score import answers

    result = []
    finished = Finished(subject.identity)
    tasks = prepare(wanted, subject, progress) if questions is None else questions
    with Respondent(subject, wanted.batch_size, finished, progress) as respondent, quietly():
        for each in tasks:
            asked = _asked(each, wanted)
            rows = finished.find(asked)
            if rows is None:
                rows = respondent.rows(each)
                finished.keep(asked, rows)
            result.append(answers(each, rows))
            if samples is not None:
                _write(samples / subject.name.replace("/", "__") / f"{each.name}.jsonl", rows)
    return result


def prepare(
    wanted: Wanted, subject: Subject, progress: Progress = lambda text, share: None
) -> list[Questions]:
    """Find the tasks with their data, and build their questions.

    Args:
        wanted: the tasks.
        subject: the model, for its chat template.
        progress: called with a text and the share that is done.

    Raises:
        BadInput: there is no such task, its file is broken, its labels do not fit its choices, or the model
            has no chat template.
        CompressError: lm-eval is not installed, or data cannot be fetched.
    """
    check_installed()
    from compress.evaluation.harness.tasks import Asking, Questions, find_tasks

    asking = Asking(
        wanted.fewshot, wanted.limit, _chat(subject) if wanted.chat_template else None, wanted.seed
    )
    found = []
    with quietly():
        progress(LOOKING, 0.0)
        tasks = find_tasks(wanted.tasks, wanted.folders)
        for number, task in enumerate(tasks):
            progress(LOOKING, number / len(tasks))
            found.append(Questions(task, asking))
    progress(LOOKING, 1.0)
    return found


def installed() -> bool:
    """Whether lm-eval is installed."""
    return find_spec("lm_eval") is not None


def check_installed() -> None:
    """Raise `CompressError` if lm-eval is not installed."""
    if not installed():
        raise CompressError("Asking questions needs lm-eval; run `pip install 'compress-model[eval]'`.")


def _asked(questions: Questions, wanted: Wanted) -> dict[str, Any]:
    """Everything that a task's answers and scores depend on, beside the model."""
    return {
        "task": questions.name,
        "sha256": questions.sha256,
        "scorer": questions.scorer_sha256,
        "fewshot": questions.fewshot,
        "limit": wanted.limit,
        "chat_template": wanted.chat_template,
        "seed": wanted.seed,
        "lm_eval": version("lm-eval"),
    }


class Respondent:
    """A model that is loaded when the first question is asked."""

    def __init__(
        self, subject: Subject, batch_size: int | str, finished: Finished, progress: Progress
    ) -> None:
        self._subject, self._batch_size, self._finished = subject, batch_size, finished
        # lm-eval makes tokens of a prompt, and an answer of tokens.
        identity = {**finished.identity, "lm_eval": version("lm-eval")}
        self._progress, self._requests = progress, Requests(finished.folder, identity)
        self._lm: Any = None
        self._answered: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.__exit__()

    def rows(self, questions: Questions) -> Rows:
        """Ask the questions of a task."""
        from compress.evaluation.harness.score import rows

        if self._lm is None:
            self._lm = self._load()
        label = f"asking {self._subject.name}: {questions.name}"
        self._answered = _Counter(lambda share: self._progress(label, share), questions.requests)
        samples = self._samples(questions)
        self._requests.flush()
        self._progress(label, 1.0)
        return rows(questions, samples, self._lm.is_cut)

    def _samples(self, questions: Questions) -> list[dict[str, Any]]:
        """What lm-eval logs about each question."""
        import torch
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        asking = questions.asking
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        try:
            found: Any = simple_evaluate(
                model=self._lm,
                tasks=[questions.task],
                task_manager=TaskManager(include_defaults=False),  # to look for no others
                num_fewshot=asking.fewshot,
                limit=asking.limit,
                bootstrap_iters=0,
                apply_chat_template=asking.chat is not None,
                **dict.fromkeys(seeds, asking.seed),
            )
        except (CompressError, OSError, MemoryError):
            raise
        except torch.OutOfMemoryError as error:
            raise CompressError(
                f"A batch of '{questions.name}' does not fit into the device's memory; give a smaller "
                "--batch-size."
            ) from error
        except Exception as error:  # of the task's own functions, too
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise CompressError(f"Asking the task '{questions.name}' failed ({reason}).") from error
        return list(found["samples"][questions.name])

    def _load(self) -> Any:
        from compress.evaluation.harness.model import Asked

        label = f"loading {self._subject.name}"
        self._progress(label, 0.0)
        model = self._subject.load()
        tokenizer = load_tokenizer(self._subject.folder)
        self._progress(label, 1.0)
        return Asked(model, tokenizer, self._batch_size, self._requests, lambda: self._answered())


class _Counter:
    """Counts answers, and tells the share of them."""

    def __init__(self, tell: Callable[[float], None], total: int) -> None:
        self._tell, self._total, self._count = tell, total, 0
        tell(0.0)

    def __call__(self) -> None:
        self._count += 1
        self._tell(min(1.0, self._count / self._total))


def _chat(subject: Subject) -> Callable[..., str]:
    """lm-eval's way to make a conversation of a prompt, with the model's tokenizer."""
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = load_tokenizer(subject.folder)
    if tokenizer.chat_template is None:
        raise BadInput(f"'{subject.name}' has no chat template; leave out --chat-template.")
    return partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args={}))


def _write(file: Path, rows: Rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{as_text(row)}\n" for row in rows))


@contextmanager
def quietly() -> Iterator[None]:
    """lm-eval without its bars and prints, and without asking git and the system where it runs per task."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    bars, shown = partial(lm_eval.api.task.tqdm, disable=True), datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with (
            redirect_stdout(io.StringIO()),
            mock.patch.object(lm_eval.api.task, "tqdm", bars),
            mock.patch.object(lm_eval.evaluator, "add_env_info"),
            mock.patch.object(lm_eval.evaluator, "get_git_commit_hash"),  # git complains where there is none
        ):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
