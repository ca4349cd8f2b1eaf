"""The shape of a model that may not exist yet: its config and its table of tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from compress.anatomy import Anatomy, Sizes, anatomy_of, sizes_of, weight
from compress.engine.config import config_of
from compress.engine.skeleton import skeleton
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import TensorInfo


class ModelShape:
    """config.json and the table of tensors of a model that may not exist yet.

    Attributes:
        config: config.json as a dict.
        tensors: name -> dtype and shape.
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
        """Where the parts are, by the names the tensors have.

        Raises:
            BadInput: an architecture that is not in the table, or tensors that do not fit it.
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
        """Whether the layers differ, which takes modelling code that comes with the model."""
        return "pruned" in self.config

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out_features, in_features) of every linear inside the layers."""
        layers = self.skeleton.base_model.get_submodule(self.anatomy.layers)
        return {
            f"{self.anatomy.layer_name(index)}.{path}": tuple(weight(linear).shape)
            for index, layer in enumerate(layers)
            for path, linear in self.anatomy.linears(layer).items()
        }

    def derive(
        self,
        config: Mapping[str, Any] | None = None,
        remove: Iterable[str] = (),
        add: Mapping[str, TensorInfo] | None = None,
    ) -> ModelShape:
        """A changed copy: another config, some tensors removed, some added."""
        remove = set(remove)
        tensors = {name: info for name, info in self.tensors.items() if name not in remove}
        return ModelShape(config or self.config, tensors | dict(add or {}), self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        """Parameters of the architecture, tied ones counted once; packing does not change their number."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def loads_with(self) -> str:
        """Who can load a model of this shape."""
        from compress.engine.key_values import KEY

        who = self._loads_with
        if KEY in self.config and who != "compress-model only":
            who += f" ({self.config[KEY]['bits']}-bit keys and values with compress-model only)"
        return who

    @property
    def _loads_with(self) -> str:
        from compress.storage.formats.loaders import loaders
        from compress.storage.formats.stacks import STACKS
        from compress.storage.formats.table import Formats

        quantization = self.config.get("quantization_config")
        if quantization and quantization.get("quant_method") in STACKS:
            return "compress-model only"
        who = "transformers"
        if quantization:
            tables = [self.anatomy.in_model(self.anatomy.embeddings[0])]
            tables += [self.anatomy.head] if self.anatomy.tied else []
            packed = any(f"{name}.{Formats(quantization).marker}" in self.tensors for name in tables)
            who = loaders(
                quantization,
                conv1d=self.anatomy.conv1d,
                packed_embedding=packed,
                linears=self.linears().values(),
            )
        adapted = ", and peft for the adapter" if adapter.KEY in self.config else ""
        if self.is_pruned:
            seen = not quantization or quantization.get("quant_method") == "compressed-tensors"
            if not seen or "transformers" not in who:
                return "compress-model only"
            return f"{who} (trust_remote_code=True){adapted}"
        return f"{who}{adapted}" if who != "compress-model only" else who
