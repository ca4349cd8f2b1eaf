"""BitStack (ICLR 2025): any size from one file, with stacks of sign matrices and low-rank absolute values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveInt

from compress.anatomy import linears_by_input, weight
from compress.calibration.text.settings import TextSize
from compress.engine.stream import Seen
from compress.kernels.codes.packing import pack_signs
from compress.method import Method, Paper, StepReport
from compress.quantization.parts.block_order import find_order
from compress.quantization.parts.options import StackOptions
from compress.quantization.parts.stacker import Stacker, plan_stacked
from compress.storage.formats.stacks import BitStackFormat

if TYPE_CHECKING:
    from compress.engine.shape import ModelShape
    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

OVERSAMPLING = 16
"""Random vectors of the randomised SVD beyond the rank."""

POWER_ITERATIONS = 5
"""Power iterations of the randomised SVD. More of them hardly change the residual."""

SMALLEST_SCALE = 1e-3
"""Added to every scale of an input channel."""


class BitStack(Method["BitStack.Options"]):
    """Decompose weights, scaled by their inputs, into blocks of about 1 bit, with one order for all sizes.

    For a linear W [out, in] with inputs X: s_j = mean over windows of ||X[:, j]||_2, plus 1e-3, and R_0 = W
    diag(s). For every block i: S_i = sign(R_i) with sign(0) = +1; a_i b_i is the best approximation of |R_i|
    of rank k (U sqrt(Σ) and sqrt(Σ) V^T, from a randomised SVD); R_{i+1} = R_i - S_i ⊙ (a_i b_i). n blocks
    give Ŵ = Σ_i S_i ⊙ (a_i b_i) diag(1/s) = Σ_i S_i ⊙ (a_i (b_i diag(1/s))). The paper calls this iterative
    absolute value decomposition.

    The paper divides what comes before the linear by s, where there is a norm or a projection that can take
    it. Here b_i diag(1/s) is stored, which is exact, costs nothing, and works for every architecture and for
    grouped-query attention. R is computed with the factors as they are stored, in float16, so that each block
    also compensates the rounding of those before it. Windows go through the dense model.
    """

    name = "bitstack"
    family = "quantization"
    paper = Paper(
        "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments",
        "2410.23918",
    )
    text_size = TextSize(32, 512)

    class Options(StackOptions):
        blocks: PositiveInt = Field(
            8, description="number of blocks of every linear, each of about 1 bit per weight"
        )
        rank: PositiveInt = Field(
            16,
            description="rank of the absolute values; on small matrices they take as many bytes as the signs",
        )

    def plan(self, shape: ModelShape, options: Options) -> ModelShape:
        return plan_stacked(shape, options, BitStackFormat(options.blocks, options.rank))

    def apply(self, model: StreamedModel, options: Options, context: StepContext) -> StepReport:
        stream = model.stream(context.calibration, context.folder / "stream")
        form = BitStackFormat(options.blocks, options.rank)
        journal = context.journal("decomposition")
        stacker = Stacker(context.draft, options, form, journal.state)
        for layer in model.walk(journal, stream, label="decomposing"):
            groups = linears_by_input(model.anatomy, layer.linears)
            norms = [ColumnNorms() for _ in groups]
            stream.advance(layer, {paths[0]: norm.add for paths, norm in zip(groups, norms, strict=True)})
            for paths, norm in zip(groups, norms, strict=True):
                for path, stored in stacker.wanted(layer, paths).items():
                    dense = weight(layer.linears[path])
                    # Each linear gets the same random numbers, so that a resumed run makes the same blocks.
                    blocks = decompose(dense, norm.scale, options.blocks, options.rank, context.generator())
                    stacker.write(stored, dense, blocks)
        return stacker.finish(find_order(model, stacker, options, context))


class ColumnNorms:
    """The mean over windows of ||X[:, j]||_2, without padding."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.windows = 0

    def add(self, seen: Seen) -> None:
        """Add the windows of a batch."""
        real = seen.mask.unsqueeze(-1).to(seen.inputs.device)
        squares = seen.inputs.double().square().mul_(real).sum(1)
        norms = squares.sqrt().sum(0)
        self.sum = norms if self.sum is None else self.sum + norms
        self.windows += len(seen.inputs)

    @property
    def scale(self) -> torch.Tensor:
        """s: float32 [in]."""
        assert self.sum is not None  # windows have been added
        return (self.sum / self.windows + SMALLEST_SCALE).float()


def decompose(
    dense: torch.Tensor, scale: torch.Tensor, blocks: int, rank: int, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """Decompose a weight into blocks.

    Args:
        dense: W, float32 [out, in].
        scale: s, float32 [in].
        blocks: number of blocks.
        rank: k; the rank is smaller where a dimension of W is smaller.
        generator: for the randomised SVD, on the CPU.

    Returns:
        For each block ``signs`` uint8 [out, ceil(in/8)], ``left`` float16 [out, k] and ``right`` float16 [k,
        in]; infinite where a value is too large for float16.
    """
    residual = dense.float() * scale
    smallest = torch.finfo(torch.float32).tiny
    found = []
    for _ in range(blocks):
        positive = residual >= 0
        left, right = low_rank(residual.abs(), min(rank, *dense.shape), generator)
        right = right / scale
        # Balance the factors, so that both stay far from the limits of float16. The product is the same.
        balance = (right.abs().amax(1).clamp(min=smallest) / left.abs().amax(0).clamp(min=smallest)).sqrt()
        left, right = (left * balance).half(), (right / balance[:, None]).half()
        product = left.float() @ (right.float() * scale)
        residual = residual - torch.where(positive, product, -product)
        found.append({"signs": pack_signs(positive), "left": left, "right": right})
    return found


def low_rank(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix [out, in] by one of rank k, nearly as well as possible.

    Randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1): a basis Q of the range by power
    iterations from k + 16 random vectors, then the SVD of Q^T M. With w = k + 16 and 5 iterations it costs
    24 w · out · in FLOPs, where all singular values take at least 4 · out · in · min(out, in).

    Returns:
        U sqrt(Σ) [out, k] and sqrt(Σ) V^T [k, in].
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = _orthonormal(matrix @ start)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    core = basis.T @ matrix
    # The SVD of the core from the eigenvectors of its small Gram matrix. In the product errors in Σ cancel.
    squares, vectors = torch.linalg.eigh((core @ core.T).double())
    vectors = vectors[:, -rank:].flip(1).to(matrix)
    roots = squares[-rank:].flip(0).clamp(min=torch.finfo(torch.float32).tiny).pow(0.25).to(matrix)
    return (basis @ vectors) * roots, (vectors.T @ core) / roots[:, None]


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the columns span."""
    return torch.linalg.qr(columns).Q
