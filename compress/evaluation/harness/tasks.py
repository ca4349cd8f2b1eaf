"""Find tasks of lm-eval by name, with their data, and say in one sentence what is wrong with one."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from compress.errors import BadInput, CompressError, unknown
from compress.system.files import file_sha256

Chat = Callable[..., str]
"""Turns a conversation into a prompt, as ``lm_eval.models.huggingface.HFLM.apply_chat_template`` does."""


@dataclass(frozen=True)
class Asking:
    """How tasks are asked, of any model.

    Attributes:
        fewshot: examples in front of each question; None leaves it to the task.
        limit: largest number of questions of a task; None asks all.
        chat: makes a conversation of each prompt, or None.
        seed: of the examples and of sampled answers.
    """

    fewshot: int | None
    limit: int | None
    chat: Chat | None
    seed: int


class Questions:
    """One task, ready to be asked.

    Args:
        task: with its data.
        asking: how it is asked.

    Raises:
        BadInput: it needs more than text, or runs code that a model writes; its questions cannot be built;
            or a right answer is not among the choices.
    """

    def __init__(self, task: Task, asking: Asking) -> None:
        self.task, self.asking, self.name = task, asking, str(task.config.task)
        if getattr(task, "UNSAFE_CODE", False):
            raise BadInput(f"The task '{self.name}' runs code that models write, which is not done here.")
        if getattr(task, "MULTIMODAL", False):
            raise BadInput(f"The task '{self.name}' asks about images or sound, not about text alone.")
        if asking.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", asking.fewshot)
        self.fewshot = int(task.get_config("num_fewshot") or 0)
        task.set_config("num_fewshot", self.fewshot)
        try:
            self._build()
        except CompressError:
            raise
        except Exception as error:  # of the task's own functions, too
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise BadInput(
                f"The questions of the task '{self.name}' cannot be built ({reason}); look at its file and "
                "its data, or ask for fewer examples with --fewshot."
            ) from error

    def _build(self) -> None:
        task, chat = self.task, self.asking.chat
        task.set_fewshot_seed(self.asking.seed)
        task.build_all_requests(
            limit=self.asking.limit,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=True,
            chat_template=chat,
        )
        requests = defaultdict(list)
        for instance in task.instances:
            requests[instance.doc_id].append(instance)
        self.choices: list[int] = []
        hashes, documents = [], []
        for number, instances in sorted(requests.items()):
            document = instances[0].doc
            self._check_labels(number, document)
            instances.sort(key=lambda instance: instance.idx)
            asked = [instance.args for instance in instances]
            hashes.append(_hash([asked, task.doc_to_target(document)]))
            documents.append(_hash(self._about(document)))
            self.choices.append(self._choices(document) or len(asked))
        self.hashes, self.documents = tuple(hashes), tuple(documents)
        self.requests = sum(instance.repeats for instance in task.instances)

    def _about(self, document: Any) -> Any:
        """What a question is about: its document, or those fields of it that the task's file names."""
        fields = self.metadata("about")
        return {field: document[field] for field in fields} if fields else document

    def _choices(self, document: Any) -> int | None:
        """The number of choices; lm-eval asks each of them twice for its mutual information."""
        task = self.task
        if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(task, ConfigurableTask):
            return None
        return len(task.doc_to_choice(document)) if task.config.doc_to_choice is not None else None

    def _check_labels(self, number: int, document: Any) -> None:
        """Refuse a right answer that is none of the choices, which lm-eval would count as a wrong answer."""
        task = self.task
        if not isinstance(task, ConfigurableTask) or task.config.doc_to_choice is None:
            return
        choices: Any = task.doc_to_choice(document)
        right: Any = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        for label in right if isinstance(right, list) else [right]:
            fits = 0 <= label < len(choices) if isinstance(label, int) else label in choices
            if not fits:
                raise BadInput(
                    f"Question {number + 1} of the task '{self.name}' has the label {label!r}, which is none "
                    f"of its {len(choices)} choices; mend the task's data, or its doc_to_target."
                )

    @cached_property
    def sha256(self) -> str:
        """Hash of the prompts and right answers, in order."""
        return _hash(self.hashes)

    @cached_property
    def scorer_sha256(self) -> str:
        """Hash of what turns an answer into a score: the task's settings, and the code of its functions."""
        config = self.task.dump_config()
        metadata = config.pop("metadata", None)
        source = Path(str(metadata.get("config_source", ""))) if isinstance(metadata, dict) else Path()
        values = vars(self.task.config).values()
        named = {inspect.getsourcefile(value) for value in values if inspect.isfunction(value)}
        folders = {Path(file).parent for file in named if file} | (
            {source.parent} if source.is_file() else set()
        )
        # Beside a file lie those that it may import.
        files = sorted(file for folder in folders for file in folder.glob("*.py"))
        return _hash([config, self.metadata("version"), [file_sha256(file) for file in files]])

    def metadata(self, name: str) -> Any:
        """What the task's file says under ``metadata``."""
        metadata = self.task.get_config("metadata")
        return metadata.get(name) if isinstance(metadata, dict) else None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> list[Task]:
    """The tasks of some names, each once, with their data.

    Args:
        names: of tasks, of groups, of tags, or files of tasks.
        folders: with files of tasks, beside those that come with lm-eval. The latter are read only if a name
            is not found here, which takes some seconds.

    Raises:
        BadInput: there is no such task, or its file is broken.
        CompressError: its data cannot be fetched.
    """
    manager = _manager(names, folders)
    found: dict[str, Task] = {}
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            _refuse_broken_files(folders)
            raise unknown("task", name, manager.all_tasks)
        for each, task in _load(manager, name).items():
            found.setdefault(each, task)
    return list(found.values())


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"There is no folder '{folder}' with tasks.")
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if all(Path(name).is_file() or _is_whole(manager, name) for name in names):
        return manager
    return TaskManager(include_path=list(folders))


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether a task or group is there, with all its members."""
    entry = manager.task_index.get(name)
    members = (entry.cfg or {}).get("task") if entry else None
    if not isinstance(members, list):
        return entry is not None
    named = [member if isinstance(member, str) else member.get("task") for member in members]
    return all(_is_whole(manager, member) for member in named if isinstance(member, str))


def _refuse_broken_files(folders: Sequence[Path]) -> None:
    """Say which file cannot be read, which lm-eval leaves out without a word."""
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            raise _broken(file, error) from error


def _broken(file: str | Path, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())
    return BadInput(f"The task file '{file}' cannot be read ({reason}).")


def _load(manager: TaskManager, name: str) -> dict[str, Task]:
    try:
        return manager.load([name])["tasks"]
    except Exception as error:
        raise _why(name, error) from error


def _why(name: str, error: Exception) -> Exception:
    """The error of a task that cannot be loaded, in one sentence."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    causes = list(_causes(error))
    full = next((e for e in causes if isinstance(e, OSError) and e.errno == errno.ENOSPC), None)
    if full is not None:
        return full
    if any(isinstance(each, yaml.YAMLError) for each in causes):
        return _broken(name, error)
    reason = f"{type(causes[-1]).__name__}: {' '.join(str(causes[-1]).split())[:200]}"
    if isinstance(error, DatasetGenerationError):
        return BadInput(f"The data of the task '{name}' cannot be read ({reason}).")
    if isinstance(error, DatasetsError | OSError):
        return CompressError(
            f"The data of the task '{name}' cannot be fetched ({reason}); check the connection and "
            "HF_HUB_OFFLINE, or name a task whose data are on this machine."
        )
    advice = "look at its file."
    if isinstance(error, IndexError):
        advice = "is the label of its first question none of its choices?"
    return BadInput(f"The task '{name}' cannot be set up ({reason}); {advice}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
