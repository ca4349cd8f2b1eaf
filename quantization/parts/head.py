"""Rounding the projection to the vocabulary by what it reads, as the linears inside the layers are.

Where it is also the token embedding, the error of the embedding grows a little, and that of the head falls
much more.
"""

from __future__ import annotations

import torch

from compress.anatomy import Anatomy
from compress.calibration.statistics.hessian import DAMPING, Hessian
from compress.engine.activations import Activations
from compress.engine.stream import Seen, StreamedModel
from compress.engine.windows import Windows
from compress.kernels.codes.gguf import BlockType
from compress.kernels.codes.integer import QuantizedWeight
from compress.quantization.parts.block_rounding import round_with_feedback
from compress.quantization.parts.columns import USUAL, HowToCompensate, round_by_columns
from compress.storage.formats.base import Format

WEIGHTS_AT_ONCE = 1 << 25
"""Weights that are rounded in one step; rows do not depend on each other."""

FEW_LEVELS = 16
"""The most levels of a type for which error feedback pays where the head is the embedding, too."""


def is_head(anatomy: Anatomy, name: str) -> bool:
    """Whether a table is the projection to the vocabulary of a decoder, perhaps among others."""
    decodes = anatomy.kind == "decoder" and anatomy.head is not None
    return decodes and (anatomy.tied or name in anatomy.heads)


@torch.no_grad()
def head_inputs(model: StreamedModel, hidden: Activations, windows: Windows) -> torch.Tensor:
    """H = X^T X of the inputs X of the head, without padding: float64 [E, E].

    Args:
        model: whose head it is.
        hidden: states behind the last layer, [N, S, D].
        windows: the text they are of.
    """
    found = Hessian()
    with model.head() as head:
        for index in range(len(windows.tokens)):
            inputs = head.features(hidden.read(index, index + 1))
            found.add(Seen(inputs, inputs, windows.mask[index : index + 1], index))
    assert found.sum is not None  # there is text
    return found.sum


def round_head(
    dense: torch.Tensor,
    hessian: torch.Tensor,
    form: Format,
    scale_dtype: torch.dtype,
    name: str,
    how: HowToCompensate = USUAL,
    *,
    damping: float = DAMPING,
) -> QuantizedWeight:
    """Round a head [V, E] to integer codes, with GPTQ's error feedback; arguments as of `round_by_columns`.

    Raises:
        BadInput: as `round_by_columns`.
    """
    blocks = [
        round_by_columns(block, hessian, how, form, scale_dtype, name, damping=damping)
        for block in _blocks(dense)
    ]
    return QuantizedWeight.joined(blocks)


def pack_head(
    dense: torch.Tensor,
    hessian: torch.Tensor,
    kind: BlockType,
    name: str,
    *,
    tied: bool,
    damping: float = DAMPING,
) -> torch.Tensor:
    """Round a head [V, E] to blocks of GGUF, whose errors count by H: uint8 [V, bytes of a row].

    Args:
        dense: the weight.
        hessian: H.
        kind: the type.
        name: of the weight, for error messages.
        tied: whether the head is the token embedding, too. Then later columns compensate the errors of
            earlier ones only in types of few levels.
        damping: as in `round_with_feedback`.
    """
    feedback = not tied or len(kind.levels) <= FEW_LEVELS
    packed = []
    for block in _blocks(dense.float()):
        if feedback:
            fields = round_with_feedback(block, hessian, kind, name, damping=damping)
        else:
            fields = kind.round(block, hessian.diagonal())
        packed.append(kind.pack(fields).view(len(block), -1))
    return torch.cat(packed)


def _blocks(dense: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return dense.split(max(1, WEIGHTS_AT_ONCE // dense.shape[1]))
