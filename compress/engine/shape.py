"""The shape of a model that may not exist yet: its config and its table of tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from compress.anatomy import Anatomy, Sizes, anatomy_of, sizes_of, weight
from compress.engine.at_inference import AtInference
from compress.engine.config import config_of
from compress.engine.key_values import KEY
from compress.engine.skeleton import skeleton
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.loaders import COMPRESS_MODEL_ONLY, LoadsWith, loads_with
from compress.storage.formats.stacks import STACKS
from compress.storage.formats.table import Formats
from compress.storage.sharded import is_sharded
from compress.storage.tensors import TensorInfo


class ModelShape:
    """config.json and the table of tensors of a model that may not exist yet.

    Attributes:
        config: config.json as a dict.
        tensors: name -> dtype and shape.
        folder: of the checkpoint it was made from, for error messages.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Any = None
    ) -> None:
        self.config = copy.deepcopy(dict(config))
        self.tensors = dict(tensors)
        self.folder = folder

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelShape:
        return cls(checkpoint.config, checkpoint.tensors, checkpoint.folder)

    @cached_property
    def pretrained_config(self) -> Any:
        """The transformers config, without a quantization section."""
        return config_of(self)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the parts are, by the names of the tensors.

        Raises:
            BadInput: the architecture is not in the table.
        """
        return anatomy_of(self.pretrained_config).located(self.tensors)

    @cached_property
    def skeleton(self) -> Any:
        """The transformers model without memory for its weights."""
        return skeleton(self.pretrained_config)

    @property
    def sizes(self) -> Sizes:
        """hidden_size and the like, under one set of names."""
        return sizes_of(self.pretrained_config)

    @property
    def num_layers(self) -> int:
        return self.pretrained_config.num_hidden_layers

    @property
    def is_pruned(self) -> bool:
        """Whether the layers differ, so that the model needs modelling code of its own."""
        return "pruned" in self.config

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out_features, in_features) of every linear inside the layers."""
        found = {}
        for index, layer in enumerate(self.skeleton.base_model.get_submodule(self.anatomy.layers)):
            for path, linear in self.anatomy.linears(layer).items():
                out, width = weight(linear).shape
                found[f"{self.anatomy.layer_name(index)}.{path}"] = (out, width)
        return found

    def derive(
        self,
        config: Mapping[str, Any] | None = None,
        remove: Iterable[str] = (),
        add: Mapping[str, TensorInfo] | None = None,
    ) -> ModelShape:
        """A changed copy, with another config and some tensors removed or added."""
        remove = set(remove)
        tensors = {name: info for name, info in self.tensors.items() if name not in remove}
        return ModelShape(config or self.config, tensors | dict(add or {}), self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        """Parameters of the architecture, tied ones counted once. Packing does not change their number."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def loads_with(self) -> LoadsWith:
        """Which programs besides compress-model can load a model of this shape."""
        if (unlearning := AtInference.of(self.config)) is not None:
            return LoadsWith(transformers=False, at_inference=unlearning.methods)
        if is_sharded(self.config):
            return COMPRESS_MODEL_ONLY
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if quantization else None
        if method in STACKS or (self.is_pruned and method not in (None, CompressedTensorsFormat.name)):
            return COMPRESS_MODEL_ONLY
        found = LoadsWith()
        if quantization:
            found = loads_with(
                quantization,
                conv1d=self.anatomy.conv1d,
                packed_embedding=self._has_packed_embedding(Formats(quantization)),
                flat_inputs=self.anatomy.flat_mlp,
                linears=self.linears().values(),
            )
        return replace(
            found,
            trust_remote_code=self.is_pruned,
            adapter=adapter.KEY in self.config,
            key_value_bits=self.config[KEY]["bits"] if KEY in self.config else None,
        )

    def _has_packed_embedding(self, formats: Formats) -> bool:
        """Whether the token embedding is packed, under its own name or that of a head it is tied to."""
        names = [self.anatomy.in_model(self.anatomy.embeddings[0])]
        if self.anatomy.tied and self.anatomy.head is not None:
            names.append(self.anatomy.head)
        return any(f"{name}.{formats.marker}" in self.tensors for name in names)
