"""Making stacks of blocks (see `compress.storage.formats.stacks`): what all such methods share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from compress.engine.shape import ModelShape
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.layers.stacked import StackBlock
from compress.method import StepReport
from compress.quantization.parts.layout import around_bits, linears_to_pack, stored_linears, stored_weights
from compress.quantization.parts.options import StackOptions, TableOptions
from compress.quantization.parts.packer import round_by_rows
from compress.storage.draft import Draft
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.formats.stacks import StackFormat, laid_out, sizes
from compress.storage.tensors import TensorInfo

if TYPE_CHECKING:
    from compress.engine.stream import Layer


def plan_stacked(shape: ModelShape, options: StackOptions, form: StackFormat) -> ModelShape:
    """The shape of the model with all blocks of its linears.

    Raises:
        BadInput: the model is already quantized, no linear is left to quantize, a linear does not fit the
            format, or an option does not fit the model.
    """
    modules, skipped, _ = linears_to_pack(shape, options.ignore)
    if options.importance == "perplexity" and (shape.anatomy.kind != "decoder" or shape.anatomy.head is None):
        raise BadInput("Only causal language models have a perplexity; use --importance gradient.")
    around, copies = _around(shape, options)
    added: dict[str, TensorInfo] = {}
    for name, (size, dtype) in stored_weights(shape, [*modules, *around]).items():
        added |= (
            around[name].tensor_infos(name, size, dtype) if name in around else form.tensor_infos(name, size)
        )
    config = dict(shape.config)
    outside = CompressedTensorsFormat.describe(around, around) if around else None
    kept = [name for name in shape.linears() if name in skipped]
    config["quantization_config"] = form.quantization_config(modules, kept, outside)
    return shape.derive(config, remove=[f"{name}.weight" for name in [*modules, *around, *copies]], add=added)


def _around(shape: ModelShape, options: TableOptions) -> tuple[dict[str, CompressedTensorsFormat], list[str]]:
    """The formats of the head and the token embedding, and copies of a shared table (see `around_bits`)."""
    bits, copies = around_bits(shape, options)
    return {
        name: CompressedTensorsFormat(width, CHANNEL, symmetric=True) for name, width in bits.items()
    }, copies


class Stacker:
    """Writes stacks into a draft as the plan says, and records what each block leaves over.

    Linears are named by their stored tensors ``NAME.weight``.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        form: how blocks are stored.
        errors: where the residuals are recorded. In the state of a journal they survive a kill, so that a
            resumed run reports all linears.

    Attributes:
        errors: full name of a linear -> squared norms of its weight and of what is left of it after each
            block, float64 [blocks + 1].
        planned: the shape of the model with all blocks.
        modules: full names of the linears in stacks.
    """

    def __init__(
        self, draft: Draft, options: StackOptions, form: StackFormat, errors: dict[str, torch.Tensor]
    ) -> None:
        self.draft, self.form, self.errors = draft, form, errors
        before = ModelShape.of(draft.parent)
        self.planned = plan_stacked(before, options, form)
        self.around, self.copies = _around(before, options)
        self.modules: list[str] = self.planned.config["quantization_config"]["modules"]

    def wanted(self, layer: Layer, paths: Iterable[str] | None = None) -> dict[str, str]:
        """Path -> stored tensor of the linears that are to be stacked: of a whole layer, or at ``paths``."""
        return stored_linears(layer, self.modules, paths)

    def write(self, stored: str, dense: torch.Tensor, blocks: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Write the blocks of a linear in place of its weight ``dense`` [out, in].

        Raises:
            BadInput: a part of a block is not finite in the dtype it is stored in.
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
        self.errors[name] = residual_norms(self.form, dense, blocks).cpu()

    def finish(self, order: Sequence[int]) -> StepReport:
        """Round the head and the embedding where the options ask for it, set config.json, and report.

        The draft's tensors are put into the order, so that its files hold them in this order.

        Args:
            order: for every block but the first ones, the index of its linear in ``modules``.

        Raises:
            BadInput: the head or the embedding holds NaN or infinite weights.
        """
        for name, packed in self.around.items():
            rounded = round_by_rows(self.draft.read(f"{name}.weight"), packed, name)
            self.draft.write(packed.tensors(name, rounded))
            self.draft.drop(f"{name}.weight")
        for name in self.copies:
            self.draft.drop(f"{name}.weight")
        config = {**self.planned.config["quantization_config"], "order": list(order)}
        self.draft.config["quantization_config"] = config
        self.draft.tensors = laid_out(self.draft.tensors, config)
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
    """Squared norms of ``dense`` [out, in] and of its residual after each block: float64 [blocks + 1]."""
    out, width = dense.shape
    stack = form.linear(width, out, [StackBlock(parts) for parts in blocks])
    left = dense.float().clone()
    norms = [left.double().square().sum()]
    for index in range(len(blocks)):
        left -= stack.dense(slice(index, index + 1))
        norms.append(left.double().square().sum())
    return torch.stack(norms)
