"""Products with many rows, whose blocks are dequantised first: every path of this machine against float64.

``compress_linear_by`` runs them for any number of rows; which of the kernels `packed_linear` takes is a
question of speed. AMX is tried with tiles made of plain memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.kernels.cpu import processor
from compress.kernels.cpu.library import load, paths
from compress.kernels.cpu.linear import strips_linear
from compress.kernels.ops import packed_linear
from compress.kernels.reference.ops import round_to_int8
from tests.unit.kernels.test_strips_linear import DTYPES, KINDS, PRECISION, Case, allowed, error, make

EMULATED = "tiles"
PAIRS = ("amx", "avx512", EMULATED)
"""The paths that multiply bfloat16, and therefore round weights to it in a model of bfloat16."""

ROWS = [1, 2, 5, 7, 12, 13, 16, 17, 31, 33, 64, 240, 241, 300]


@pytest.fixture(params=[*paths(), EMULATED])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A path; the emulated one is compiled like the others, into the user's cache."""
    if request.param == EMULATED:
        if "avx512" not in paths():
            pytest.skip("needs a processor with AVX-512 BF16")
        flags = (*processor.PATHS["avx512"].flags, "-DCOMPRESS_EMULATE_TILES", "-O1")
        monkeypatch.setitem(processor.PATHS, EMULATED, processor.Instructions(flags, frozenset()))
    threads = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(threads)


def multiply(
    path: str, case: Case, input: torch.Tensor, activations: str = "floating", many: bool = True
) -> torch.Tensor:
    linear = strips_linear(*case[:7], (case.out, input.shape[1]), activations, input.dtype)
    output = torch.full((len(input), case.out), torch.nan, dtype=input.dtype)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (input, output))
    load(path).compress_linear_by(ctypes.byref(linear), *pointers, len(input), int(many))
    return output


def as_multiplied(path: str, case: Case, dtype: torch.dtype) -> Case:
    """The weight as the path sees it in a model of this dtype."""
    rounded = dtype == torch.bfloat16 and path in PAIRS
    return case._replace(weight=case.weight.to(torch.bfloat16).double()) if rounded else case


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    out=st.integers(1, 150),
    width=st.one_of(st.integers(1, 300), st.integers(500, 1100)),
    group_size=st.sampled_from([-1, 8, 24, 32, 64, 128]),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(DTYPES),
    zeros=st.booleans(),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 2**31),
)
@example("e4m3", 37, 1, -1, 16, torch.float16, False, False, 1, 0)  # some results are not normal numbers
def test_every_shape_against_float64(
    path, kind, out, width, group_size, rows, dtype, zeros, bias, threads, seed
):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    case = as_multiplied(path, make(kind, out, width, group_size, zeros, dtype if bias else None), dtype)
    input = torch.randn(rows, width).to(dtype)
    got, expected = multiply(path, case, input), case.exact(input)
    assert bool(((got.double() - expected).abs() <= allowed(case, input)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(path, dtype):
    case = as_multiplied(path, make("int4", 83, 600, 64), dtype)
    input = torch.randn(300, 600).to(dtype)
    expected = case.exact(input)
    for rows in ROWS:
        assert error(multiply(path, case, input[:rows]), expected[:rows]) < PRECISION[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_both_kernels_agree_where_several_blocks_of_columns_meet(path, kind):
    case = make(kind, 83, 1100, 64, bias=torch.float32)
    input = torch.randn(37, 1100)
    difference = error(multiply(path, case, input), multiply(path, case, input, many=False).double())
    assert difference < (1e-5 if kind == "nf4" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["int8-block", "int8-token"])
@pytest.mark.parametrize("kind", ["int4", "nf4", "e4m3"])
def test_int8_activations_are_those_of_the_reference(path, kind, activations, dtype):
    case = as_multiplied(path, make(kind, 33, 200, 64, bias=dtype), dtype)
    input = (torch.randn(19, 200) * torch.logspace(-3, 3, 200)).to(dtype)
    rounded = round_to_int8(input, activations, 64)
    got = multiply(path, case, input, activations)
    assert error(got, case.exact(rounded)) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_rows_do_not_depend_on_each_other(path):
    """Neither on how many there are, nor on bad numbers among them."""
    case = make("int4", 70, 600, 64)
    input = torch.randn(50, 600).bfloat16()
    whole = multiply(path, case, input)
    assert torch.equal(multiply(path, case, input[17:18]), whole[17:18])
    input[3, 5], input[30, 599] = torch.nan, torch.inf
    spoilt = multiply(path, case, input)
    good = torch.ones(50, dtype=torch.bool)
    good[[3, 30]] = False
    assert torch.equal(spoilt[good], whole[good])
    assert not bool(spoilt[~good].isfinite().any())


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_the_operator_takes_either_kernel(rows):
    case = make("int4", 48, 160, 32, bias=torch.bfloat16)
    input = torch.randn(2, rows, 160).bfloat16()
    got = packed_linear(input, *case[:8])
    assert error(got, case.exact(input)) < 4e-3
