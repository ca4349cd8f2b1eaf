"""A model in which some weights are what a ladder makes of them, without writing anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from compress.engine.stream import StreamedModel
from compress.quantization.parts.ladder import Ladder
from compress.quantization.parts.sensitivity import Sensitivities
from compress.storage.checkpoint import Checkpoint


class Replaced(Checkpoint):
    """A checkpoint that reads as another one does, except for the weights that were given a type.

    Args:
        parent: the dense model.
        ladder: says what a weight becomes.
        found: the sensitivities of the model, which say how each weight is rounded best.
        kinds: full name of a linear or a table -> its type. All others stay dense.
        transposed: names of the weights that are stored as (in, out).
        copies: tensors that are left out, because they are a table that has another name as well. The result
            will hold that table once.
    """

    @classmethod
    def of(
        cls, model: StreamedModel, ladder: Ladder, found: Sensitivities, kinds: Mapping[str, str]
    ) -> Replaced:
        """The checkpoint of a dense model with some weights replaced."""
        anatomy = model.anatomy
        transposed = [name for name in kinds if anatomy.conv1d and anatomy.layer_index(f"{name}.weight") >= 0]
        table = f"{anatomy.in_model(anatomy.embeddings[0])}.weight"
        twice = anatomy.tied and table in model.checkpoint
        copies = [f"{head}.weight" for head in anatomy.heads] if twice else []
        return cls(model.checkpoint, ladder, found, kinds, transposed, copies)

    def __init__(
        self,
        parent: Checkpoint,
        ladder: Ladder,
        found: Sensitivities,
        kinds: Mapping[str, str],
        transposed: Iterable[str] = (),
        copies: Collection[str] = (),
    ) -> None:
        tensors = {name: info for name, info in parent.tensors.items() if name not in copies}
        super().__init__(parent.folder, parent.config, tensors, parent.sources)
        self._parent, self._ladder, self._found, self._kinds = parent, ladder, found, kinds
        self._transposed = frozenset(transposed)

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = self._parent.read_many(names)
        for stored, dense in tensors.items():
            name = stored.removesuffix(".weight")
            if stored.endswith(".weight") and name in self._kinds:
                turned = name in self._transposed
                rounded = self._found.rounded(
                    self._ladder, name, dense.T.float() if turned else dense, self._kinds[name]
                )
                tensors[stored] = rounded.T.contiguous() if turned else rounded
        return tensors
