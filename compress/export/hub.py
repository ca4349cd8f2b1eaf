"""Push a model to the hub: large files first, one by one, then one commit with everything.

Until that commit nobody sees anything of a push. The hub keeps what has arrived of an interrupted one, so the
same push takes it up again.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

import compress
from compress.errors import BadInput, CompressError
from compress.export.publication import Publication, Published
from compress.report.card import CARD
from compress.system import hub
from compress.system.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

MAIN = "main"
OWN = ".gitattributes"
"""The file that the hub itself puts into a new repository."""


@dataclass(frozen=True)
class Pushed:
    """What came of a push.

    Attributes:
        repository: USER/NAME.
        revision: the branch.
        commit: the hash of the branch's newest commit.
        url: of the model's page.
        private: whether only the user (or the organization) sees it.
        unchanged: everything was there already.
    """

    repository: str
    revision: str
    commit: str
    url: str
    private: bool
    unchanged: bool


def push(
    model: Publication,
    repository: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda text, share: None,
) -> Pushed:
    """Push a model to a repository on the hub, which is created if it is not there.

    Args:
        model: what is pushed.
        repository: USER/NAME, or ORGANIZATION/NAME.
        public: whether everybody may see a new repository.
        revision: branch to push to, which is created if it is not there; None is the main branch.
        message: of the commit.
        overwrite: whether files that are there already may be replaced. Those that the model does not have
            are removed, except when the model is one file.
        progress: told how much is uploaded.

    Raises:
        BadInput: there is no access token, or the hub does not accept it; the name is not one, or taken; the
            repository is public and should not be, or the other way round.
        CompressError: the hub cannot be reached, does not answer, answers with an error, or holds something
            else in the end than was pushed.
    """
    _check_name(repository)
    if revision is not None and not revision.strip():
        raise BadInput("The name of the branch is empty; name one, or leave out --revision to push to main.")
    token = hub.prepare()
    if token is None:
        raise BadInput(f"There is no access token for the hub; {hub.LOG_IN}.")
    from huggingface_hub import HfApi

    work = _Push(HfApi(token=token), model, repository, revision or MAIN, public)
    work.check_card()
    created = work.open_repository()
    there = work.files_there()
    if work.same_as(there):
        return work.pushed(unchanged=True)
    if there and not (created or overwrite):
        raise BadInput(
            f"'{repository}' exists already and holds {len(there)} file{'s' * (len(there) > 1)} in "
            f"'{work.revision}'; --overwrite replaces them (its history keeps them), or use another name."
        )
    work.upload(there, message or f"Upload {model.name} with compress-model {compress.__version__}", progress)
    if not work.same_as(work.files_there()):
        raise CompressError(
            f"What '{repository}' holds now is not what was pushed, although the hub reported no error; run "
            "the same command again with --overwrite."
        )
    return work.pushed(unchanged=False)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repository.count("/") != 1:
        raise BadInput(f"'{repository}' is not USER/NAME, the name of a model on the hub.")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise BadInput(
            f"'{repository}' cannot be the name of a model on the hub; names have letters, digits, '-', '_' "
            "and '.', and at most 96 of them."
        ) from None


@dataclass
class _Push:
    api: HfApi
    model: Publication
    repository: str
    revision: str
    public: bool

    def check_card(self) -> None:
        """Ask the hub whether it takes the card, such as its licence, before anything is made there."""
        from huggingface_hub import ModelCard

        with self._errors("publishing the card"):
            for file in self.model.files:
                if file.name == CARD and isinstance(file.content, bytes):
                    ModelCard(file.content.decode()).validate()

    def open_repository(self) -> bool:
        """Find or create the repository and the branch.

        Returns:
            Whether one of them is new, so that nothing of value is replaced.
        """
        with self._errors("creating the repository"):
            created = self._find_or_create()
        if created and self.revision == MAIN:
            return True
        return self._find_or_create_branch() or created

    def _find_or_create(self) -> bool:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            found = self.api.model_info(self.repository)
        except RepositoryNotFoundError as error:
            if hub.status_of(error) == 401 and "credential" in hub.answer_of(error).lower():
                raise
            try:
                self.api.create_repo(self.repository, private=not self.public)
            except HfHubHTTPError as refused:
                if hub.status_of(refused) == 409:
                    raise BadInput(
                        f"The name '{self.repository}' is taken; push to another name."
                    ) from refused
                raise
            return True
        if self.public and found.private:
            raise BadInput(
                f"'{self.repository}' is private; make it public on its page first, or leave out --public."
            )
        if not self.public and not found.private:
            raise BadInput(
                f"'{self.repository}' is public; add --public to publish the model, or use another name."
            )
        return False

    def _find_or_create_branch(self) -> bool:
        from huggingface_hub.errors import RevisionNotFoundError

        with self._errors(f"creating the branch '{self.revision}'"):
            try:
                self.api.model_info(self.repository, revision=self.revision)
            except RevisionNotFoundError:
                self.api.create_branch(self.repository, branch=self.revision)
                return True
        return False

    def files_there(self) -> dict[str, str]:
        """Name -> sha256 of large files and git's hash of small ones, of what is on the branch."""
        from huggingface_hub.hf_api import RepoFile

        with self._errors("reading the repository"):
            found = list(self.api.list_repo_tree(self.repository, recursive=True, revision=self.revision))
        files = [entry for entry in found if isinstance(entry, RepoFile) and entry.path != OWN]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def same_as(self, there: dict[str, str]) -> bool:
        """Whether the branch has all files of the model, and, unless that is one file, no others."""
        ours = {file.name: file for file in self.model.files}
        if not (ours.keys() <= there.keys() if self.model.is_file else ours.keys() == there.keys()):
            return False
        return all(there[name] in (file.sha256, file.git_sha1) for name, file in ours.items())

    def upload(self, there: dict[str, str], message: str, progress: Progress) -> None:
        """Upload the weights one by one, and commit them with everything else."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = {
            file.name: CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content)
            for file in self.model.files
        }
        total, done = self.model.nbytes or 1, 0
        for file in self.model.files:
            progress("uploading", done / total)
            if file.is_weights:
                self._upload_one(file, additions[file.name])
            done += file.nbytes
        stale = [] if self.model.is_file else sorted(there.keys() - additions.keys())
        operations: list[Any] = [*additions.values(), *(CommitOperationDelete(name) for name in stale)]
        with self._errors("publishing what was uploaded"):
            self.api.create_commit(
                self.repository, operations, commit_message=message, revision=self.revision
            )
        progress("uploading", 1.0)

    def _upload_one(self, file: Published, addition: Any) -> None:
        with self._errors(f"uploading '{file.name}'"):
            self.api.preupload_lfs_files(
                self.repository, [addition], revision=self.revision, free_memory=False
            )

    def pushed(self, *, unchanged: bool) -> Pushed:
        with self._errors("reading the repository"):
            found = self.api.model_info(self.repository, revision=self.revision)
        url = f"{self.api.endpoint}/{self.repository}"
        return Pushed(
            *(self.repository, self.revision, str(found.sha), url, bool(found.private)), unchanged=unchanged
        )

    def _errors(self, what: str) -> AbstractContextManager[None]:
        """Turn what the hub's client raises into one sentence."""
        return hub.errors(lambda error: self._sentence(error, what))

    def _sentence(self, error: BaseException, what: str) -> CompressError:
        status, answer = hub.status_of(error), hub.answer_of(error)
        said = f" ({answer})" if answer else ""
        if status == 401:
            return BadInput(f"The hub does not accept the access token; {hub.LOG_IN}.")
        if status == 403 and hub.is_about_the_token(error):
            return BadInput(
                f"The access token may not write to '{self.repository}'{said}; use a token with the right to "
                "write there, or a name of your own."
            )
        if status in (400, 404, 413, 422):
            return BadInput(f"The hub refused {what} in '{self.repository}'{said or f' ({status})'}.")
        if status is None and isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
            return BadInput(
                f"The hub refused {what} in '{self.repository}' ({' '.join(str(error).split())})."
            )
        return CompressError(
            f"The push to '{self.repository}' stopped while {what}, because {hub.trouble(error)}; run the "
            "same command again: what has arrived is kept."
        )
