"""Products of ``source/formats.cu`` against the reference, emulated: NF4, MXFP4, NVFP4 and E4M3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.kernels import ops
from compress.kernels.codes.floating import E4M3, quantize_float
from compress.kernels.codes.nf4 import NF4Weight
from compress.kernels.codes.packing import pack
from compress.kernels.layers import base
from compress.kernels.layers.base import CodedLinear
from compress.kernels.layers.float_linear import FloatLinear
from compress.kernels.layers.nf4_linear import NF4Linear
from tests.emulation.build import CUDA
from tests.emulation.emulator import FEWER, SCHEDULES, Device, EmulationError, Kernels
from tests.emulation.test_linear_kernels import HALVES, INPUTS, check

SOURCE = CUDA / "formats.cu"

# Kind -> rows, columns and columns that share a scale, of every kind of tail that the kind can have.
SHAPES = {
    "NF4": ((16, 128, 64), (33, 192, 64), (7, 1152, 64)),
    "MXFP4": ((17, 96, 32), (16, 128, 32), (40, 288, 32)),
    "NVFP4": ((16, 128, 16), (7, 80, 16), (33, 272, 16)),
    "two bits": ((16, 77, -1), (1, 128, 16), (24, 96, 48)),
    "E4M3": ((16, 128, -1), (7, 68, -1), (40, 1152, 128)),
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(SOURCE)


def weight(kind: str, out: int, width: int, group: int, scale: torch.dtype) -> tuple[Any, ...]:
    """A random one: packed, scales, no zeros, table."""
    groups, bits = 1 if group == -1 else width // group, bits_of(kind)
    scales = (torch.rand(out, groups) + 0.5).div(2 * width**0.5)
    if kind == "MXFP4":
        stored = scales.log2().add(127).to(torch.uint8)
    else:
        stored = scales.to(E4M3 if kind == "NVFP4" else scale)
    if kind == "E4M3":
        return torch.randn(out, width).mul(3).to(E4M3), stored, None, None
    packed = pack(torch.randint(2**bits, (out, width), dtype=torch.uint8), bits)
    return packed, stored, None, torch.randn(2**bits)


def bits_of(kind: str) -> int:
    return {"two bits": 2, "E4M3": 8}.get(kind, 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", SHAPES)
def test_products_are_those_of_the_reference(kernels: Kernels, kind: str, schedule: str) -> None:
    at = 3 * list(SHAPES).index(kind) + SCHEDULES.index(schedule)
    for turn, (out, width, group) in enumerate(SHAPES[kind]):
        torch.manual_seed(at * 3 + turn)
        dtype, rows = HALVES[(at + turn) % 2], INPUTS[(at * 3 + turn) % len(INPUTS)]
        given = weight(kind, out, width, group, (torch.float32, *HALVES)[turn])
        bias = torch.randn(out).to(dtype) if turn == 1 else None
        activations = ("floating", "int8-token", "int8-block")[turn]
        rest = (bits_of(kind), group, out, activations)
        check(kernels, torch.randn(rows, width).to(dtype), given, bias, rest, schedule=schedule)


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_weight_is_read_once(kernels: Kernels, kind: str, rows: int) -> None:
    out, width = 32, 1024
    group = -1 if kind == "E4M3" else SHAPES[kind][0][2]
    packed, scales, _, table = weight(kind, out, width, group, torch.float16)
    input = torch.randn(rows, width).half()
    rest = (bits_of(kind), group, out, "floating")
    device = check(kernels, input, (packed, scales, None, table), None, rest)
    size = packed.numel() * packed.element_size()
    assert device.traffic(packed).read == device.traffic(packed).fetched == size
    assert device.traffic(scales).sectors <= scales.numel() * scales.element_size() + 32


def test_all_numbers_of_e4m3(kernels: Kernels) -> None:
    """Every byte, among them those below the normal numbers and the two that are NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(8, 32)
    found = []
    for column in range(32):
        input = torch.zeros(1, 32).half()
        input[0, column] = 1
        own = codes.clone().view(torch.uint8)
        own[:, :column] = own[:, column + 1 :] = 0  # a product with NaN is NaN, whatever the input
        scales = torch.ones(8, 1)
        with Device(kernels, [input, own, scales]) as device:
            given = (input, own.view(E4M3), scales, None, None, None, 8, -1, 8, "floating")
            found.append(ops.cuda_linear.multiply(device.library, *given, None)[0][0])
    assert torch.equal(torch.stack(found, 1).float().nan_to_num(7), codes.float().nan_to_num(7))


def test_all_exponents_of_scales(kernels: Kernels) -> None:
    scales = torch.arange(96, 136, dtype=torch.uint8).view(40, 1)
    packed = pack(torch.ones(40, 32, dtype=torch.uint8), 4)
    input = torch.zeros(1, 32).bfloat16()
    input[0, 5] = 1
    given = (input, packed, scales, None, torch.full((16,), 1.5), None, 4, 32, 40, "floating")
    with Device(kernels, [input, packed, scales]) as device:
        found, _ = ops.cuda_linear.multiply(device.library, *given, None)
    assert found[0].tolist() == [1.5 * 2.0**exponent for exponent in range(96 - 127, 136 - 127)]


