"""Unlearning at inference: what is in config.json, and the hooks that it puts on a model.

Such a model has the weights it always had. Beside them it has statistics, which are tensors of its checkpoint
and buffers of modules that are added to its layers, and hooks that act by them. `compress.load` and the
streaming engine put the hooks on. Another program would not; so config.json names a model type and classes
that no other program knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.anatomy import anatomy_of, layer_shapes
from compress.engine.abstaining import Abstention, Check, KeySpace
from compress.engine.adjusting import Adjuster, Measured
from compress.engine.config import UNLEARNED_CLASS, UNLEARNED_TYPE, UNLEARNING
from compress.engine.passes import Pass
from compress.errors import BadInput
from compress.system.settings import Settings

ADJUSTER, KEY_SPACE = "neuron_adjust", "key_space"
"""The modules that are added to layers, and the entries of the section."""


class NeuronAdjustSettings(Settings):
    """How neurons are adjusted; the statistics are tensors.

    Attributes:
        seed: of the draws.
    """

    seed: int


class KeySpaceSettings(Settings):
    """How prompts are refused; the statistics are tensors. A plan does not know all of it.

    Attributes:
        check: which tokens decide.
        refusal: tokens of the answer.
        k: the largest distance of the keys that the statistics were taken on.
        width: h, the share of it that a key may be away.
    """

    check: Check
    refusal: tuple[int, ...] = ()
    k: float = 0.0
    width: float = 0.0


class AtInference(Settings):
    """What a model does at inference to unlearn: the section `UNLEARNING` of config.json."""

    neuron_adjust: NeuronAdjustSettings | None = None
    key_space: KeySpaceSettings | None = None

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """The settings in config.json (a dict) or a transformers config; None if there are none.

        Raises:
            BadInput: the section is not valid.
        """
        section = config.get(UNLEARNING) if isinstance(config, Mapping) else getattr(config, UNLEARNING, None)
        if section is None:
            return None
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (UNLEARNING, *first["loc"])))
            raise BadInput(f"config.json is not valid: {where}: {first['msg']}.") from None

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        named = {"neuron-adjust": self.neuron_adjust, "key-space": self.key_space}
        return tuple(name for name, settings in named.items() if settings is not None)

    def declared(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config.json`` of a model that does this as well, under names that no other program loads."""
        before = config.get(UNLEARNING, {})
        kind, names = str(config["model_type"]), config.get("architectures") or []
        return {
            **{key: value for key, value in config.items() if key != "auto_map"},
            "model_type": UNLEARNED_TYPE + kind.removeprefix(UNLEARNED_TYPE),
            "architectures": [UNLEARNED_CLASS + name.removeprefix(UNLEARNED_CLASS) for name in names],
            UNLEARNING: {**before, **self.model_dump(mode="json", exclude_none=True)},
        }


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model without what it does at inference."""
    return {
        **{key: value for key, value in config.items() if key != UNLEARNING},
        "model_type": config["model_type"].removeprefix(UNLEARNED_TYPE),
        "architectures": [name.removeprefix(UNLEARNED_CLASS) for name in config.get("architectures") or []],
    }


def is_statistic(name: str) -> bool:
    """Whether a tensor of a checkpoint is what a method measured."""
    return name.split(".")[-2:-1] in ([ADJUSTER], [KEY_SPACE])


def key_layer(config: Any) -> int:
    """The last layer that has an MLP, whose down projection reads the keys.

    Raises:
        BadInput: no layer has one.
    """
    widths = [shape.intermediate_size for shape in layer_shapes(config)]
    if not any(widths):
        raise BadInput("No layer of this model has an MLP, so it has no keys to detect.")
    return max(index for index, width in enumerate(widths) if width)


def act_at_inference(
    model: PreTrainedModel, settings: AtInference, device: str | torch.device = "cpu"
) -> None:
    """Make a decoder do what the settings say, from now on. Its statistics have to be filled in.

    Args:
        model: on any device, the meta device included.
        settings: what it does.
        device: where the statistics are.
    """
    anatomy, shapes, now = anatomy_of(model.config), layer_shapes(model.config), Pass()
    layers = model.base_model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    if (adjust := settings.neuron_adjust) is not None:
        for index, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
            if shape.intermediate_size:
                adjuster = Adjuster(index, shape.intermediate_size, adjust.seed, now, device)
                layer.add_module(ADJUSTER, adjuster)
                activation = layer.get_submodule(anatomy.activation)
                activation.register_forward_pre_hook(adjuster.before_activation)
        # The module that runs the layers; it is not always the base model (OPT).
        runner = model.base_model.get_submodule(anatomy.layers.rpartition(".")[0])
        runner.register_forward_pre_hook(now.read, with_kwargs=True)
    if (detect := settings.key_space) is not None:
        index = key_layer(model.config)
        space = KeySpace(shapes[index].intermediate_size, detect.k * detect.width, device)
        abstention = Abstention(space, detect.check, detect.refusal, len(layers), Pass())
        layers[index].add_module(KEY_SPACE, space)
        layers[index].get_submodule(anatomy.down).register_forward_hook(abstention.keep)
        model.register_forward_pre_hook(abstention.before, with_kwargs=True)
        model.register_forward_hook(abstention.after, with_kwargs=True)


def give_tokens(layer: nn.Module, tokens: Tensor, mask: Tensor) -> None:
    """Tell a layer that runs outside of its model which tokens it is given.

    Args:
        layer: of a model that adjusts neurons, or of any other.
        tokens: ids [B, T].
        mask: bool [B, T], False for padding.
    """
    adjuster = getattr(layer, ADJUSTER, None)
    if isinstance(adjuster, Adjuster):
        device = adjuster.selected.device
        adjuster.now.give(tokens.to(device), mask.to(device))


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Let a model compute as if it had unlearned nothing at inference, inside the ``with``."""
    measured = [module for module in model.modules() if isinstance(module, Measured)]
    for module in measured:
        module.acting = False
    try:
        yield
    finally:
        for module in measured:
            module.acting = True
