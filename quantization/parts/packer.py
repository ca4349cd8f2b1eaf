"""Packer: writes rounded linears into a draft and sums up their errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import weight
from compress.engine.shape import ModelShape
from compress.errors import CompressError
from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.method import StepReport
from compress.quantization.parts.layout import Layout, packed_shape, plan_layout
from compress.storage.draft import Draft
from compress.storage.formats.base import Format
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.stream import Layer, StreamedModel


BLOCK = 1 << 22
"""Weights of a head or an embedding that are rounded, or compared, at a time."""


class Packer:
    """Puts rounded linears into a draft as they were planned, and remembers how far they are off.

    Linears are called by their stored tensors ``NAME.weight``.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        errors: name -> squared error and squared norm of the weight (float64 [2]); a journal's state, so that
            a resumed run reports all linears.
        layout_of: what says what the options ask for.
    """

    def __init__(
        self,
        draft: Draft,
        options: Any,
        errors: dict[str, torch.Tensor],
        layout_of: Callable[[ModelShape, Any], Layout] = plan_layout,
    ) -> None:
        self.draft = draft
        self.errors = errors
        self.before = ModelShape.of(draft.parent)
        self.layout = layout_of(self.before, options)
        self.planned = packed_shape(self.before, self.layout)
        self.format = self.layout.default

    def wants(self, stored: str) -> bool:
        """Whether a linear inside the layers is to be quantized."""
        return stored.removesuffix(".weight") in self.layout.linears

    def linears(self, model: StreamedModel, layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
        """Stored tensors of the linears of a layer that are to be quantized, and their weights [out, in]."""
        for path, linear in layer.linears.items():
            stored = layer.stored(path)
            if self.wants(stored):
                yield stored, weight(linear)

    def format_of(self, stored: str) -> Format:
        """The format of a linear: how many bits it is to be given, in groups of how many, and whether
        symmetric."""
        return (self.layout.linears | self.layout.around)[stored.removesuffix(".weight")]

    def scale_dtype(self, stored: str) -> torch.dtype:
        """The dtype of the scales of that linear."""
        return self.format.scale_dtype(DTYPES[self.before.tensors[stored].dtype])

    def write(self, stored: str, dense: torch.Tensor, rounded: QuantizedWeight) -> None:
        """Write a linear's packed tensors instead of its weight ``dense`` [out, in].

        Raises:
            CompressError: they do not read back as what was written.
        """
        name, form = stored.removesuffix(".weight"), self.format_of(stored)
        packed = form.tensors(name, rounded)
        if not form.read(name, packed.__getitem__).same_as(rounded):
            raise CompressError(f"The packed tensors of '{name}' do not read back as what was written.")
        self.draft.drop(stored)
        self.draft.write(packed)
        sums = torch.zeros(2, dtype=torch.float64)
        blocks = dense.split(_rows(dense))
        for before, after in zip(blocks, rounded.split([len(block) for block in blocks]), strict=True):
            before = before.double()
            sums += torch.stack(((after.dequantize() - before).square().sum(), before.square().sum())).cpu()
        self.errors[name] = sums

    def finish(self) -> StepReport:
        """Round the head and the embedding if they are asked for, set the draft's config.json, and sum up.

        Raises:
            BadInput: they hold NaN or infinite weights.
        """
        for name, form in self.layout.around.items():
            dense = self.draft.read(f"{name}.weight")
            self.write(f"{name}.weight", dense, round_by_rows(dense, form, name))
        for name in self.layout.copies:
            self.draft.drop(f"{name}.weight")
        self.draft.config["quantization_config"] = self.planned.config["quantization_config"]
        return report(self.errors, self.layout, self.before, self.planned)


def round_by_rows(dense: torch.Tensor, form: Format, name: str) -> QuantizedWeight:
    """A head or an embedding [out, in], in the dtype it is stored with, rounded to the nearest some rows at a
    time.

    Raises:
        BadInput: it holds NaN or infinite weights.
    """
    scale_dtype = form.scale_dtype(dense.dtype)
    blocks = [
        quantize_weight(block, form.bits, form.group_size, form.symmetric, scale_dtype, name)
        for block in dense.split(_rows(dense))
    ]
    return QuantizedWeight.joined(blocks)


def _rows(weight: torch.Tensor) -> int:
    return max(1, BLOCK // weight.shape[1])


def report(
    errors: dict[str, torch.Tensor], layout: Layout, before: ModelShape, planned: ModelShape
) -> StepReport:
    """Sum up the relative errors ||Ŵ − W|| / ||W|| of what is packed, and the bits a weight takes."""
    relative = {name: float((error / norm).sqrt()) if norm else 0.0 for name, (error, norm) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    mean = fmean(relative.values())  # whatever their order, which a resumed run changes
    weights = sum(before.tensors[f"{name}.weight"].numel for name in relative)
    packed = sum(info.nbytes for name, info in planned.tensors.items() if before.tensors.get(name) != info)
    widths = Counter(form.bits for form in layout.linears.values())
    details = {
        "format": layout.default.name,
        "linears": len(layout.linears),
        "linears_by_bits": {str(bits): widths[bits] for bits in sorted(widths)},
        "outside_the_layers": {name: form.bits for name, form in layout.around.items()},
        "kept": [*layout.outside, *layout.kept],
        "bits_per_weight": round(8 * packed / weights, 4),
        "relative_error": {"mean": mean, "max": relative[worst], "worst_linear": worst},
    }
    around = "".join(f", {name} at {form.bits} bits" for name, form in layout.around.items())
    summary = (
        f"{len(layout.linears)} linears{around}: {details['bits_per_weight']:.2f} bits a weight with scales "
        f"({layout.default.name}); relative weight error {mean:.1%} on average, {relative[worst]:.1%} at most"
    )
    return StepReport(summary, details)