# --- layers ---


def nf4(nested: bool) -> NF4Linear:
    absmax = torch.rand(24 * 3) + 0.1
    scales: tuple[Any, ...] = (absmax, torch.linspace(-1, 1, 16), torch.bfloat16)
    if nested:
        coded = torch.randint(256, (24 * 3,), dtype=torch.uint8)
        scales = (coded, *scales[1:], (torch.rand(1), torch.rand(256), torch.rand(1)))
    return NF4Linear(NF4Weight(torch.randint(16, (24, 192), dtype=torch.uint8), *scales))


def floating(kind: Any) -> FloatLinear:
    return FloatLinear(quantize_float(torch.randn(24, 192), kind, torch.bfloat16), torch.randn(24))


LAYERS: dict[str, Callable[[], CodedLinear]] = {
    "nf4": lambda: nf4(False),
    "nf4, nested": lambda: nf4(True),
    **{kind: lambda kind=kind: floating(kind) for kind in ("fp8", "mxfp4", "nvfp4")},
}


@pytest.fixture
def on_device(emulate: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch) -> Device:
    """Layers take themselves for being on a CUDA device, and operators run the emulated kernels."""
    device = emulate("formats.cu")
    monkeypatch.setattr(base, "library", lambda: None)
    for module in (base, ops):
        monkeypatch.setattr(module, "backend_of_rows", lambda _: "cuda")
    monkeypatch.setattr(torch.ops.compress, "packed_linear", ops._packed_linear_cuda)
    return device


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_multiply_from_their_codes(on_device: Device, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, input = LAYERS[name]().to(dtype), torch.randn(3, 192).to(dtype)
    expected, before, size = layer(input), layer.quantized(), layer.weight_bytes
    layer.arrange()
    assert layer.in_rows
    assert layer.kernel == "cuda"
    found = layer(input)
    assert on_device.counts.multiply_adds > 0
    assert float((found - expected).abs().max()) <= 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert layer.quantized().same_as(before)
    assert layer.quantized(slice(2, 10)).dequantize().equal(before.dequantize()[2:10])
    assert layer.weight_bytes <= size + (4 * 24 * 3 if "nested" in name else 0) + 2 * 64
    layer.float()
    assert layer.quantized().same_as(before)
    assert layer.in_rows


def test_a_block_in_two_rows_stays_with_the_reference(on_device: Device) -> None:
    codes = torch.randint(16, (8, 96), dtype=torch.uint8)
    layer = NF4Linear(NF4Weight(codes, torch.rand(12), torch.linspace(-1, 1, 16), torch.bfloat16))
    layer.arrange()
    assert not layer.in_rows
    assert layer.kernel == "reference"


def test_what_rows_may_be_is_checked() -> None:
    input, codes = torch.randn(2, 64), torch.randn(8, 64).to(E4M3)
    with pytest.raises(ValueError, match=r"'scales' is torch\.int64"):
        ops.packed_linear(input, codes, torch.ones(8, 1).long(), None, None, None, 8, -1, 8)
    with pytest.raises(ValueError, match="'packed' has the shape"):
        ops.packed_linear(input, codes[:, :32], torch.ones(8, 1), None, None, None, 8, -1, 8)
    found = ops.packed_linear(input, codes, torch.ones(8, 1), None, None, None, 8, -1, 8)
    assert torch.allclose(found, input @ codes.float().T, atol=1e-5)


BUGS = {
    "missing barrier after the table": ("table[threadIdx.x] = w.table[threadIdx.x];\n    __syncthreads();",
                                        "table[threadIdx.x] = w.table[threadIdx.x];"),
    "one scale for two groups": ("levels[at / 8 * Code::SCALES / 4]", "levels[0]"),
    "the wrong group": ("i * 4 / Code::SCALES)", "0)"),
    "tail of the groups": ("min(column / w.group_size, w.groups - 1)", "column / w.group_size"),
    "exponent of the scales": ("byte << 23", "(byte + 1) << 23"),
}  # fmt: skip
ONE_KERNEL = {
    "case 2: return run(LookedUp<2>());": "",
    "case 8: return run(Float8());": "",
    **FEWER,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    right, wrong = BUGS[bug]
    kernels = Kernels(SOURCE, {**ONE_KERNEL, right: wrong})
    kind = "MXFP4" if "exponent" in bug else "NVFP4"
    given = weight(kind, 23, 208 if kind == "NVFP4" else 224, 16 if kind == "NVFP4" else 32, torch.float16)
    rest = (4, 16 if kind == "NVFP4" else 32, 23, "floating")
    input = torch.randn(3, given[0].shape[1] * 8).bfloat16()
    with pytest.raises((AssertionError, EmulationError)):
        check(kernels, input, given, None, rest)


@pytest.mark.parametrize(
    ("right", "wrong"), [("(127 + 120) << 23", "(127 + 119) << 23"), ("magnitude == 0x7f ?", "false ?")]
)
def test_a_planted_bug_in_e4m3_is_found(right: str, wrong: str) -> None:
    kernels = Kernels(SOURCE, {"case 4: return run(LookedUp<4>());": "", right: wrong})
    with pytest.raises(AssertionError):
        test_all_numbers_of_e4m3(kernels)
