"""What a recipe will make of a model, from config.json and safetensors headers alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from compress.anatomy.roles import Anatomy, Sizes, anatomy_of, sizes_of, weight
from compress.engine.weights import config_of, skeleton
from compress.errors import BadInput
from compress.method import Method, MethodOptions
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint, TensorInfo


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
        from compress.storage.formats.base import Formats
        from compress.storage.formats.loaders import loaders
        from compress.storage.formats.stacks import STACKS

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


@dataclass(frozen=True)
class PlannedStep:
    """The prediction for the model after one step: sizes in bytes."""

    method: str
    nbytes: int
    parameters: int
    layers: int
    loads_with: str


@dataclass(frozen=True)
class Plan:
    """The shapes along a recipe: before, after every step, and at the end."""

    before: ModelShape
    after: ModelShape
    steps: list[PlannedStep]

    def document(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "before": _figures(self.before, self.before.num_layers),
            "after": _figures(self.after, self.after.num_layers),
            "steps": [{"method": step.method, **_figures(step, step.layers)} for step in self.steps],
        }


def _figures(shape: ModelShape | PlannedStep, layers: int) -> dict[str, Any]:
    return {
        "bytes": shape.nbytes,
        "parameters": shape.parameters,
        "bits_per_parameter": 8 * shape.nbytes / shape.parameters,
        "layers": layers,
        "loads_with": shape.loads_with,
    }


def make_plan(checkpoint: Checkpoint, steps: list[tuple[Method, MethodOptions]]) -> Plan:
    """Follow the shape of the model through the steps.

    Raises:
        BadInput: the architecture is not supported, a method's library is not installed, or a step cannot be
            done to the shape it meets.
    """
    before = shape = ModelShape.of(checkpoint)
    anatomy_of(before.pretrained_config)  # first of all, so that no method complains of something else
    planned = []
    for method, options in steps:
        if (package := method.needs_package) and find_spec(package) is None:
            raise BadInput(
                f"The method {method.name} needs {package}: pip install 'compress-model[{package}]'."
            )
        shape = method.plan(shape, options)
        planned.append(
            PlannedStep(method.name, shape.nbytes, shape.parameters, shape.num_layers, shape.loads_with)
        )
    return Plan(before, shape, planned)
