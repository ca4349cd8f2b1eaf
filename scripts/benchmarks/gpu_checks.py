"""The operators on a device against the same in float64: the checks of `gpu.py`.

A check makes random arguments, asks an operator, and computes in float64 what it should have said. A product
may be off by what rounding the weight and the result to 16 bits explains, and no more: the errors of single
weights are independent, so their sum is normal, and six deviations are the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from compress.kernels.cache_ops import kv_attention, kv_quantize
from compress.kernels.codes.packing import BITS, pack, pack_signs, unpack, unpack_signs
from compress.kernels.embedding_ops import packed_embedding
from compress.kernels.ops import packed_linear
from compress.kernels.reference import cache as reference_cache
from compress.kernels.reference.ops import round_to_int8
from compress.kernels.reference.stacks import spread
from compress.kernels.stack_ops import factor_linear, plane_linear

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""The largest relative error of rounding to a dtype."""

DEVIATIONS = 6
HALVES = (torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 70)
ODD = ((16, 128, 32), (33, 128, 64), (7, 256, 128), (40, 200, -1), (1, 1152, 128), (17, 96, 32), (65, 77, -1))
"""Rows of a weight, columns, and columns that share a scale: tails of every kind."""

LAYERS = (
    ("1 B", 2048, 2048),
    ("1 B", 5632, 2048),
    ("1 B", 2048, 5632),
    ("8 B", 4096, 4096),
    ("8 B", 14336, 4096),
    ("8 B", 4096, 14336),
    ("70 B", 8192, 8192),
    ("70 B", 28672, 8192),
    ("70 B", 8192, 28672),
)
"""The size of a model, and a linear of its layers: rows and columns of the weight."""

WHOLE = tuple((out, width, 128) for _, out, width in LAYERS)


@dataclass(frozen=True)
class Operators:
    """What is checked: the operators, or what stands for them in a test."""

    packed_linear: Callable[..., torch.Tensor] = packed_linear
    packed_embedding: Callable[..., torch.Tensor] = packed_embedding
    kv_quantize: Callable[..., tuple[torch.Tensor, torch.Tensor]] = kv_quantize
    kv_attention: Callable[..., torch.Tensor] = kv_attention
    plane_linear: Callable[..., torch.Tensor] = plane_linear
    factor_linear: Callable[..., torch.Tensor] = factor_linear


@dataclass
class Case:
    """One call.

    Attributes:
        name: of the case, in words.
        worst: makes the call; the largest error as a share of what is allowed, so 1 is the limit.
    """

    name: str
    worst: Callable[[], float]


def linears(operators: Operators, device: str, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Case]:
    """Products with integer codes: every width, shape, dtype and number of rows."""
    for bits in BITS:
        for place, (out, width, group) in enumerate(shapes):
            for turn, dtype in enumerate(HALVES):
                rows = ROWS[(3 * bits + 2 * place + turn) % len(ROWS)]
                zeros, scale = (place + bits) % 3 > 0, (*HALVES, torch.float32)[(place + turn) % 3]
                activations = "int8-token" if (place + bits + turn) % 5 == 4 else "floating"
                what = f"{out}x{width}, {bits} bits, groups of {group}, {rows} rows, {words(dtype)}"
                given = (operators, device, out, width, group, bits, rows, dtype, scale, zeros, activations)
                yield Case(what, lambda given=given: linear(*given))  # type: ignore[misc]


