"""The contract of a compression method: one class that declares itself, plans, and applies.

From the declaration come the command-line options, ``compress-model methods``, recipe validation, the
model card and the documentation, so a method touches one new file and one line of the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from compress.calibration.text.settings import DEFAULT_SIZE, TextSize
from compress.system.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from compress.engine.journal import Journal
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.engine.windows import Windows
    from compress.storage.checkpoint import Checkpoint
    from compress.storage.draft import Draft
    from compress.system.progress import Progress


Family = Literal["unlearning", "pruning", "quantization"]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str | None = None
    url: str | None = None

    def __str__(self) -> str:
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.url
        return f"{self.title} ({where})" if where else self.title


class MethodOptions(Settings):
    """Base of every method's options."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name of an option -> its present name, with a remark after a comma if the meaning changed. Using
    the old name is an error that says so."""

    def content(self) -> dict[str, str]:
        """The sha256 of what options only name, such as sets of records: option -> sha256.

        Raises:
            BadInput: it cannot be read.
        """
        return {}


OptionsT = TypeVar("OptionsT", bound=MethodOptions)


@dataclass
class StepReport:
    """The result of a step, for ``compression.json`` and the model card. It holds JSON values only."""

    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepContext:
    """Everything a method receives besides the model and its options.

    Attributes:
        draft: the model under construction; the method writes its changes there.
        windows: calibration windows; None if no method of the recipe needs calibration.
        seed: seed of every random choice.
        folder: room for the step's files; it is removed when the step is done.
        device: where to compute.
        progress: called with a text and the share that is done.
    """

    draft: Draft
    windows: Windows | None
    seed: int
    folder: Path
    device: str
    progress: Progress

    @property
    def calibration(self) -> Windows:
        """The calibration windows, which every method has that declares ``needs_calibration``."""
        if self.windows is None:
            raise ValueError("A method without needs_calibration asked for calibration windows.")
        return self.windows

    @property
    def source(self) -> Path:
        """The folder of the recipe's model, which holds its tokenizer."""
        checkpoint: Checkpoint = self.draft
        while (parent := getattr(checkpoint, "parent", None)) is not None:
            checkpoint = parent
        return checkpoint.folder

    def journal(self, name: str) -> Journal:
        """The journal of one walk over the layers; `name` tells the step's walks apart."""
        from compress.engine.journal import Journal

        return Journal(self.folder / name, self.draft)

    def generator(self) -> torch.Generator:
        """A fresh random generator with the run's seed."""
        import torch

        return torch.Generator().manual_seed(self.seed)


class Method(ABC, Generic[OptionsT]):
    """One compression method: ``class FLAP(Method["FLAP.Options"])`` declares its own options.

    Subclasses are stateless: everything is in the arguments.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[Paper]
    needs_calibration: ClassVar[bool] = True
    text_size: ClassVar[TextSize] = DEFAULT_SIZE
    """Calibration text of a recipe that does not say how much. More would make the result no better, or take
    too long on a CPU."""
    needs_package: ClassVar[str | None] = None
    """A library beyond those always installed; the extra that brings it has its name."""
    at_inference: ClassVar[bool] = False
    """Whether the step changes no weight, and the model acts by what was measured. Later steps work on the
    model without it, and `refresh` measures again on what they leave."""
    command: ClassVar[str | None] = None
    """The command of a method that is no step of a recipe, because it has several."""
    Options: type[OptionsT]

    @abstractmethod
    def plan(self, shape: ModelShape, options: OptionsT) -> ModelShape:
        """The shape of the model afterwards, from configs and headers alone (no weights are read).

        Raises:
            BadInput: the method cannot do this to a model of this shape.
        """

    @abstractmethod
    def apply(self, model: StreamedModel, options: OptionsT, context: StepContext) -> StepReport:
        """Do it: read ``model`` layer by layer and write what changes into ``context.draft``.

        Raises:
            BadInput: weights or calibration data are unusable (NaN, too few tokens, ...).
        """

    def refresh(
        self, model: StreamedModel, options: OptionsT, context: StepContext, before: Checkpoint
    ) -> StepReport:
        """For a method that acts at inference: `apply` again, after the other steps of the recipe.

        Args:
            model: with all that the other steps have changed.
            options: as in `apply`.
            context: of a step of its own.
            before: the model with what `apply` has measured.

        Raises:
            BadInput: as `apply`.
        """
        raise ValueError(f"{self.name} does not act at inference, but was asked to measure again.")
