"""Nested codes: every width from 2 to 8 bits in one file; narrow codes are the leading bits of wide ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from compress.anatomy import linears_by_input, weight
from compress.calibration.statistics.hessian import Hessian, damping_of, inverse_root
from compress.errors import BadInput
from compress.kernels.codes.integer import CHANNEL
from compress.kernels.codes.packing import pack_signs
from compress.kernels.layers.stacked import spread
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.block_order import find_order
from compress.quantization.parts.options import DampingOptions, StackOptions
from compress.quantization.parts.stacker import Stacker, plan_stacked
from compress.storage.formats.stacks import NestedFormat

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

COLUMNS_PER_UPDATE = 32
"""Columns that are rounded between two updates of all columns after them. Only speed depends on it."""

ELEMENTS = 2**26
"""Weights, counted once for each width, that are worked on in one step: 256 MiB in float32. Rows are
independent of each other, so results do not depend on it."""

CACHED = 2**16
"""Weights whose scales are chosen in one step, so that they stay in the cache. Only speed depends on it."""

JOINT = 3
"""Leading bits that are chosen for all widths together. Later bits are chosen one after another."""

FRACTIONS = torch.linspace(0.3, 1.0, 15)
"""The outermost value at 2 bits is tried at these fractions of a group's largest magnitude."""


