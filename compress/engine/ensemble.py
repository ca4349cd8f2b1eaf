"""An ensemble of models that share a base: each adds a LoRA of its own, and their logits are averaged."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from compress.anatomy import weight
from compress.engine.key_values import CACHE_NAMES
from compress.errors import BadInput
from compress.kernels.layers.adapted import A, B

BATCHED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
"""The arguments of a forward pass that have a row for each row of the batch."""


class MembersLinear(nn.Module):
    """A linear that several models share, each of which adds its own low-rank product.

    The input [M·N, ..., in] holds the rows of the first model, then those of the second, and so on. The
    rows x of model m become W x + bias + scaling · B_m A_m x.

    Args:
        linear: the shared linear.
        lora_A: float [M, r, in], zero where a model has none.
        lora_B: float [M, out, r].
        scaling: the factor.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, linear: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        members = len(self.lora_A)
        if len(input) % members:
            raise BadInput(f"This model is an ensemble of {members}; call the whole model, not a part of it.")
        rows = input.reshape(members, -1, input.shape[-1])
        low_rank = rows @ self.lora_A.mT @ self.lora_B.mT
        output = self.linear(input)
        return torch.add(output, low_rank.view_as(output), alpha=self.scaling)


def join(model: PreTrainedModel, members: Sequence[Mapping[str, Tensor]], scaling: float) -> None:
    """Turn a base model into an ensemble of models that add their LoRA to it.

    From then on the model's logits are the mean of its members' logits, computed in float32. One pass
    computes all members, as so many copies of the batch, with one cache, so ``generate`` works with every way
    to search. A loss is that of the mean logits. Hidden states and attention maps differ from member to
    member, so they are refused.

    Args:
        model: in evaluation mode. Its linears are replaced in place.
        members: of each, ``{linear}.lora_A.weight`` [r, in] and ``{linear}.lora_B.weight`` [out, r]. A linear
            that a member does not name stays as in the base. Without members nothing changes.
        scaling: the factor of B A.

    Raises:
        BadInput: a LoRA does not fit the model.
    """
    names = dict.fromkeys(key.removesuffix(A) for member in members for key in member if key.endswith(A))
    for name in names:
        model.set_submodule(name, _shared(model, name, members, scaling))
    if members:
        model.__class__ = _ensemble_class(type(model), len(members))
        object.__setattr__(model, "save_pretrained", _refuse_to_save)


def _shared(
    model: nn.Module, name: str, members: Sequence[Mapping[str, Tensor]], scaling: float
) -> MembersLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise BadInput(f"There is a LoRA for '{name}', which this model does not have.") from None
    out, width = weight(linear).shape
    like = weight(linear)
    rank = next(len(member[f"{name}{A}"]) for member in members if f"{name}{A}" in member)
    first, second = like.new_zeros(len(members), rank, width), like.new_zeros(len(members), out, rank)
    for number, member in enumerate(members):
        for target, key in ((first, f"{name}{A}"), (second, f"{name}{B}")):
            if key not in member:
                continue
            if member[key].shape != target.shape[1:]:
                raise BadInput(
                    f"The LoRA '{key}' has the shape {tuple(member[key].shape)}, not the "
                    f"{tuple(target.shape[1:])} that fits this model."
                )
            target[number] = member[key].to(target)
    return MembersLinear(linear, first, second, scaling)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise BadInput("An ensemble is not saved as one model; copy the folder that it was loaded from.")


def _ensemble_class(cls: type[PreTrainedModel], members: int) -> type[PreTrainedModel]:
    """The class of a model whose forward pass is the mean of its members', under the name of ``cls``."""
    plain = cls.forward
    signature = inspect.signature(plain)

    @functools.wraps(plain)  # ``generate`` looks at the names of the arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        bound.pop("self")
        given = {**bound, **bound.pop("kwargs", {})}
        labels = given.pop("labels", None)
        wanted = given.pop("return_dict", None)
        _check(self, given)
        rows = next(
            len(given[name]) for name in ("input_ids", "inputs_embeds") if given.get(name) is not None
        )
        for name in BATCHED:
            if isinstance(value := given.get(name), Tensor) and len(value) == rows:
                given[name] = value.repeat(members, *[1] * (value.dim() - 1))
        output = plain(self, **given, return_dict=True)
        logits = output.logits.unflatten(0, (members, rows))
        output["logits"] = logits.float().mean(0).to(logits.dtype)
        if labels is not None:
            output["loss"] = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size
            )
        cache = next((value for name, value in output.items() if name in CACHE_NAMES), None)
        _let_reorder(cache, rows, members)
        dictionary = self.config.return_dict if wanted is None else wanted
        return output if dictionary else _in_order(output).to_tuple()

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _check(model: Any, given: Mapping[str, Any]) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        if given.get(name) or (given.get(name) is None and getattr(model.config, name, False)):
            raise BadInput(f"The members of an ensemble differ inside; leave out {name}=True.")


def _in_order(output: ModelOutput) -> ModelOutput:
    """The same output, with a loss in its first place."""
    return type(output)(**output)


def _let_reorder(cache: Any, rows: int, members: int) -> None:
    """Let beam search and the like choose among the rows of the batch in a cache that has them once for each
    member. They may choose more or fewer than there are."""
    if cache is None:
        return
    plain = type(cache).reorder_cache

    def reorder_cache(chosen: Tensor) -> None:
        nonlocal rows
        plain(cache, torch.cat([chosen + number * rows for number in range(members)]))
        rows = len(chosen)

    cache.reorder_cache = reorder_cache
