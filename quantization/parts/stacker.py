"""Making stacks of blocks (see `compress.storage.formats.stacks`): what every such method shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.layers.stacked import StackBlock
from compress.method import MethodOptions, StepReport
from compress.quantization.parts.layout import Bits, around_bits, linears_outside, matches
from compress.quantization.parts.packer import round_by_rows
from compress.storage.draft import Draft
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.stacks import StackFormat, sizes


class StackOptions(MethodOptions):
    """How the order is found, and which linears are left alone."""

    importance: Literal["gradient", "perplexity"] = Field(
        "gradient",
        description="what decides which linear gets its next block first; gradient: the loss that its "
        "residual causes, by squared gradients of one backward pass, for each byte; perplexity: as "
        "published, level by level, by trying every linear, which takes hundreds of passes for each level",
    )
    order_windows: PositiveInt = Field(
        16, description="calibration windows that the order is found on, of 128 tokens at most"
    )
    ignore: list[str] = Field(
        [], description="linears to keep: full names, globs, or regular expressions after 're:'"
    )
    lm_head_bits: Bits | None = Field(
        None, description="round the head to the nearest with so many bits; kept if not given"
    )
    embedding_bits: Bits | None = Field(
        None, description="the same for the token embedding, which is one table with a tied head"
    )


def plan_stacked(shape: ModelShape, options: StackOptions, form: StackFormat) -> ModelShape:
    """The shape of the model with all blocks of its linears.

    Raises:
        BadInput: the model is quantized already, nothing is left to quantize, or a linear does not fit.
    """
    if "quantization_config" in shape.config:
        method = shape.config["quantization_config"].get("quant_method")
        raise BadInput(f"This model is already quantized ({method}); start from the model it was made of.")
    if options.importance == "perplexity" and (shape.anatomy.kind != "decoder" or shape.anatomy.head is None):
        raise BadInput("Only causal language models have a perplexity; use --importance gradient.")
    linears = shape.linears()
    names = [*linears, *linears_outside(shape)]
    skipped = {name for found in matches(names, options.ignore, "ignore") for name in found}
    modules = [name for name in linears if name not in skipped]
    if not modules:
        raise BadInput("The option 'ignore' leaves no linear to quantize.")
    around, copies = _around(shape, options)
    added = {}
    for name in [*modules, *around]:
        if f"{name}.weight" not in shape.tensors:
            raise BadInput(f"The model lacks the tensor '{name}.weight'.")
    for name in modules:
        added |= form.tensor_infos(name, linears[name])
    for name, packed in around.items():
        info = shape.tensors[f"{name}.weight"]
        added |= packed.tensor_infos(name, info.shape, info.dtype)
    config = dict(shape.config)
    outside = CompressedTensorsFormat.describe(around, around) if around else None
    config["quantization_config"] = form.quantization_config(
        modules, [name for name in linears if name in skipped], outside
    )
    return shape.derive(config, remove=[f"{name}.weight" for name in [*modules, *around, *copies]], add=added)


def _around(shape: ModelShape, options: StackOptions) -> tuple[dict[str, CompressedTensorsFormat], list[str]]:
    """The format of the head and the token embedding if they are to be packed, with a scale for each row; and
    copies of a shared table, which go away."""
    bits, copies = around_bits(shape, options.lm_head_bits, options.embedding_bits)
    return {
        name: CompressedTensorsFormat(width, CHANNEL, symmetric=True) for name, width in bits.items()
    }, copies


class Stacker:
    """Puts stacks into a draft as they were planned, and remembers what each block leaves over.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        form: how blocks are stored.
        errors: name -> squared norms of the weight and of what is left after each block (float64
            [blocks + 1]); a journal's state, so that a resumed run reports all linears.
    """

    def __init__(
        self, draft: Draft, options: StackOptions, form: StackFormat, errors: dict[str, torch.Tensor]
    ) -> None:
        self.draft, self.form, self.errors = draft, form, errors
        before = ModelShape.of(draft.parent)
        self.planned = plan_stacked(before, options, form)
        self.around, self.copies = _around(before, options)
        self.modules: list[str] = self.planned.config["quantization_config"]["modules"]

    def wants(self, stored: str) -> bool:
        """Whether the linear of a stored tensor ``NAME.weight`` is to be stacked."""
        return stored.removesuffix(".weight") in self.modules

    def write(self, stored: str, dense: torch.Tensor, blocks: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Write the blocks of a linear instead of its weight ``dense`` [out, in].

        Raises:
            BadInput: a part is not finite in the dtype it is stored with.
        """
        name = stored.removesuffix(".weight")
        for block in blocks:
            if not all(bool(part.isfinite().all()) for part in block.values() if part.is_floating_point()):
                raise BadInput(
                    f"The weight of '{name}' holds values too large for float16; leave it out with 'ignore'."
                )
        for index, block in enumerate(blocks):
            self.draft.write({f"{name}.{part}_{index}": tensor for part, tensor in block.items()})
        self.draft.drop(stored)
        self.errors[name] = residual_norms(self.form, dense, blocks)

    def finish(self, order: Sequence[int]) -> StepReport:
        """Round the head and the embedding if they are asked for, set the draft's config.json, lay its
        tensors out in the order, and sum up.

        Raises:
            BadInput: head or embedding hold NaN or infinite weights.
        """
        for name, packed in self.around.items():
            rounded = round_by_rows(self.draft.read(f"{name}.weight"), packed, name)
            self.draft.write(packed.tensors(name, rounded))
            self.draft.drop(f"{name}.weight")
        for name in self.copies:
            self.draft.drop(f"{name}.weight")
        config = {**self.planned.config["quantization_config"], "order": list(order)}
        self.draft.config["quantization_config"] = config
        blocks = [*((name, 0) for name in self.modules)]
        counts = Counter(dict.fromkeys(range(len(self.modules)), 1))
        for index in order:
            blocks.append((self.modules[index], counts[index]))
            counts[index] += 1
        laid_out = [key for name, index in blocks for key in self.form.names(name, index)]
        tensors = self.draft.tensors
        names = [*(tensors.keys() - set(laid_out))]
        self.draft.tensors = {name: tensors[name] for name in [*sorted(names), *laid_out]}
        steps = sizes(self.draft)
        relative = [
            (error[1:] / error[0]).sqrt() if error[0] else error[1:] for error in self.errors.values()
        ]
        means = torch.stack(relative).mean(0).tolist()
        details = {
            "linears": len(self.modules),
            "kept": config["ignore"],
            "outside_the_layers": {name: packed.bits for name, packed in self.around.items()},
            "blocks": self.form.blocks,
            "bytes": {"smallest": steps[0], "largest": steps[-1]},
            "relative_error": means,
        }
        summary = (
            f"{len(self.modules)} linears in stacks of {self.form.blocks} blocks: any size from "
            f"{steps[0] / 1e6:,.1f} MB to {steps[-1] / 1e6:,.1f} MB; relative weight error {means[0]:.1%} "
            f"with one block, {means[-1]:.1%} with all"
        )
        return StepReport(summary, details)


def residual_norms(
    form: StackFormat, dense: torch.Tensor, blocks: Sequence[Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """Squared norms of ``dense`` [out, in] and of what each block leaves of it: float64 [blocks + 1]."""
    out, width = dense.shape
    stack = form.linear(width, out, [StackBlock(parts) for parts in blocks])
    left = dense.float().clone()
    norms = [left.double().square().sum()]
    for index in range(len(blocks)):
        left -= stack.dense(slice(index, index + 1))
        norms.append(left.double().square().sum())
    return torch.stack(norms)
