"""Models that can be loaded at any size: each linear is a stack of blocks, and one order for all of them.

The first block of every linear is always loaded. After that, each step of the order adds the next block of
one linear. So every prefix of the order is a model, and the largest one that fits into memory is loaded. The
files hold the blocks in this order, so that loading a prefix reads nothing behind it.

In config.json, ``quantization_config`` holds ``modules``, the names of the linears; ``order``, the index of
one of them for every step; and ``outside``, the entry of their format if the head or the embedding are
packed. Block i of a linear is stored as ``{linear}.{part}_{i}`` for each of the parts that its class in
`compress.kernels.layers.stacked` names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackBlock, StackedLinear
from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import CASTABLE, TensorInfo

Entry = TypeVar("Entry")


class StackFormat(ABC):
    """How stacks of one kind are stored."""

    name: ClassVar[str]
    """The format's ``quant_method`` in config.json."""

    linear: ClassVar[type[StackedLinear]]
    """The layer that computes with the blocks."""

    marker: ClassVar[str] = "signs_0"
    """The tensor that every stacked linear has: ``{linear}.{marker}``."""

    arguments: ClassVar[tuple[str, ...]]
    """The arguments of the constructor, which config.json holds as well."""

    blocks: int
    """The number of blocks of every linear."""

    @abstractmethod
    def infos(self, index: int, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        """Dtypes and shapes of the parts of block ``index`` of a linear of ``shape`` (out, in)."""

    def tensor_infos(self, name: str, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        """Full names, dtypes and shapes of the tensors of all blocks of a linear of ``shape`` (out, in)."""
        return {
            f"{name}.{part}_{index}": info
            for index in range(self.blocks)
            for part, info in self.infos(index, shape).items()
        }

    def names(self, name: str, index: int) -> list[str]:
        """Full names of the tensors of one block."""
        return list(self.linear.keys(name, index).values())

    def read(
        self, name: str, checkpoint: Checkpoint, start: int = 0, stop: int | None = None
    ) -> list[StackBlock]:
        """The blocks from ``start`` up to ``stop`` (None for all) of a linear, if the checkpoint has them."""
        stop = self.blocks if stop is None else stop
        there = [index for index in range(start, stop) if self.names(name, index)[0] in checkpoint]
        tensors = checkpoint.read_many(key for index in there for key in self.names(name, index))
        return [
            StackBlock({part: tensors[key] for part, key in self.linear.keys(name, index).items()})
            for index in there
        ]

    def module(
        self, name: str, shape: tuple[int, int], checkpoint: Checkpoint, bias: torch.Tensor | None
    ) -> StackedLinear:
        """The linear ``name`` of ``shape`` (out, in) with all blocks that the checkpoint has.

        Raises:
            BadInput: a tensor has another dtype or shape than this format stores for such a linear.
        """
        for key, info in self.tensor_infos(name, shape).items():
            if key in checkpoint and checkpoint.tensors[key] != info:
                raise BadInput(
                    f"The tensor '{key}' is {checkpoint.tensors[key].shape} where {info.shape} was expected."
                )
        found = self.linear(shape[1], shape[0], self.read(name, checkpoint), bias)
        found.stored = name
        return found

    def quantization_config(
        self, modules: Sequence[str], kept: Sequence[str], outside: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The ``quantization_config`` entry of config.json, with an empty order.

        Args:
            modules: full names of the linears in blocks.
            kept: linears inside the layers that are not changed.
            outside: the entry of their format if the head or the embedding are packed.
        """
        return {
            "quant_method": self.name,
            **{key: getattr(self, key) for key in self.arguments},
            "ignore": list(kept),
            "outside": outside,
            "modules": list(modules),
            "order": [],
        }

    @classmethod
    def find(cls, config: Mapping[str, Any] | None) -> StackFormat | None:
        """The format that a ``quantization_config`` declares; None if there is none or it is not of a stack.

        Raises:
            BadInput: as `from_config`.
        """
        return cls.from_config(config) if config and config.get("quant_method") in list(STACKS) else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StackFormat:
        """The format that a ``quantization_config`` of a stack declares.

        Raises:
            BadInput: its entries are missing or damaged.
        """
        kind = STACKS[config["quant_method"]]
        modules, order = config.get("modules"), config.get("order")
        if not isinstance(modules, list) or not isinstance(order, list):
            raise BadInput(f"The quantization_config of this {kind.name} model lacks its modules and order.")
        try:
            form = kind(**{key: int(config[key]) for key in kind.arguments})
            counts = Counter(order)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"The quantization_config of this {kind.name} model is damaged: {error}."
            ) from None
        if not counts.keys() <= set(range(len(modules))) or max(counts.values(), default=0) >= form.blocks:
            raise BadInput(f"The order of this {kind.name} model names blocks that it does not have.")
        return form


class BitStackFormat(StackFormat):
    """Each block holds signs and a low-rank factorisation of the absolute values.

    Args:
        blocks: the number of blocks of every linear.
        rank: of the factors; lower where a dimension of the linear is lower.
    """

    name = "bitstack"
    linear = FactorStack
    arguments = ("blocks", "rank")

    def __init__(self, blocks: int, rank: int) -> None:
        self.blocks, self.rank = blocks, rank

    def infos(self, index: int, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        out, width = shape
        rank = min(self.rank, *shape)
        return {
            "signs": TensorInfo("U8", (out, -(-width // 8))),
            "left": TensorInfo("F16", (out, rank)),
            "right": TensorInfo("F16", (rank, width)),
        }


class NestedFormat(StackFormat):
    """The blocks hold the bits of one code: the first has the two leading bits, each other one the next bit.

    Args:
        bits: of the whole code.
        group_size: the most values along the input axis that share a scale; −1 for a whole row. Where it does
            not divide the width, as in pruned models, groups are a little smaller, and the last one more so.
    """

    name = "nested"
    linear = PlaneStack
    arguments = ("bits", "group_size")

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits, self.group_size = bits, group_size
        self.blocks = bits - 1

    def infos(self, index: int, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        out, width = shape
        signs = (out, -(-width // 8))
        if index:
            return {"signs": TensorInfo("U8", signs)}
        groups = 1 if self.group_size == CHANNEL else -(-width // self.group_size)
        return {"signs": TensorInfo("U8", (2, *signs)), "scales": TensorInfo("F16", (out, groups))}


STACKS: dict[str, type[StackFormat]] = {form.name: form for form in (BitStackFormat, NestedFormat)}
"""``quant_method`` -> the format of stacks."""


def laid_out(tensors: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a model in the order of its files: the blocks come last, in the order they are read in.

    Args:
        tensors: full name -> anything.
        config: the ``quantization_config`` of the model.
    """
    form, modules = StackFormat.from_config(config), config["modules"]
    blocks, counts = [(name, 0) for name in modules], Counter(dict.fromkeys(range(len(modules)), 1))
    for index in config["order"]:
        blocks.append((modules[index], counts[index]))
        counts[index] += 1
    last = [key for name, index in blocks for key in form.names(name, index)]
    return {name: tensors[name] for name in [*sorted(tensors.keys() - set(last)), *last]}


def stack_of(checkpoint: Checkpoint) -> StackFormat:
    """The format of a model that is stored in stacks of blocks.

    Raises:
        BadInput: the model is not stored so.
    """
    form = StackFormat.find(checkpoint.config.get("quantization_config"))
    if form is None:
        raise BadInput(
            f"The model in '{checkpoint.folder}' has one size only; the memory can be chosen only for models "
            f"made with {' or '.join(STACKS)}."
        )
    return form


def sizes(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> list[int]:
    """Bytes of the model before the first step of its order and after each step.

    Args:
        checkpoint: with all blocks, or a prefix.
        dtype: of the floating-point tensors outside the stacks once they are loaded, except the scales of
            packed ones, which keep theirs; None for the dtypes they are stored with.
    """
    form = stack_of(checkpoint)
    config = checkpoint.config["quantization_config"]
    modules, order = config["modules"], config["order"]
    blocks = {key for name in modules for index in range(form.blocks) for key in form.names(name, index)}
    total = sum(
        info.nbytes
        if dtype is None or info.dtype not in CASTABLE or name.endswith(".weight_scale")
        else info.numel * dtype.itemsize
        for name, info in checkpoint.tensors.items()
        if name not in blocks
    )

    def nbytes(name: str, index: int) -> int:
        return sum(checkpoint.tensors[key].nbytes for key in form.names(name, index))

    found = [total + sum(nbytes(name, 0) for name in modules)]
    counts: Counter[int] = Counter()
    for index in order:
        counts[index] += 1
        found.append(found[-1] + nbytes(modules[index], counts[index]))
    return found


def steps_within(checkpoint: Checkpoint, memory: int | None, dtype: torch.dtype | None = None) -> int:
    """The largest number of steps with which the model takes at most ``memory`` bytes; None for all steps.

    Raises:
        BadInput: not even the first blocks fit.
    """
    found = sizes(checkpoint, dtype)
    if memory is None:
        return len(found) - 1
    if memory < found[0]:
        raise BadInput(
            f"{memory / 1e6:,.1f} MB is too little for the model in '{checkpoint.folder}'; its smallest size "
            f"is {found[0] / 1e6:,.1f} MB."
        )
    return bisect_right(found, memory) - 1


def counts_after(checkpoint: Checkpoint, steps: int) -> dict[str, int]:
    """Full name of every linear -> the number of its blocks after some steps of the order."""
    config = checkpoint.config["quantization_config"]
    counts = Counter(config["order"][:steps])
    return {name: 1 + counts[index] for index, name in enumerate(config["modules"])}


def prefix(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """The model after some steps of its order: it has the same files, without the blocks of later steps."""
    config = checkpoint.config["quantization_config"]
    if steps == len(config["order"]):
        return checkpoint
    shortened = {**config, "order": config["order"][:steps]}
    return with_blocks(
        checkpoint, {**checkpoint.config, "quantization_config": shortened}, counts_after(checkpoint, steps)
    )


def with_blocks(checkpoint: Checkpoint, config: dict[str, Any], counts: Mapping[str, int]) -> Checkpoint:
    """The same checkpoint with another config, in which some linears (name -> number) have fewer blocks."""
    form = StackFormat.from_config(config["quantization_config"])
    dropped = {
        key
        for name, count in counts.items()
        for index in range(count, form.blocks)
        for key in form.names(name, index)
    }
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in dropped}
    sources = {name: source for name, source in checkpoint.sources.items() if name not in dropped}
    return Checkpoint(checkpoint.folder, config, tensors, sources)