def every_row(operators: Operators, device: str) -> Iterator[Case]:
    """One small shape with every number of rows from 1 to 64, and at the borders above."""
    for rows in (*range(1, 65), 65, 127, 128, 129, 200):
        dtype, bits = HALVES[rows % 2], (4, 2, 3, 8)[rows // 2 % 4]
        given = (operators, device, 48, 384, 128, bits, rows, dtype, torch.float16, True, "floating")
        yield Case(f"48x384, {bits} bits, {rows} rows", lambda given=given: linear(*given))  # type: ignore[misc]


def linear(
    operators: Operators,
    device: str,
    out: int,
    width: int,
    group: int,
    bits: int,
    rows: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    with_zeros: bool,
    activations: str,
) -> float:
    """The worst error of a product with integer codes (see `Case`)."""
    groups = 1 if group == -1 else width // group
    codes = torch.randint(2**bits, (out, width), dtype=torch.uint8, device=device)
    scales = scales_of(out, groups, bits, width, device).to(scale_dtype)
    zeros = torch.randint(2**bits, (out, groups), dtype=torch.uint8, device=device) if with_zeros else None
    bias = torch.randn(out, device=device).to(dtype) if rows % 2 else None
    input = torch.randn(rows, width, device=device).to(dtype)
    found = operators.packed_linear(
        input, pack(codes, bits), scales, zeros, None, bias, bits, group, out, activations
    )
    levels = codes.double().view(out, groups, -1)
    levels -= 2 ** (bits - 1) if zeros is None else zeros.double().unsqueeze(-1)
    weight = (levels * scales.double().unsqueeze(-1)).view(out, width)
    taken = input if activations == "floating" else round_to_int8(input, activations, group).to(dtype)
    return product_error(found, taken, weight, bias)


def scales_of(out: int, groups: int, bits: int, width: int, device: str) -> torch.Tensor:
    """Scales with which a product has about the size of its input: float32 [out, groups]."""
    return (torch.rand(out, groups, device=device) + 0.5) / (2 ** (bits - 1) * width**0.5)


def product_error(
    found: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """The largest error of x Wᵀ + bias in 16 bits, as a share of what rounding explains.

    Args:
        found: what the operator said, in the dtype of ``input``.
        input: [rows, in].
        weight: float64 [out, in].
        bias: [out], or None.
    """
    wide, unit = input.double(), UNIT[input.dtype]
    exact = wide @ weight.T
    if bias is not None:
        exact += bias.double()
    noise = (wide.square() @ weight.square().T).sqrt_()
    allowed = unit * (DEVIATIONS * noise + exact.abs()) + 1e-7
    error = (found.double() - exact).abs_().div_(allowed).amax()
    return float("inf") if found.shape != exact.shape or bool(error.isnan()) else float(error)


FORMATS = {"NF4": (4, 64), "MXFP4": (4, 32), "NVFP4": (4, 16), "E4M3": (8, -1)}
"""Kind of numbers -> bits of a code, and columns that share a scale."""

SOME = ((16, 128), (33, 192), (7, 1152), (4096, 4096), (4096, 14336))


def formats(operators: Operators, device: str, shapes: tuple[tuple[int, int], ...] = SOME) -> Iterator[Case]:
    """Products with codes of a table, and with E4M3."""
    for kind, (bits, group) in FORMATS.items():
        for place, (out, width) in enumerate(shapes):
            for turn, dtype in enumerate(HALVES):
                rows = ROWS[(3 * bits + 2 * place + turn) % len(ROWS)]
                what = f"{out}x{width}, {kind}, {rows} rows, {words(dtype)}"
                given = (operators, device, kind, bits, group, out, width, rows, dtype)
                yield Case(what, lambda given=given: format_error(*given))  # type: ignore[misc]


def format_error(
    operators: Operators,
    device: str,
    kind: str,
    bits: int,
    group: int,
    out: int,
    width: int,
    rows: int,
    dtype: torch.dtype,
) -> float:
    """The worst error of a product with codes of one kind (see `Case`)."""
    groups = 1 if group == -1 else width // group
    scales = scales_of(out, groups, 2, width, device)
    codes = torch.randint(2**bits, (out, width), dtype=torch.uint8, device=device)
    table = None
    if kind == "E4M3":
        codes = codes & 0xBF  # none of them is NaN
        packed, numbers = codes.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn).double()
    else:
        table = torch.randn(2**bits, device=device)
        packed, numbers = pack(codes, bits), table.double()[codes.long()]
    if kind == "MXFP4":
        stored = scales.log2().add(127).to(torch.uint8)
        real = torch.exp2(stored.double() - 127)
    else:
        stored = scales.to(torch.float8_e4m3fn) if kind == "NVFP4" else scales
        real = stored.double()
    weight = (numbers.view(out, groups, -1) * real.unsqueeze(-1)).view(out, width)
    input = torch.randn(rows, width, device=device).to(dtype)
    found = operators.packed_linear(input, packed, stored, None, table, None, bits, group, out, "floating")
    return product_error(found, input, weight, None)


def stacks(operators: Operators, device: str, shapes: tuple[tuple[int, int], ...] = SOME) -> Iterator[Case]:
    """Products with nested codes of 1 to 7 blocks, and with blocks of factors."""
    for blocks in range(1, 8):
        for place, (out, width) in enumerate(shapes):
            dtype, rows = HALVES[(blocks + place) % 2], ROWS[(blocks + 2 * place) % len(ROWS)]
            given = (operators, device, blocks, out, width, rows, dtype)
            what = f"{out}x{width}, {blocks} blocks, {rows} rows, {words(dtype)}"
            yield Case(f"nested codes {what}", lambda given=given: planes(*given))  # type: ignore[misc]
            if blocks < 4:
                yield Case(f"factors {what}", lambda given=given: factors(*given))  # type: ignore[misc]


def planes(
    operators: Operators, device: str, blocks: int, out: int, width: int, rows: int, dtype: torch.dtype
) -> float:
    groups = width // 64
    packed = [pack_signs(torch.rand(out, width, device=device) < 0.5) for _ in range(blocks + 1)]
    scales = scales_of(out, groups, 1, width, device).half()
    levels = torch.zeros(out, width, dtype=torch.float64, device=device)
    for j, plane in enumerate(packed):
        levels += 2.0**-j * unpack_signs(plane, width).double()
    input = torch.randn(rows, width, device=device).to(dtype)
    stored = [torch.stack(packed[:2]), *packed[2:]]
    found = operators.plane_linear(input, stored, scales, None, "floating")
    return product_error(found, input, levels * spread(scales.double(), width), None)


def factors(
    operators: Operators, device: str, blocks: int, out: int, width: int, rows: int, dtype: torch.dtype
) -> float:
    signs = [pack_signs(torch.rand(out, width, device=device) < 0.5) for _ in range(blocks)]
    left = [torch.randn(out, 16, device=device).half() for _ in signs]
    right = [(torch.randn(16, width, device=device) / (4 * width**0.5)).half() for _ in signs]
    weight = sum(
        unpack_signs(s, width).double() * (a.double() @ b.double())
        for s, a, b in zip(signs, left, right, strict=True)
    )
    assert isinstance(weight, torch.Tensor)
    input = torch.randn(rows, width, device=device).to(dtype)
    return product_error(operators.factor_linear(input, signs, left, right, None), input, weight, None)


def embeddings(operators: Operators, device: str) -> Iterator[Case]:
    """Rows of tables: every bit as in float64, rounded once."""
    for bits in BITS:
        for out, width, group in ODD:
            what = f"{out}x{width}, {bits} bits, groups of {group}"
            given = (operators, device, out, width, group, bits)
            yield Case(what, lambda given=given: embedding(*given))  # type: ignore[misc]


def embedding(operators: Operators, device: str, out: int, width: int, group: int, bits: int) -> float:
    groups = 1 if group == -1 else width // group
    codes = torch.randint(2**bits, (out, width), dtype=torch.uint8, device=device)
    scales = scales_of(out, groups, bits, width, device).half()
    zeros = torch.randint(2**bits, (out, groups), dtype=torch.uint8, device=device)
    numbers = torch.randint(out, (2, 5), device=device)
    found = operators.packed_embedding(numbers, pack(codes, bits), scales, zeros, bits, group, out, width)
    levels = codes.double().view(out, groups, -1) - zeros.double().unsqueeze(-1)
    exact = (levels * scales.double().unsqueeze(-1)).view(out, width)[numbers].float()
    return 0.0 if torch.equal(found, exact) else float("inf")


def key_values(operators: Operators, device: str, longest: int) -> Iterator[Case]:
    """Keys and values in few bits: rounded, and attended to."""
    for bits in (2, 3, 4, 8):
        for tokens in (1, 63, 130, longest):
            for dtype in (torch.float32, *HALVES):
                what = f"{tokens} tokens, {bits} bits, {words(dtype)}"
                given = (operators, device, bits, tokens, dtype)
                yield Case(f"rounding {what}", lambda given=given: rounding(*given))  # type: ignore[misc]
                yield Case(f"attention {what}", lambda given=given: attention(*given))  # type: ignore[misc]


def rounding(operators: Operators, device: str, bits: int, tokens: int, dtype: torch.dtype) -> float:
    vectors = torch.randn(2, tokens, 3, 40, device=device).to(dtype)
    packed, scales = operators.kv_quantize(vectors, bits)
    codes = unpack(packed.flatten(0, 1), bits, 120).double().view(2, tokens, 3, 40) - 2 ** (bits - 1)
    step = scales.double()
    # A code is the nearest of those there are: at most half a step away, but beyond the last one.
    most = 2 ** (bits - 1) - 1
    error = (vectors.double() - codes * step).abs() / step
    inside = vectors.double().abs() <= most * step
    return float((error[inside] / (0.5 + 1e-5)).amax()) if bool(inside.any()) else 0.0


def attention(operators: Operators, device: str, bits: int, tokens: int, dtype: torch.dtype) -> float:
    batch, heads, shared, width, queries = 2, 2, 4, 64, min(tokens, 2)
    coded: list[torch.Tensor] = []
    for _ in range(2):
        coded += reference_cache.kv_quantize(torch.randn(batch, tokens, heads, width, device=device), bits)
    angles = torch.rand(1, tokens, width // 2, device=device).repeat(1, 1, 2) * 6.28
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    query = torch.randn(batch, heads * shared, queries, width, device=device).to(dtype)
    given = (query, *coded, cosines, sines, None, heads, bits, width**-0.5)
    found = operators.kv_attention(*given).double()
    keys, values = (
        reference_cache.dequantize(coded[i], coded[i + 1], heads, width, bits).double() for i in (0, 2)
    )
    keys = reference_cache.rotated(keys, cosines.double(), sines.double())
    wide = [states.transpose(1, 2).repeat_interleave(shared, dim=1) for states in (keys, values)]
    scores = query.double() @ wide[0].transpose(2, 3) * width**-0.5
    last = torch.arange(tokens - queries, tokens, device=device)[:, None]
    scores = scores.masked_fill(torch.arange(tokens, device=device) > last, -torch.inf)
    exact = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    allowed = 1e-4 * float(exact.abs().amax()) + UNIT[dtype] * exact.abs()
    error = ((found - exact).abs() / allowed).amax()
    return float("inf") if bool(error.isnan()) else float(error)


def words(dtype: torch.dtype) -> str:
    """``float16``."""
    return str(dtype).removeprefix("torch.")


def summary(cases: Iterator[Case], time_is_up: Callable[[], bool]) -> dict[str, Any]:
    """The record of some checks: how many there were, the worst, and which were wrong."""
    worst, count, wrong, left = 0.0, 0, [], 0
    for case in cases:
        if time_is_up():
            left += 1
            continue
        count += 1
        error = case.worst()
        worst = max(worst, error)
        if not error <= 1:
            wrong.append(f"{case.name} ({error:.2g} times what is allowed)")
    figures = {"calls": {"value": count}, "wrong": {"value": len(wrong)}}
    if worst != float("inf"):
        figures["worst"] = {"value": worst}
    facts = {"result": "agrees with float64"}
    if wrong:
        facts = {"failed": f"{len(wrong)} of {count} calls are wrong: {'; '.join(wrong[:3])}"}
    elif left:
        facts = {"failed": f"{left} calls were left out, because the time was up"}
    return {"figures": figures, "facts": facts}
