"""Models of which any size can be loaded: every linear is a stack of blocks, and one order for all of them.

The first block of every linear is always there. After that each step of the order adds the next block of one
linear, so every prefix of the order is a model, and the largest one that fits into the memory there is gets
loaded. The files hold the blocks in this order, so that reading a prefix touches nothing behind it.

In config.json ``quantization_config`` holds ``modules``, the names of the linears, ``order``, the index of
one of them for every step, and ``outside``, how the head and the embedding are packed if they are. StackBlock i of
a linear is stored as ``{linear}.{part}_{i}`` for each part that `compress.kernels.layers.stacked` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackBlock, StackedLinear
from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import CASTABLE, TensorInfo


class StackFormat(ABC):
    """How stacks of one kind are stored."""

    name: ClassVar[str]
    linear: ClassVar[type[StackedLinear]]
    marker: ClassVar[str] = "signs_0"
    """The tensor that every stacked linear has: ``{linear}.{marker}``."""
    arguments: ClassVar[tuple[str, ...]]
    """Of the constructor, which config.json holds."""
    blocks: int
    """Of every linear."""

    @abstractmethod
    def infos(self, index: int, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        """Dtypes and shapes of the parts of block ``index`` of a linear of ``shape`` (out, in)."""

    def tensor_infos(self, name: str, shape: tuple[int, int]) -> dict[str, TensorInfo]:
        """Full names, dtypes and shapes of all blocks of a linear."""
        return {
            f"{name}.{part}_{index}": info
            for index in range(self.blocks)
            for part, info in self.infos(index, shape).items()
        }

    def names(self, name: str, index: int) -> list[str]:
        """Full names of the tensors of one block."""
        return [f"{name}.{part}_{index}" for part in self.linear.parts(index)]

    def read(
        self, name: str, checkpoint: Checkpoint, start: int = 0, stop: int | None = None
    ) -> list[StackBlock]:
        """Blocks ``start`` to ``stop`` of a linear, as far as the checkpoint has them."""
        stop = self.blocks if stop is None else stop
        there = [index for index in range(start, stop) if self.names(name, index)[0] in checkpoint]
        tensors = checkpoint.read_many(key for index in there for key in self.names(name, index))
        return [
            StackBlock({part: tensors[f"{name}.{part}_{index}"] for part in self.linear.parts(index)})
            for index in there
        ]

    def module(
        self, name: str, shape: tuple[int, int], checkpoint: Checkpoint, bias: torch.Tensor | None
    ) -> StackedLinear:
        """The linear of ``shape`` (out, in) with all the blocks that the checkpoint has.

        Raises:
            BadInput: a tensor has another shape than this format stores for such a linear.
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
            kept: linears inside the layers that stay as they are.
            outside: of the head and the embedding if they are packed, the entry of their format.
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
        """`from_config`, or None where a ``quantization_config`` is missing or declares something else."""
        return cls.from_config(config) if config and config.get("quant_method") in STACKS else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StackFormat:
        """The format that a ``quantization_config`` declares.

        Raises:
            BadInput: it is not one of a stack.
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
    """Signs, and a low-rank factorisation of the absolute value.

    Args:
        blocks: of every linear.
        rank: of the factors; less where a dimension of the linear is less.
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
    """The bits of one code, the two leading ones in the first block and each other one in a block of its own.

    Args:
        bits: of all planes together.
        group_size: values that share a scale along the input axis, at most; −1: a whole row. Where it does
            not divide the width, as in pruned models, all groups but the last are a little smaller.
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


def stack_of(checkpoint: Checkpoint) -> StackFormat:
    """The format of a model that is stored in blocks.

    Raises:
        BadInput: the model is not.
    """
    form = StackFormat.find(checkpoint.config.get("quantization_config"))
    if form is None:
        raise BadInput(
            f"The model in '{checkpoint.folder}' has one size only; memory can be chosen for models made "
            f"with {' or '.join(STACKS)}."
        )
    return form


def sizes(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> list[int]:
    """Bytes of the model without any step of its order, and after each one.

    Args:
        checkpoint: with all blocks, or a prefix.
        dtype: that floating-point tensors outside the stacks are loaded in, scales of packed ones apart;
            None: as they are stored.
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
    """The most steps of the order with which the whole model takes at most ``memory`` bytes (None: all).

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
    """Full name of every linear -> its blocks after some steps of the order."""
    config = checkpoint.config["quantization_config"]
    counts = Counter(config["order"][:steps])
    return {name: 1 + counts[index] for index, name in enumerate(config["modules"])}


def prefix(checkpoint: Checkpoint, steps: int) -> Checkpoint:
    """The model after some steps of its order: the same files, with the blocks behind them left out."""
    config = checkpoint.config["quantization_config"]
    if steps == len(config["order"]):
        return checkpoint
    shortened = {**config, "order": config["order"][:steps]}
    return with_blocks(
        checkpoint, {**checkpoint.config, "quantization_config": shortened}, counts_after(checkpoint, steps)
    )


def with_blocks(checkpoint: Checkpoint, config: dict[str, Any], counts: Mapping[str, int]) -> Checkpoint:
    """A checkpoint in which some linears have only so many of their blocks (name -> number)."""
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
