"""Products with weights in strips: every native path of this machine, and the reference, against float64."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.kernels.codes.floating import E2M1
from compress.kernels.codes.packing import pack
from compress.kernels.cpu import linear
from compress.kernels.cpu.layout import (
    BITS,
    from_strips,
    groups_from_strips,
    groups_of,
    groups_to_strips,
    to_strips,
)
from compress.kernels.cpu.library import REFERENCE, paths, use
from compress.kernels.ops import backend_of, packed_linear
from compress.kernels.reference.ops import round_to_int8

KERNELS = [REFERENCE, *(f"cpu:{path}" for path in paths() if path != "amx")]
NF4 = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0])
NF4 = torch.cat((NF4, torch.tensor([0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1])))
TABLES = {"nf4": NF4, "e2m1": E2M1, "ternary": torch.tensor([-1.0, 0, 1, 0])}
KINDS = [*(f"int{bits}" for bits in BITS), *TABLES, "e4m3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDED = ["int8-block", "int8-token"]
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The error that a result may have, for inputs and weights whose norms have a product of 1."""


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    use(request.param)
    yield request.param
    use("auto")


class Case(NamedTuple):
    """The weight of a layer: what the operator takes, and what it stands for."""

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    table: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group_size: int
    out: int
    weight: torch.Tensor  # float64 [out, in]

    def multiply(self, input: torch.Tensor, activations: str = "floating") -> torch.Tensor:
        return packed_linear(input, *self[:8], activations)

    def exact(self, input: torch.Tensor) -> torch.Tensor:
        result = input.double() @ self.weight.t()
        return result if self.bias is None else result + self.bias.double()


def make(
    kind: str,
    out: int = 40,
    width: int = 96,
    group_size: int = 32,
    zeros: bool = True,
    bias: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> Case:
    table = TABLES.get(kind)
    bits = 8 if kind == "e4m3" else int(kind[3:]) if table is None else len(table).bit_length() - 1
    codes = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8)
    if kind == "e4m3":
        codes = (torch.randn(out, width) * 2.0 ** torch.randint(-9, 7, (out, width))).to(torch.float8_e4m3fn)
    per_group = (out, groups_of(width, group_size))
    scales = (torch.rand(per_group) + 0.5).to(scale_dtype)
    zero_points = torch.randint(0, 2**bits, per_group, dtype=torch.uint8)
    columns = torch.arange(width) // (width if group_size == -1 else group_size)
    if kind == "e4m3" or table is not None:
        levels, zeros = (codes.double() if table is None else table.double()[codes.int()]), False
    else:
        levels = codes.double() - (zero_points.double()[:, columns] if zeros else 2 ** (bits - 1))
    return Case(
        to_strips(codes, bits, group_size),
        groups_to_strips(scales),
        groups_to_strips(zero_points) if zeros else None,
        table,
        None if bias is None else torch.randn(out).to(bias),
        bits,
        group_size,
        out,
        levels * scales.double()[:, columns],
    )


