"""BitStack (ICLR 2025): any size from one file, by stacks of sign matrices with low-rank absolute values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveInt

from compress.anatomy import linears_by_input, weight
from compress.engine.stream import Seen
from compress.kernels.codes.packing import pack_signs
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.block_order import find_order
from compress.quantization.parts.stacker import Stacker, StackOptions, plan_stacked
from compress.storage.formats.stacks import BitStackFormat

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

OVERSAMPLING = 16
POWER_ITERATIONS = 5
"""Of the randomised SVD: with these its residual is within 1 % of the best one of the same rank."""

SMALLEST_SCALE = 1e-3


class BitStack(Method):
    """Iterative absolute value decomposition of weights scaled by their inputs, in one order for all sizes.

    For a linear W [out, in] with inputs X: s_j = mean over windows of ||X[:, j]||_2, plus 1e-3, and
    R_0 = W diag(s). For every block i: S_i = sign(R_i) with sign(0) = +1, a_i b_i the best approximation of
    |R_i| of rank k (U sqrt(Σ) and sqrt(Σ) V^T, by a randomised SVD), R_{i+1} = R_i - S_i ⊙ (a_i b_i).
    n blocks give Ŵ = Σ_i S_i ⊙ (a_i b_i) diag(1/s) = Σ_i S_i ⊙ (a_i (b_i diag(1/s))).

    The paper divides what comes before the linear by s, where there is a norm or a projection that can take
    it. Here b_i diag(1/s) is stored, which is exact, costs nothing, and holds for every architecture and for
    grouped-query attention. R is computed with the factors as they are stored, in float16, so that each block
    also makes up for the rounding of those before it. Windows pass through the dense model.
    """

    name = "bitstack"
    family = "quantization"
    paper = Paper(
        "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments",
        "2410.23918",
    )

    class Options(StackOptions):
        blocks: PositiveInt = Field(16, description="blocks of every linear, each of about 1 bit a weight")
        rank: PositiveInt = Field(
            16,
            description="rank of the absolute values; on small matrices it weighs as much as the signs",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return plan_stacked(shape, options, BitStackFormat(options.blocks, options.rank))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        stream = model.stream(context.calibration, context.folder / "stream")
        journal = context.journal("decomposition")
        form = BitStackFormat(options.blocks, options.rank)
        stacker = Stacker(context.draft, options, form, journal.state)
        for layer in model.walk(journal, stream, label="decomposing"):
            groups = linears_by_input(model.anatomy, layer.linears)
            norms = [ColumnNorms() for _ in groups]
            stream.advance(layer, {paths[0]: norm.add for paths, norm in zip(groups, norms, strict=True)})
            for paths, norm in zip(groups, norms, strict=True):
                for path in paths:
                    stored = layer.stored(path)
                    if stacker.wants(stored):
                        dense = weight(layer.linears[path])
                        # Each linear has the same random numbers, so that a resumed run goes on with them.
                        blocks = decompose(
                            dense, norm.scale, options.blocks, options.rank, context.generator()
                        )
                        stacker.write(stored, dense, blocks)
        return stacker.finish(find_order(model, stacker, options, context))


class ColumnNorms:
    """The mean over windows of ||X[:, j]||_2, padding left out."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | float = 0.0
        self.windows = 0

    def add(self, seen: Seen) -> None:
        """Add some windows."""
        squares = seen.inputs.double().square().mul_(seen.mask.unsqueeze(-1)).sum(1)
        self.sum = self.sum + squares.sqrt().sum(0)
        self.windows += len(seen.inputs)

    @property
    def scale(self) -> torch.Tensor:
        """s: float32 [in]."""
        return (self.sum / self.windows + SMALLEST_SCALE).float()


def decompose(
    dense: torch.Tensor, scale: torch.Tensor, blocks: int, rank: int, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """The blocks of a weight.

    Args:
        dense: W, float32 [out, in].
        scale: s, float32 [in].
        blocks: how many.
        rank: k; less where a dimension of W is less.
        generator: on the CPU, for the randomised SVD.

    Returns:
        For each block ``signs`` uint8 [out, ceil(in/8)], ``left`` float16 [out, k] and ``right`` float16
        [k, in]; not finite where values are beyond float16.
    """
    residual = dense.float() * scale
    smallest = torch.finfo(torch.float32).tiny
    found = []
    for _ in range(blocks):
        positive = residual >= 0
        left, right = low_rank(residual.abs(), min(rank, *dense.shape), generator)
        right = right / scale
        # The same product with both factors of one size, far from both ends of float16.
        balance = (right.abs().amax(1).clamp(min=smallest) / left.abs().amax(0).clamp(min=smallest)).sqrt()
        left, right = (left * balance).half(), (right / balance[:, None]).half()
        product = left.float() @ (right.float() * scale)
        residual = residual - torch.where(positive, product, -product)
        found.append({"signs": pack_signs(positive), "left": left, "right": right})
    return found


def low_rank(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearly the best approximation of a matrix [out, in] of rank k: U sqrt(Σ) [out, k], sqrt(Σ) V^T [k, in].

    Randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1): a basis Q of the range by power
    iterations from k + 16 random vectors, then the SVD of Q^T M. With w = k + 16 and 5 iterations it costs
    24 w · out · in FLOPs, where all singular values take at least 4 · out · in · min(out, in).
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = _orthonormal(matrix @ start)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    core = basis.T @ matrix
    # The SVD of the core by the eigenvectors of its small Gram matrix. Errors in Σ cancel out of the product.
    squares, vectors = torch.linalg.eigh((core @ core.T).double())
    vectors = vectors[:, -rank:].flip(1).to(matrix)
    roots = squares[-rank:].flip(0).clamp(min=torch.finfo(torch.float32).tiny).pow(0.25).to(matrix)
    return (basis @ vectors) * roots, (vectors.T @ core) / roots[:, None]


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(columns).Q
