"""The format of mlx-lm, which runs on Apple machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import BadInput
from compress.export.base import TargetOptions
from compress.export.codes import fewest_bits, integer_codes, largest_group, regrouped, widened
from compress.export.legacy import with_rope
from compress.export.model import ExportedModel
from compress.export.repack import RepackedTarget, Stored, dtype_of_scales, integers
from compress.kernels.codes.affine import AffineWeight
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.codes.weight import LowBitWeight
from compress.storage.formats.base import Format
from compress.storage.formats.mlx import SIZES, MLXFormat, check_architecture


class MLX(RepackedTarget[TargetOptions]):
    """Integers of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, mixed as the model has them.

    Groups of other sizes are cut into groups of these, which repeat the scale. Zero points become offsets in
    the dtype of the model, which rounds some of them.
    """

    name = "mlx"
    summary = "integers of 2 to 6 and 8 bits for mlx-lm on Apple machines"
    runtime = "mlx-lm"
    how = "make one with 'compress-model quantize'"
    packs_tables = True

    def refuse(self, model: ExportedModel) -> None:
        super().refuse(model)
        check_architecture(model.shape.anatomy.model_type)

    def stored(self, model: ExportedModel, name: str, form: Format, options: TargetOptions) -> Stored:
        bits = fewest_bits(form.bits, MLXFormat.widths)
        if not integer_codes(form) or bits is None:
            raise self.no_codes(name, form)
        length = model.size(name)[1] if form.group_size == CHANNEL else form.group_size
        if (size := largest_group(length, SIZES)) is None:
            raise BadInput(
                f"'{name}' has groups of {length} inputs, and mlx has groups of 32, 64 or 128; quantize with "
                "one of these as --group-size, and leave out with --ignore what they do not divide."
            )
        return Stored(MLXFormat(bits, size), dtype_of_scales(model, name, form))

    def repacked(self, name: str, weight: LowBitWeight, stored: Stored) -> LowBitWeight:
        if isinstance(weight, AffineWeight) and weight.biases is not None:  # it comes from mlx
            return weight
        found = integers(name, weight, self.name)
        found = regrouped(widened(found, stored.form.bits), stored.form.group_size)
        products = found.zeros.float() * found.scales.float()
        if bool((products.to(found.scales.dtype).float() != products).any()):
            shown = str(found.scales.dtype).removeprefix("torch.")
            self._found[f"Offsets are rounded to {shown}, because mlx has no integer zero points."] = None
        return found

    def declared(
        self,
        config: dict[str, Any],
        linears: Mapping[str, Any],
        around: Mapping[str, Any],
        skipped: list[str],
        outside: list[str],
    ) -> dict[str, Any]:
        found = super().declared(config, linears, around, skipped, outside)
        return with_rope({**found, "quantization": found["quantization_config"]})