class Nested(Method["Nested.Options"]):
    """Find one integer code for all widths: its b leading bits are the code of b bits.

    With signs S_0, S_1, ... = ±1 for the bits of the code of a weight W [out, in], the most significant one
    first, and scales s of groups that all widths share,

        Ŵ_b = s ⊙ sum_{j < b} 2^-j S_j,

    so that the value of a code lies in the middle of the values of all wider codes that begin with it.
    Any-Precision LLM grows such codes bit by bit from a narrow one; MatGPTQ chooses them for several widths
    at once by GPTQ.

    Here each width b runs its own GPTQ over the columns, with H = X^T X of the dense model's inputs: its
    weights V_b compensate the errors of its own code so far. In every column the first three bits are chosen
    for all widths together, so that they minimise

        λ_2 (V_2 - Ŵ_2)^2 + λ_3 (V_3 - Ŵ_3)^2 + sum_{b > 3} λ_b max(0, |V_b - Ŵ_3| - s / 4)^2

    The last term is what later bits cannot reach. Each later bit takes the half that is nearer for its own
    width. λ_b = 2^(b-2) lies between two extremes that both fail: cutting GPTQ's 8-bit code (wide codes only)
    gives plain rounding at 2 and 3 bits, and growing GPTQ's 2-bit code (the narrow one first) leaves errors
    as large as its steps, which no later bit reaches.
    """

    name = "nested"
    family = "quantization"
    paper = Paper("Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs", "2402.10517")

    class Options(StackOptions, DampingOptions):
        bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(8, description="bits of the widest code")
        group_size: PositiveInt | Literal["channel"] = Field(
            64,
            description="number of consecutive inputs that share a scale (the last group may be smaller); "
            "channel: one scale for each output channel",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return plan_stacked(shape, options, self._format(options))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        stream = model.stream(context.calibration, context.folder / "stream")
        journal = context.journal("rounding")
        form = self._format(options)
        stacker = Stacker(context.draft, options, form, journal.state)
        for layer in model.walk(journal, stream, label="rounding plane by plane"):
            groups = linears_by_input(model.anatomy, layer.linears)
            hessians = [Hessian() for _ in groups]
            stream.advance(
                layer, {paths[0]: hessian.add for paths, hessian in zip(groups, hessians, strict=True)}
            )
            for paths, hessian in zip(groups, hessians, strict=True):
                stored = list((wanted := stacker.wanted(layer, paths)).values())
                if not stored:
                    continue
                # Linears with the same input go through the columns together.
                dense = [weight(layer.linears[path]) for path in wanted]
                out, width = dense[0].shape
                groups_per_row = form.infos(0, (out, width))["scales"].shape[1]
                assert hessian.sum is not None  # it has seen the text
                damping = options.damping or damping_of(width, hessian.tokens)
                codes, scales = nested_codes(
                    torch.cat(dense), hessian.sum, options.bits, groups_per_row, damping, stored[0]
                )
                rows = [len(each) for each in dense]
                parts = zip(stored, dense, codes.split(rows), scales.split(rows), strict=True)
                for name, whole, own, steps in parts:
                    stacker.write(name, whole, planes(own, steps, options.bits))
        return stacker.finish(find_order(model, stacker, options, context))

    @staticmethod
    def _format(options: Options) -> NestedFormat:
        return NestedFormat(options.bits, CHANNEL if options.group_size == "channel" else options.group_size)


def nested_codes(
    dense: torch.Tensor, hessian: torch.Tensor, bits: int, groups: int, damping: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the codes of a weight and their scales.

    Args:
        dense: W, float32 [out, in].
        hessian: X^T X, float64 [in, in].
        bits: of the widest code.
        groups: number of groups in a row; the weights of a group share a scale.
        damping: share of the mean of H's diagonal that is added to the diagonal.
        name: of the weight, for error messages.

    Returns:
        Codes below 2^bits, uint8 [out, in]; and s, float16 [out, groups].

    Raises:
        BadInput: H is not positive even with damping.
    """
    width = dense.shape[1]
    missing = -(-width // groups) * groups - width  # inputs of the last group that do not exist
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    # Inputs that are always 0 may come with other text.
    shares = torch.where(diagonal == 0, damping, diagonal / diagonal.mean()).float()
    importance = F.pad(shares, (0, missing)).view(groups, -1)
    upper = inverse_root(hessian, damping, order)
    if upper is None:
        raise BadInput(
            f"The inputs of '{name}' are too alike for nested codes; use more calibration text or damping."
        )
    found = []
    for part in dense.split(max(1, ELEMENTS // ((bits - 1) * width))):
        grouped = F.pad(part, (0, missing)).view(len(part), groups, -1)
        few = grouped.split(max(1, CACHED // width))
        scales = torch.cat([choose_scales(rows, importance, bits) for rows in few]).half()
        unit = spread(scales.float(), width)
        codes = torch.empty(part.shape, dtype=torch.uint8, device=dense.device)
        codes[:, order] = _sweep(part[:, order], unit[:, order], upper, bits).T
        found.append((codes, scales))
    return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])


def value(code: torch.Tensor, bits: int) -> torch.Tensor:
    """The value of a code of ``bits`` bits, sum_j 2^-j S_j: float32, between -2 and 2."""
    return (code.float() + 0.5) * 2.0 ** (2 - bits) - 2


def choose_scales(grouped: torch.Tensor, importance: torch.Tensor, bits: int) -> torch.Tensor:
    """Choose s of each group to minimise the sum over widths of λ_b times the error of rounding to nearest.

    For widths beyond 4 bits only the part of a weight that lies outside of all codes counts as an error.

    Args:
        grouped: weights, float32 [out, groups, group_size].
        importance: weight of the squared error of each input, float32 [groups, group_size].
        bits: of the widest code.

    Returns:
        float32 [out, groups]; 0 where a group is all zeros.
    """
    size = grouped.abs()
    largest = size.amax(-1)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for fraction in FRACTIONS.tolist():
        scale = largest * (fraction / 1.5)
        loss = torch.zeros_like(largest)
        for width in range(2, min(bits, 4) + 1):
            step = (scale * 2.0 ** (2 - width)).unsqueeze(-1)
            # The nearest odd multiple of half a step, up to the outermost one.
            nearest = ((size / step).floor().clamp_(max=2 ** (width - 1) - 1) + 0.5) * step
            loss += 2 ** (width - 2) * ((size - nearest).square_() * importance).sum(-1)
        beyond = (size - 2 * scale.unsqueeze(-1)).clamp_(min=0)
        factor = sum(2 ** (width - 2) for width in range(5, bits + 1))
        loss += factor * (beyond.square_() * importance).sum(-1)
        better = loss < least
        best, least = torch.where(better, scale, best), torch.where(better, loss, least)
    return best


def _sweep(weights: torch.Tensor, unit: torch.Tensor, upper: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's pass over the columns for all widths at once.

    Args:
        weights: float32 [out, in], with columns in the order of the pass.
        unit: the scale of each weight, float32 [out, in].
        upper: the Cholesky factor U of the inverse of H, float64 [in, in].
        bits: of the widest code.

    Returns:
        Codes, uint8 [in, out].
    """
    out, width = weights.shape
    unit, upper = unit.T.contiguous(), upper.float()
    left = weights.T.unsqueeze(1).repeat(1, bits - 1, 1)  # V_b: [in, widths, out]
    codes = torch.empty(width, out, dtype=torch.uint8, device=weights.device)
    joint = min(JOINT, bits)
    first = torch.arange(2**joint, device=weights.device)
    stands = torch.stack([value(first >> max(0, joint - b), min(b, joint)) for b in range(2, bits + 1)])
    for start in range(0, width, COLUMNS_PER_UPDATE):
        stop = min(start + COLUMNS_PER_UPDATE, width)
        errors = left.new_zeros(stop - start, bits - 1, out)
        for column in range(start, stop):
            scale = unit[column]
            codes[column], values = _choose(left[column] / torch.where(scale == 0, 1, scale), stands)
            error = (left[column] - values * scale) / upper[column, column]
            left[column:stop].flatten(1).addr_(upper[column, column:stop], error.flatten(), alpha=-1)
            errors[column - start] = error
        left[stop:].flatten(1).addmm_(upper[start:stop, stop:].T, errors.flatten(1), alpha=-1)
    return codes


def _choose(wanted: torch.Tensor, stands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of one column.

    Args:
        wanted: what each width wants, V_b / s, float32 [widths, out].
        stands: for each width and each code of the first bits, the value of the bits that the width has of
            it, float32 [widths, 2^min(bits, JOINT)].

    Returns:
        Codes, int64 [out]; and the values of their first 2, 3, ... bits, float32 [widths, out].
    """
    widths = len(wanted)
    joint = stands.shape[1].bit_length() - 1
    reach = 2.0 ** (1 - joint)
    off = wanted.unsqueeze(1) - stands.unsqueeze(2)
    off[joint - 1 :].abs_().sub_(reach).clamp_(min=0)
    weights = 2.0 ** torch.arange(widths, device=wanted.device).view(-1, 1, 1)
    code = (off.square_() * weights).sum(0).argmin(0)
    values = stands[:, code]
    for index in range(joint - 1, widths):
        reach /= 2
        upper = wanted[index] >= values[index - 1]
        values[index] = values[index - 1] + torch.where(upper, reach, -reach)
        code = 2 * code + upper
    return code, values


def planes(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> list[dict[str, torch.Tensor]]:
    """The blocks of codes, uint8 [out, in]: the two leading bits with the scales, then one block per bit."""
    signs = [(codes >> (bits - 1 - plane)) & 1 > 0 for plane in range(bits)]
    first = {"signs": pack_signs(torch.stack(signs[:2])), "scales": scales}
    return [first, *({"signs": pack_signs(plane)} for plane in signs[2:])]
