"""Targets that store packed linears: codes are carried over, and stored as the target's format says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from compress.engine.key_values import KEY
from compress.errors import BadInput
from compress.export.base import Chosen, FolderTarget
from compress.export.codes import integer_codes
from compress.export.converted import Converted, Made
from compress.export.huggingface import rounding_notes, unpacked
from compress.export.model import ExportedModel
from compress.kernels.codes.integer import QuantizedWeight
from compress.kernels.codes.weight import LowBitWeight
from compress.quantization.parts.layout import linears_outside
from compress.storage import adapter
from compress.storage.formats.base import Format
from compress.storage.tensors import DTYPE_NAMES

PLAIN = "export it as huggingface, which unpacks it"


@dataclass(frozen=True)
class Stored:
    """How a module of the export is stored.

    Attributes:
        form: its format.
        scales: the dtype of its scales, in the spelling of safetensors.
    """

    form: Format
    scales: str


class RepackedTarget(FolderTarget[Chosen]):
    """A target that holds linears as codes, each in one of its own formats."""

    how: ClassVar[str]
    """The command that makes a model for this target, as the end of an error message."""

    packs_tables: bool = False
    """Whether the head and the token embedding can be packed."""

    has_conv1d: ClassVar[bool] = False
    """Whether the runtime loads the packed Conv1D modules of GPT-2."""

    has_pruned: ClassVar[bool] = False
    """Whether the runtime loads packed linears of layers that differ in shape."""

    rounds_cache: ClassVar[bool] = False
    """Whether the runtime is told that keys and values are cached in few bits."""

    has_adapters: ClassVar[bool] = False
    """Whether an adapter can lie beside the packed linears."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def notes(self) -> tuple[str, ...]:
        return tuple(self._found)

    @abstractmethod
    def stored(self, model: ExportedModel, name: str, form: Format, options: Chosen) -> Stored:
        """How the module ``name``, which is stored in ``form``, is stored in the export.

        Raises:
            BadInput: the target has no such codes.
        """

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        """The weight on the grid of the target, with the same points. It may add notes.

        Raises:
            BadInput: the weight does not fit.
        """
        return weight

    def declared(
        self,
        config: dict[str, Any],
        linears: Mapping[str, Any],
        around: Mapping[str, Any],
        skipped: list[str],
        outside: list[str],
    ) -> dict[str, Any]:
        """config.json with the section that declares the formats."""
        form = next(iter(linears.values()))
        return {**config, "quantization_config": form.describe(linears, around, skipped, outside)}

    def converted(self, model: ExportedModel, options: Chosen) -> tuple[Converted, tuple[str, ...]]:
        self.refuse(model)
        anatomy, notes = model.shape.anatomy, dict.fromkeys(self.rounding(model))
        stored: dict[str, Stored] = {}
        made: list[Made] = []
        dense: list[str] = []
        same: list[str] = []
        for name, form in model.packed.items():
            if name not in model.linears and not self.packs_tables:
                dense.append(name)
                made.append(unpacked(model, name, model.dtype))
                continue
            here = model.table if self.packs_tables and anatomy.tied and name == anatomy.head else name
            stored[here] = self.stored(model, name, form, options)
            if stored[here].form is form and here == name:
                same.append(name)
                continue
            made.append(self._made(model, name, here, stored[here]))
            if form.bits != stored[here].form.bits:
                wider = f"Codes of {form.bits} bits are stored in {stored[here].form.bits} bits."
                notes[wider] = None
        if dense:
            kind = str(model.dtype).removeprefix("torch.")
            notes[f"{' and '.join(dense)} unpacked to {kind}: {self.name} packs linears only."] = None
        changed = [name for name in model.packed if name not in same]
        gone = {key for name in changed for key in model.tensors_of(name) if not adapter.is_adapter(key)}
        config = {
            key: value
            for key, value in model.checkpoint.config.items()
            if key not in ("quantization_config", "quantization") and (key != KEY or self.rounds_cache)
        }
        forms = {each: there.form for name, there in stored.items() for each in anatomy.names_of(name)}
        # A head that is the packed table itself is no linear that is left as it is.
        heads = anatomy.heads if anatomy.tied and model.table in stored else ()
        apart = (name for name in linears_outside(model.shape) if name not in heads)
        outside = (each for name in apart for each in anatomy.names_of(name))
        config = self.declared(
            config,
            {name: form for name, form in forms.items() if name in model.linears},
            {name: form for name, form in forms.items() if name not in model.linears},
            [name for name in model.linears if name not in stored],
            [name for name in outside if name not in forms],
        )
        kept = [name for name in model.checkpoint.tensors if name not in gone]
        return Converted(model.checkpoint, config, kept, made), tuple(notes)

    def rounding(self, model: ExportedModel) -> tuple[str, ...]:
        """What the model rounds when it runs, and the export does not, in sentences."""
        return rounding_notes(model)

    def refuse(self, model: ExportedModel) -> None:
        """Refuse what no packed format of this target can hold.

        Raises:
            BadInput: it is not packed, is stored in blocks, or has an adapter where none can be.
        """
        if model.stack is not None:
            raise BadInput(
                f"The linears of '{model.source.id}' are stored in blocks ({model.stack.name}), which "
                f"{self.name} does not have; {PLAIN}."
            )
        if not any(name in model.linears for name in model.packed):
            raise BadInput(
                f"'{model.source.id}' has no packed linears, and an export rounds nothing; {self.how} first."
            )
        if adapter.KEY in model.checkpoint.config and not self.has_adapters:
            raise BadInput(
                f"'{model.source.id}' has an adapter beside its codes, which {self.name} does not have; "
                "export it as compressed-tensors, which keeps it, or as huggingface, which merges it."
            )
        if model.shape.is_pruned and not self.has_pruned:
            raise BadInput(
                f"The layers of '{model.source.id}' differ in shape, and {self.runtime} loads none that are "
                "packed; export it as compressed-tensors, or prune with --shape uniform."
            )
        if model.shape.anatomy.conv1d and not self.has_conv1d:
            raise BadInput(
                f"The linears of {model.shape.anatomy.model_type} are Conv1D modules, which {self.runtime} "
                f"cannot load packed; {PLAIN}."
            )

    def no_codes(self, name: str, form: Format) -> BadInput:
        """The error for a format of which this target has no codes."""
        kind = "integers" if integer_codes(form) else getattr(form, "type", form.name)
        return BadInput(
            f"'{name}' is stored in {kind} of {form.bits} bits, which {self.name} does not have, and an "
            f"export rounds nothing again; {self.how}, or {PLAIN}."
        )

    def _made(self, model: ExportedModel, name: str, here: str, stored: Stored) -> Made:
        def make() -> dict[str, torch.Tensor]:
            return stored.form.tensors(here, self.repacked(name, model.codes(name), stored))

        return Made(stored.form.tensor_infos(here, model.size(name), stored.scales), make)


def dtype_of_scales(model: ExportedModel, name: str, form: Format) -> str:
    """The dtype, in the spelling of safetensors, in which the scales of a packed module are stored."""
    for part in ("weight_scale", "scales"):
        if (key := f"{name}.{part}") in model.checkpoint:
            return model.checkpoint.tensors[key].dtype
    return DTYPE_NAMES[form.scale_dtype(model.dtype)]


def integers(name: str, weight: LowBitWeight, target: str) -> QuantizedWeight:
    """The weight, if it lies on a grid of integer zero points.

    Raises:
        BadInput: it does not.
    """
    if not isinstance(weight, QuantizedWeight):
        raise BadInput(
            f"The offsets of '{name}' are not whole multiples of its scales, or its groups or zero points "
            f"are not those that config.json declares, so its codes cannot be stored as {target}; {PLAIN}."
        )
    return weight
