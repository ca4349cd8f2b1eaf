"""Packing rounded linears into a draft, and the sum of what that did to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from compress.anatomy import weight
from compress.calibration.statistics.hessian import damping_of
from compress.engine.shape import ModelShape
from compress.errors import CompressError
from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.kernels.codes.weight import LowBitWeight
from compress.method import MethodOptions, StepReport
from compress.quantization.parts.columns import USUAL, HowToCompensate
from compress.quantization.parts.head import head_inputs, is_head, round_head
from compress.quantization.parts.layout import Layout, packed_shape, plan_layout, stored_linears
from compress.storage.draft import Draft
from compress.storage.formats.base import Format
from compress.storage.tensors import DTYPES

if TYPE_CHECKING:
    from compress.engine.stream import Layer, Stream, StreamedModel

ELEMENTS_AT_ONCE = 1 << 22
"""Weights that are rounded, or compared, in one step. Results do not depend on it."""


class Packer:
    """Writes rounded linears into a draft as the plan says, and records the errors of rounding.

    Linears are named by their stored tensors ``NAME.weight``.

    Args:
        draft: equal to its parent, or restored by a journal.
        options: of the method.
        errors: where the errors of rounding are recorded. In the state of a journal they survive a kill, so
            that a resumed run reports all linears.
        layout_of: makes the layout of the model's shape and the options.

    Attributes:
        errors: full name of a linear -> squared error and squared norm of its weight, float64 [2].
        before: the shape of the model with dense weights.
        layout: what is packed, and how.
        planned: the shape of the model with packed weights.
    """

    def __init__(
        self,
        draft: Draft,
        options: MethodOptions,
        errors: MutableMapping[str, torch.Tensor],
        layout_of: Callable[[ModelShape, Any], Layout] = plan_layout,
    ) -> None:
        self.draft, self.errors = draft, errors
        self.before = ModelShape.of(draft.parent)
        self.layout = layout_of(self.before, options)
        self.planned = packed_shape(self.before, self.layout)

    def wanted(self, layer: Layer, paths: Iterable[str] | None = None) -> dict[str, str]:
        """Path -> stored tensor of the linears that are to be packed: of a whole layer, or at ``paths``."""
        return stored_linears(layer, self.layout.linears, paths)

    def linears(self, layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
        """Stored tensors of the linears of a layer that are to be quantized, and their weights [out, in]."""
        for path, stored in self.wanted(layer).items():
            yield stored, weight(layer.linears[path])

    def format_of(self, stored: str) -> Format:
        """The format of a linear or a table: its bits, its group size, and whether it is symmetric."""
        return (self.layout.linears | self.layout.around)[stored.removesuffix(".weight")]

    def scale_dtype(self, stored: str) -> torch.dtype:
        """The dtype that the scales of a linear are stored in."""
        return self.layout.default.scale_dtype(DTYPES[self.before.tensors[stored].dtype])

    def write(self, stored: str, dense: torch.Tensor, rounded: LowBitWeight) -> None:
        """Write the packed tensors of a linear in place of its weight ``dense`` [out, in].

        Raises:
            CompressError: the packed tensors do not read back as the codes that were written.
        """
        name = stored.removesuffix(".weight")
        form = self.format_of(stored)
        packed = form.tensors(name, rounded)
        if not form.read(name, packed.__getitem__).same_as(rounded):
            raise CompressError(f"The packed tensors of '{name}' do not read back as what was written.")
        self.draft.drop(stored)
        self.draft.write(packed)
        sums = torch.zeros(2, dtype=torch.float64, device=dense.device)
        blocks = dense.split(_rows_at_once(dense))
        for before, after in zip(blocks, rounded.split([len(block) for block in blocks]), strict=True):
            before = before.double()
            sums += torch.stack(((after.dequantize() - before).square().sum(), before.square().sum()))
        self.errors[name] = sums.cpu()

    def finish(
        self,
        model: StreamedModel | None = None,
        stream: Stream | None = None,
        how: HowToCompensate = USUAL,
    ) -> StepReport:
        """Round the head and the embedding where the options ask for it, set config.json, and report.

        Args:
            model, stream: the model, and text behind its last layer. With them the head is rounded by what it
                reads (`round_head`), and without them to the nearest codes, as other tables are.
            how: the head's errors are compensated.

        Raises:
            BadInput: the head or the embedding holds NaN or infinite weights.
        """
        for name, form in self.layout.around.items():
            dense = self.draft.read(f"{name}.weight")
            if model is not None and stream is not None and is_head(model.anatomy, name):
                hessian = head_inputs(model, stream.hidden, stream.windows)
                dense = dense.to(hessian.device)
                damping = how.damping or damping_of(len(hessian), stream.windows.num_tokens)
                scale_dtype = form.scale_dtype(dense.dtype)
                rounded = round_head(dense, hessian, form, scale_dtype, name, how, damping=damping)
            else:
                rounded = round_by_rows(dense, form, name)
            self.write(f"{name}.weight", dense, rounded)
        for name in self.layout.copies:
            self.draft.drop(f"{name}.weight")
        self.draft.config["quantization_config"] = self.planned.config["quantization_config"]
        return report(self.errors, self.layout, self.before, self.planned)


def round_by_rows(dense: torch.Tensor, form: Format, name: str) -> QuantizedWeight:
    """Round a head or an embedding [out, in], in the dtype it is stored in, to the nearest codes.

    It goes block of rows by block of rows, because these tables are large.

    Raises:
        BadInput: it holds NaN or infinite weights.
    """
    scale_dtype = form.scale_dtype(dense.dtype)
    blocks = [
        quantize_weight(block, form.bits, form.group_size, form.symmetric, scale_dtype, name)
        for block in dense.split(_rows_at_once(dense))
    ]
    return QuantizedWeight.joined(blocks)


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, ELEMENTS_AT_ONCE // weight.shape[1])


def report(
    errors: Mapping[str, torch.Tensor], layout: Layout, before: ModelShape, planned: ModelShape
) -> StepReport:
    """Report the relative errors ||Ŵ − W|| / ||W|| of what was packed, and the bits per weight."""
    relative = {name: float((error / norm).sqrt()) if norm else 0.0 for name, (error, norm) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    mean = fmean(relative.values())  # exact in any order; a resumed run has another one
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
        f"{len(layout.linears)} linears{around}: {details['bits_per_weight']:.2f} bits per weight with "
        f"scales ({layout.default.name}); relative weight error {mean:.1%} on average, "
        f"{relative[worst]:.1%} at most"
    )
    return StepReport(summary, details)
