"""Products with stacks straight from their bits: every path of this machine against float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compress.kernels.codes.packing import unpack_signs
from compress.kernels.cpu import linear as cpu_linear
from compress.kernels.cpu import stacks
from compress.kernels.cpu.library import AUTO, kernel_name, load, paths, use
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackBlock, StackedLinear
from compress.kernels.reference.ops import round_to_int8
from compress.kernels.stack_ops import factor_linear, plane_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ACTIVATIONS = ["floating", "int8-block", "int8-token"]


@pytest.fixture(params=["reference", *(f"cpu:{path}" for path in paths())])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "reference":
        load(request.param.removeprefix("cpu:"))
    use(request.param)
    yield request.param
    use(AUTO)


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape[:-1], -(-shape[-1] // 8)), dtype=torch.uint8)


def planes(out: int, width: int, groups: int, blocks: int, bias: bool = True) -> PlaneStack:
    first = {"signs": signs(2, out, width), "scales": (torch.rand(out, groups) + 0.1).half()}
    more = [StackBlock({"signs": signs(out, width)}) for _ in range(blocks - 1)]
    return PlaneStack(width, out, [StackBlock(first), *more], torch.randn(out) if bias else None)


def factors(out: int, width: int, rank: int, blocks: int, bias: bool = True) -> FactorStack:
    parts = [
        {
            "signs": signs(out, width),
            "left": torch.randn(out, rank).half(),
            "right": torch.randn(rank, width).half(),
        }
        for _ in range(blocks)
    ]
    return FactorStack(width, out, [StackBlock(part) for part in parts], torch.randn(out) if bias else None)


def in_float64(layer: StackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [out, in], and the sums of the absolute values that its elements are made of."""
    blocks = [block.part("signs") for block in layer.stack()]
    weight = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    size = torch.zeros_like(weight)
    if isinstance(layer, FactorStack):
        for packed, a, b in zip(blocks, layer.parts_of("left"), layer.parts_of("right"), strict=True):
            weight += unpack_signs(packed, layer.in_features).double() * (a.double() @ b.double())
            size += a.double().abs() @ b.double().abs()
        return weight, size
    for place, packed in enumerate([*blocks[0], *blocks[1:]]):
        weight += unpack_signs(packed, layer.in_features).double() * 2.0**-place
    scales = layer.stack()[0].part("scales").double()
    unit = scales.repeat_interleave(-(-layer.in_features // scales.shape[1]), 1)[:, : layer.in_features]
    return weight * unit, 2 * unit


def check(
    layer: StackedLinear, x: torch.Tensor, rounded: torch.Tensor | None = None, factor: float = 1
) -> None:
    """Against float64, within the error of the dtype relative to the sums of absolute values.

    The number of the dtype that is nearest to the exact one is always right: float16's subnormal numbers lie
    farther apart than its relative error.
    """
    (weight, size), seen = in_float64(layer), (x if rounded is None else rounded).double()
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    expected = seen @ weight.T + bias.double()
    bound = factor * PRECISION[x.dtype] * (seen.abs() @ size.T + bias.double().abs())
    got = layer(x)
    assert got.dtype == x.dtype
    assert got.shape == expected.shape
    near, nearest = (got.double() - expected).abs() <= bound, got == expected.to(x.dtype)
    assert bool((near | nearest).all())


def groups_of_some_size(width: int, size: int) -> int:
    """Groups that stored scales of a width can have."""
    groups = -(-width // min(size, width))
    return -(-width // -(-width // groups))


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 5, 8, 13, 64]))
QUICK = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(SIZES, st.integers(1, 7), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 2**31))
@QUICK
def test_planes(
    kernel: str, sizes: tuple[int, int, int], blocks: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    out, width, tokens = sizes
    torch.manual_seed(seed)
    layer = planes(out, width, groups_of_some_size(width, size), blocks, bias=seed % 2 == 0)
    check(layer, torch.randn(tokens, width).to(dtype))


@given(SIZES, st.integers(1, 5), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**31))
@example((38, 1, 64), 1, 1, torch.float16, 67)  # one of the results, 7e-6, is subnormal
@QUICK
def test_factors(
    kernel: str, sizes: tuple[int, int, int], blocks: int, rank: int, dtype: torch.dtype, seed: int
) -> None:
    out, width, tokens = sizes
    torch.manual_seed(seed)
    check(factors(out, width, rank, blocks, bias=seed % 2 == 0), torch.randn(tokens, width).to(dtype))