def allowed(case: Case, input: torch.Tensor) -> torch.Tensor:
    """The error that each result may have, float64 [rows, out]."""
    size = input.double().norm(dim=1)[:, None] * case.weight.norm(dim=1) + case.exact(input).abs()
    # Numbers below the smallest normal one, which FP8 times float16 has, are as far apart as those above it.
    return PRECISION[input.dtype] * size.clamp(min=torch.finfo(input.dtype).smallest_normal)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "activations"),
    [("int3", "floating"), ("int4", "int8-block"), ("nf4", "floating"), ("e4m3", "int8-token")],
)
def test_the_operator_is_well_defined(kernel, kind, activations):
    case = make(kind, 33, 72, 24, bias=torch.bfloat16)
    given = (torch.randn(2, 3, 72).bfloat16(), *case[:8], activations)
    # The other checks do arithmetic with all inputs, for which float8 is not made.
    checks = (
        "test_faketensor"
        if kind == "e4m3"
        else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    torch.library.opcheck(torch.ops.compress.packed_linear, given, test_utils=checks)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    out=st.integers(1, 70),
    width=st.integers(1, 300),
    group_size=st.sampled_from([-1, 8, 16, 24, 32, 64, 128]),
    rows=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    zeros=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example("nf4", 16, 1, -1, 1, torch.float32, torch.float32, False, False, 0)  # one small level alone
def test_every_shape_against_float64(
    kernel, kind, out, width, group_size, rows, dtype, scale_dtype, zeros, bias, seed
):
    torch.manual_seed(seed)
    case = make(kind, out, width, group_size, zeros, dtype if bias else None, scale_dtype)
    input = torch.randn(rows, width).to(dtype)
    got, expected = case.multiply(input), case.exact(input)
    assert got.dtype == dtype
    assert bool(((got.double() - expected).abs() <= allowed(case, input)).all())


@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_are_those_of_the_reference(kernel, kind, activations):
    case = make(kind, 33, 200, 64, bias=torch.float32)
    input = torch.randn(5, 200) * torch.logspace(-3, 3, 200)
    rounded = round_to_int8(input, activations, 64)
    assert error(rounded, input.double()) < (0.01 if activations == "int8-block" else 0.1)
    assert error(case.multiply(input, activations), case.exact(rounded)) < (1e-4 if kind == "nf4" else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_with_an_outlier_keeps_its_small_inputs(kernel, dtype):
    """Or as much of them as the type holds beside it."""
    case = make("int4", 64, 512, -1)
    input = torch.randn(3, 512)
    input[:, 7] = 100
    input = input.to(dtype)
    without = input.clone()
    without[:, 7] = 0
    got = case.multiply(input).double() - input[:, 7:8].double() * case.weight[:, 7]
    assert float((got - case.exact(without)).norm()) < PRECISION[dtype] * float(case.exact(input).norm())


def test_nan_and_infinity_do_not_vanish(kernel):
    case = make("int4")
    for bad in (torch.nan, torch.inf):
        input = torch.randn(2, 96)
        input[1, 40] = bad
        got = case.multiply(input)
        assert bool(got[0].isfinite().all())
        assert not bool(got[1].isfinite().any())


@pytest.mark.parametrize("kind", ["int4", "nf4", "e4m3"])
def test_zeros_tiny_and_huge_inputs(kernel, kind):
    case = make(kind)
    assert torch.equal(case.multiply(torch.zeros(2, 96)), torch.zeros(2, 40))
    for factor in (1e-20, 1e20):
        input = torch.randn(2, 96) * factor
        assert error(case.multiply(input), case.exact(input)) < 2e-6
    assert case.multiply(torch.randn(0, 96)).shape == (0, 40)


def test_a_layer_is_described_once_and_forgotten_with_its_weight():
    use("cpu")
    gc.collect()  # what tests before this one described
    case = make("int4", 48, 96)
    before = len(linear._PRODUCTS)
    input = torch.randn(3, 96)
    first = case.multiply(input)
    assert torch.equal(case.multiply(input[None])[0], first)
    assert len(linear._PRODUCTS) == before + 1
    other = case._replace(scales=case.scales * 2)
    assert torch.equal(other.multiply(input), first * 2)
    assert torch.equal(case.multiply(input.t().contiguous().t()), first)
    del case, other
    gc.collect()
    assert len(linear._PRODUCTS) == before
    use("auto")


def wrong(case: Case, **changes: object) -> None:
    input = changes.pop("input", torch.randn(2, 96))
    activations = changes.pop("activations", "floating")
    packed_linear(input, *case._replace(**changes)[:8], activations)


def test_what_does_not_fit_is_refused_before_native_code_sees_it(kernel):
    case = make("int4", bias=torch.float32)
    narrow = make("int4", 40, 64)
    for changes in (
        {"input": torch.randn(2, 80)},
        {"input": torch.randn(2, 97)},
        {"input": torch.ones(2, 96, dtype=torch.int32)},
        {"packed": case.packed[:2]},
        {"packed": narrow.packed},
        {"packed": case.packed.to(torch.int16)},
        {"packed": case.packed.view(torch.float8_e4m3fn)},
        {"scales": narrow.scales},
        {"scales": case.scales.double()},
        {"zeros": narrow.zeros},
        {"zeros": case.zeros.int()},
        {"bias": case.bias[:39]},
        {"bias": case.bias.int()},
        {"bits": 3},
        {"bits": 9},
        {"group_size": 16},
        {"group_size": 0},
        {"out": 50},
        {"table": NF4},  # together with zero points
        {"table": NF4[:15], "zeros": None},
        {"table": NF4.double(), "zeros": None},
        {"activations": "int4"},
    ):
        with pytest.raises(ValueError):
            wrong(case, **changes)


@pytest.mark.parametrize("activations", ["floating", *ROUNDED])
@pytest.mark.parametrize("kind", ["int2", "int8", "nf4"])
def test_canonical_rows_give_the_same_as_strips(kind, activations):
    case = make(kind, zeros=False)
    codes = from_strips(case.packed, case.bits, case.group_size, 40, 96)
    rows = case._replace(packed=pack(codes, case.bits), scales=groups_from_strips(case.scales, 40))
    input = torch.randn(3, 96)
    use(REFERENCE)
    assert error(rows.multiply(input, activations), case.multiply(input, activations).double()) < 1e-6
    use("auto")


def test_the_backend_says_what_runs():
    use("cpu:portable")
    assert backend_of("cpu") == "cpu:portable"
    assert backend_of("cuda") == REFERENCE
    use("auto")


@pytest.mark.parametrize("place", ["packed", "scales", "zeros", "bias"])
def test_gaps_in_memory_are_never_taken_for_numbers(kernel, place):
    case, input = make("int4", bias=torch.float32), torch.randn(2, 96)
    spread = case._replace(**{place: torch.stack([getattr(case, place)] * 2, dim=-1)[..., 0]})
    if kernel == REFERENCE:
        assert torch.equal(spread.multiply(input), case.multiply(input))
    else:
        with pytest.raises(ValueError, match="must be contiguous"):
            spread.multiply(input)
