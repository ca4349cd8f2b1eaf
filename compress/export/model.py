"""The model that is exported: its weights as they are stored, as codes, or dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from compress.engine.opening import open_checkpoint
from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.weight import LowBitWeight
from compress.kernels.layers.adapted import A, B
from compress.sources.find import ModelSource
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import Format
from compress.storage.formats.stacks import StackFormat
from compress.storage.formats.table import Formats
from compress.storage.sharded import refuse_sharded
from compress.storage.tensors import DTYPE_NAMES


@dataclass(frozen=True)
class ExportedModel:
    """A model that is to be exported.

    Attributes:
        source: where it was found.
        checkpoint: its files, opened.
    """

    source: ModelSource
    checkpoint: Checkpoint

    @classmethod
    def open(cls, source: ModelSource) -> ExportedModel:
        """Open the folder of a model.

        Raises:
            BadInput: it is not a model that can be read, or what it computes is not in its weights: it
                unlearns at inference, or is an ensemble.
        """
        checkpoint = open_checkpoint(source.folder)
        refuse_sharded(checkpoint.config, source.folder)
        model = cls(source, checkpoint)
        if methods := model.shape.loads_with.at_inference:
            raise BadInput(
                f"'{source.id}' unlearns at inference ({' and '.join(methods)}), which no other program "
                "does: an export would hold what it unlearned; unlearn with a method that changes weights, "
                "such as npo, to export the result."
            )
        return model

    @cached_property
    def shape(self) -> ModelShape:
        """Config and tensors, without data."""
        return ModelShape.of(self.checkpoint)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of every linear inside the layers."""
        return self.shape.linears()

    @cached_property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of linears are rounded when the model runs."""
        forms = self.packed.values()
        return self.shape.loads_with.eight_bit_inputs or any(form.rounds_inputs for form in forms)

    @property
    def table(self) -> str:
        """Full name of the token embedding."""
        return self.shape.anatomy.in_model(self.shape.anatomy.embeddings[0])

    @cached_property
    def stack(self) -> StackFormat | None:
        """How the linears are stored in blocks; None if they are not."""
        return StackFormat.find(self.checkpoint.config.get("quantization_config"))

    @cached_property
    def stacked(self) -> tuple[str, ...]:
        """Full names of the linears that are stored in blocks."""
        if self.stack is None:
            return ()
        return tuple(name for name in self.linears if f"{name}.{self.stack.marker}" in self.checkpoint)

    @cached_property
    def packed(self) -> dict[str, Format]:
        """Full name of a packed linear, head or token embedding -> its format."""
        section = self.checkpoint.config.get("quantization_config")
        if self.stack is not None and section is not None:
            section = section.get("outside")
        if not section:
            return {}
        formats, head = Formats(section), self.shape.anatomy.head
        names = [*self.linears, self.table, *([head] if head else [])]
        return {
            name: formats.of(name, "Embedding" if name == self.table else "Linear")
            for name in dict.fromkeys(names)
            if f"{name}.{formats.marker}" in self.checkpoint
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not packed, as config.json says."""
        config = self.checkpoint.config  # that of transformers changes when a skeleton is built
        stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        return stated if stated in DTYPE_NAMES else torch.float32

    def size(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear inside the layers, the head or the token embedding."""
        if name in self.linears:
            return self.linears[name]
        embedding = self.shape.skeleton.get_input_embeddings().weight
        return tuple(embedding.shape)

    def tensors_of(self, name: str) -> set[str]:
        """The stored tensors of the weight of a packed or stacked module, with its adapter."""
        if name in self.packed:
            found = set(self.packed[name].tensor_infos(name, self.size(name), DTYPE_NAMES[self.dtype]))
        else:
            assert self.stack is not None
            found = {key for index in range(self.stack.blocks) for key in self.stack.names(name, index)}
        return (found | {f"{name}{A}", f"{name}{B}"}) & self.checkpoint.tensors.keys()

    def codes(self, name: str) -> LowBitWeight:
        """The weight of a packed module as codes and scales, without its adapter."""
        found = self.packed[name].read(name, self.checkpoint.read)
        if found.shape != self.size(name):
            raise BadInput(f"'{name}' is {found.shape} where config.json asks for {self.size(name)}.")
        return found

    def dense(self, name: str) -> torch.Tensor:
        """The weight of a packed or stacked module as real numbers, float32 [out, in], with its adapter."""
        if name in self.packed:
            found = self.codes(name).dequantize()
        else:
            assert self.stack is not None
            module = self.stack.module(name, self.size(name), self.checkpoint, None)
            found = module.dequantize_rows(slice(None))
        if f"{name}{A}" in self.checkpoint:
            down, up = (self.checkpoint.read(f"{name}{part}").float() for part in (A, B))
            found = found + adapter.scaling(self.checkpoint.config[adapter.KEY]) * (up @ down)
        return found