@pytest.mark.parametrize("blocks", [1, 3, 6, 7])
@pytest.mark.parametrize("tokens", [5, 12])
@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("activations", ACTIVATIONS[1:])
def test_planes_with_int8_activations(
    kernel: str, activations: str, groups: int, blocks: int, tokens: int
) -> None:
    torch.manual_seed(blocks)
    layer = planes(37, 250, groups, blocks)
    layer.activations = activations
    x = torch.randn(tokens, 250)
    x[1] = 0
    x[2] = torch.randint(-127, 128, (250,))  # many codes lie between two numbers
    check(layer, x, round_to_int8(x, activations, -(-250 // groups)))


def test_more_rows_than_run_through_a_table_at_once(kernel: str) -> None:
    torch.manual_seed(0)
    check(factors(2100, 264, 16, 1), torch.randn(1, 264))
    check(planes(2100, 264, 2, 3), torch.randn(1, 264))


def test_the_largest_codes_and_activations_do_not_overflow(kernel: str) -> None:
    """Codes of 8 bits are as large as a byte, and a row of int8 activations may all be 127."""
    for bits in (255, 0):
        layer = planes(3, 40000, 1, 7, bias=False)
        for part in layer.parts_of("signs"):
            part.fill_(bits)
        layer.activations = "int8-token"
        x = torch.full((2, 40000), 3.0)
        check(layer, x, x, factor=50)


def test_magnitudes_that_differ_much_between_groups(kernel: str) -> None:
    torch.manual_seed(0)
    layer = planes(20, 256, 2, 3, bias=False)
    x = torch.randn(2, 256)
    x[:, 128:] *= 1e-5
    x[1, :128] = 0
    check(layer, x)
    check(layer, x.bfloat16())


def test_numbers_that_are_none_are_not_hidden(kernel: str) -> None:
    for layer in (planes(20, 64, 1, 2), factors(20, 64, 4, 2)):
        x = torch.zeros(2, 64)
        x[0, 3] = torch.nan
        assert layer(x)[0].isnan().all()
        assert layer(x)[1].isfinite().all()


def test_stacks_of_more_blocks_than_one_call_takes() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        check(factors(24, 40, 2, stacks.MOST_BLOCKS + 3), torch.randn(3, 40).to(dtype))


def test_inputs_of_any_shape(kernel: str) -> None:
    torch.manual_seed(0)
    for layer in (planes(20, 64, 1, 2), factors(20, 64, 4, 2)):
        x = torch.randn(64, 3, 2).transpose(0, 2)
        assert torch.allclose(layer(x), layer(x.contiguous()), rtol=1e-5, atol=1e-4)
        assert layer(x).shape == (2, 3, 20)
        assert layer(torch.empty(0, 64)).shape == (0, 20)
        assert torch.allclose(layer(x[0, 0]), layer(x)[0, 0], rtol=1e-5, atol=1e-4)
        assert layer(x.double()).dtype == torch.float64


def test_gradients_flow_to_the_input(kernel: str) -> None:
    torch.manual_seed(0)
    for layer in (planes(20, 64, 1, 2), factors(20, 64, 4, 2)):
        x = torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad, layer.dense().sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_operators_are_well_defined(kernel: str, tokens: int) -> None:
    torch.manual_seed(0)
    layer, other = planes(20, 72, 3, 3), factors(20, 72, 4, 2)
    x = torch.randn(tokens, 72)
    scales = layer.stack()[0].part("scales")
    for activations in ACTIVATIONS:
        torch.library.opcheck(
            torch.ops.compress.plane_linear, (x, layer.parts_of("signs"), scales, layer.bias, activations)
        )
    parts = [other.parts_of(name) for name in other.parts(0)]
    torch.library.opcheck(torch.ops.compress.factor_linear, (x, *parts, other.bias))


def test_blocks_come_and_go(kernel: str) -> None:
    """What is kept for the next call is neither taken for other blocks, nor does it keep dropped ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    for layer in (planes(20, 64, 1, 3), factors(20, 64, 4, 3)):
        check(layer, x)
        last = layer.stack()[2]
        parts = [weakref.ref(part) for part in last.buffers()]
        del layer.blocks[2:]
        check(layer, x)
        layer.add([last])
        check(layer, x)
        del layer.blocks[1:], last
        gc.collect()
        assert not any(part() is not None for part in parts)
        layer.bias = None
        check(layer, x)
        layer.to(torch.bfloat16)
        check(layer, x.bfloat16())
        del layer
    gc.collect()
    assert len(stacks._KNOWN) <= 1  # the last layer is still a variable of the loop


def test_layers_say_which_kernel_runs(kernel: str) -> None:
    for layer in (planes(20, 64, 1, 2), factors(20, 64, 4, 2)):
        assert layer.kernel == kernel == kernel_name()
        assert layer.to("meta").kernel == "reference"
        assert layer(torch.empty(2, 64, device="meta")).shape == (2, 20)


def test_what_is_stored_is_what_was_given(kernel: str) -> None:
    for layer in (planes(20, 60, 3, 3), factors(20, 60, 4, 2)):
        before = {name: part.clone() for name, part in layer.to_storage("x").items()}
        layer(torch.randn(2, 60))
        after = layer.to_storage("x")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", [planes, factors])
def test_a_stack_of_another_shape_is_not_taken_over(make: Any) -> None:
    layer, more = make(24, 40, 2, 2), make(48, 40, 2, 2, bias=False)
    before = layer.dense()
    with pytest.raises(RuntimeError, match=r"signs_0' has the shape \(.*48, 5\), not \(.*24, 5\)"):
        layer.load_state_dict({**layer.state_dict(), **more.state_dict()})
    assert torch.equal(layer.dense(), before)


def wrong_planes() -> list[tuple[Any, ...]]:
    layer = planes(20, 72, 3, 3)
    x, parts, scales, bias = (
        torch.randn(2, 72),
        layer.parts_of("signs"),
        layer.stack()[0].part("scales"),
        layer.bias,
    )
    return [
        (x[:, :64], parts, scales, bias),
        (x, [parts[0][0], *parts[1:]], scales, bias),
        (x, [parts[0], parts[1].view(torch.int8)], scales, bias),
        (x, [parts[0], parts[1][:19]], scales, bias),
        (x, [], scales, bias),
        (x, [parts[0], *parts[1:2] * 7], scales, bias),
        (x, parts, scales.float(), bias),
        (x, parts, scales[:, 0], bias),
        (x, parts, scales[:19], bias),
        (x, parts, scales, bias[:3]),
        (x.int(), parts, scales, bias),
        (x, parts, scales, bias, "int4"),
        (torch.randn(2, 0), parts, scales, bias),
    ]


def wrong_factors() -> list[tuple[Any, ...]]:
    layer = factors(20, 72, 4, 2)
    bits, left, right = (layer.parts_of(name) for name in layer.parts(0))
    x, bias = torch.randn(2, 72), layer.bias
    return [
        (x[:, :64], bits, left, right, bias),
        (x, bits[:1], left, right, bias),
        (x, [], [], [], bias),
        (x, [bits[0], bits[1][:, :8]], left, right, bias),
        (x, bits, [left[0], left[1][:, :3]], right, bias),
        (x, bits, [part.float() for part in left], right, bias),
        (x, bits, left, [right[0], right[1][:, :71]], bias),
        (x, bits, left, right, bias[:3]),
        (x.int(), bits, left, right, bias),
    ]


@pytest.mark.parametrize("case", range(13))
def test_planes_that_do_not_fit_are_refused(kernel: str, case: int) -> None:
    with pytest.raises(ValueError, match=r"shape|are|have|is|no columns"):
        plane_linear(*wrong_planes()[case])


@pytest.mark.parametrize("case", range(9))
def test_factors_that_do_not_fit_are_refused(kernel: str, case: int) -> None:
    with pytest.raises(ValueError, match=r"shape|are|is|make up"):
        factor_linear(*wrong_factors()[case])


def test_both_sides_name_the_same_kinds() -> None:
    assert (cpu_linear.PLANES, cpu_linear.FACTORS) == (4, 5)
