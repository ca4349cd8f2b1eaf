"""Products with packed weights timed on a GPU, beside torch's own and a copy: the times of `gpu.py`.

The weights of a shape are copied until they fill more than the caches of a GPU, and one CUDA graph holds a
product with each copy. So every weight comes from memory, and what the host does between two products is not
in the times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from roofline import DENSE, GROUP, Layout, moved_bytes

from compress.kernels.codes.packing import packed_width
from compress.kernels.ops import packed_linear
from compress.kernels.triton.linear import multiply as triton_linear

POOL = 256 << 20
COPIED = 1 << 30
REPEATS = 5
LEAST_SECONDS = 2e-3  # of a repeat: far above what events resolve
Timer = Callable[[Sequence[Callable[[], object]]], float]


def on_gpu(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call, the median of some repeats; the calls run one after the other in a CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replayed(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    replayed(1)
    times = max(1, int(LEAST_SECONDS / max(replayed(1), 1e-6)))
    return statistics.median(replayed(times) for _ in range(REPEATS)) / len(calls)


@dataclass
class Contender:
    """A product that is timed for one shape.

    Attributes:
        key: its name in figures.
        weights: the tensors of a weight, once for each copy.
        multiply: called with an input and one of them.
        nbytes: of a weight.
    """

    key: str
    weights: list[tuple[torch.Tensor, ...]]
    multiply: Callable[..., torch.Tensor]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(tensor.nbytes for tensor in self.weights[0])


def pool(*tensors: torch.Tensor, size: int) -> list[tuple[torch.Tensor, ...]]:
    """Copies of the tensors of a weight, at least so many bytes in all."""
    copies = -(-size // sum(tensor.nbytes for tensor in tensors))
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(copies - 1))]


def integers(
    out: int,
    width: int,
    bits: int,
    device: str,
    size: int,
    key: str = "int",
    product: Callable[..., torch.Tensor] = packed_linear,
) -> Contender:
    """Ours, with codes of so many bits in groups of 128 columns."""
    shape = (out, packed_width(width, bits))
    packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    scales = (torch.rand(out, width // GROUP, device=device) * 0.01).half()
    weights = pool(packed, scales, size=size)
    assert sum(tensor.nbytes for tensor in weights[0]) == Layout(bits).weight_bytes(out, width)

    def multiply(input: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return product(input, packed, scales, None, None, None, bits, GROUP, out, "floating")

    return Contender(f"{key}{bits}", weights, multiply)


def nf4(out: int, width: int, device: str, size: int) -> Contender:
    """Ours, with codes of NF4 in groups of 64 columns with float32 scales."""
    packed = torch.randint(-(2**31), 2**31, (out, packed_width(width, 4)), dtype=torch.int32, device=device)
    scales, table = torch.rand(out, width // 64, device=device) * 0.01, torch.randn(16, device=device)

    def multiply(input: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return packed_linear(input, packed, scales, None, table, None, 4, 64, out)

    return Contender("nf4", pool(packed, scales, size=size), multiply)


def dense(out: int, width: int, device: str, size: int) -> Contender:
    """The product of torch in bfloat16."""
    weight = torch.randn(out, width, device=device).bfloat16()
    assert weight.nbytes == DENSE.weight_bytes(out, width)
    return Contender("bfloat16", pool(weight, size=size), F.linear)


def torch_int4(out: int, width: int, device: str, size: int) -> Contender:
    """The product of torch with codes of 4 bits."""
    codes = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = torch.rand(width // GROUP, out, 2, device=device).bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm
    return Contender(
        "torch_int4",
        pool(packed, scales_and_zeros, size=size),
        lambda input, packed, scales: multiply(input, packed, GROUP, scales),
    )


def contenders(out: int, width: int, device: str, size: int) -> Iterator[Callable[[], Contender]]:
    """What is timed for a shape, the dense product first. Each is made when its turn comes."""
    yield lambda: dense(out, width, device, size)
    for bits in (4, 2, 3):
        yield lambda bits=bits: integers(out, width, bits, device, size)  # type: ignore[misc]
    yield lambda: nf4(out, width, device, size)
    yield lambda: integers(out, width, 4, device, size, "triton_int", triton_linear)
    yield lambda: torch_int4(out, width, device, size)


def copy_bandwidth(device: str, timer: Timer = on_gpu, size: int = COPIED) -> float:
    """Bytes/s that a copy within the device reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timer([lambda: target.copy_(source)])


def shape_figures(
    out: int,
    width: int,
    all_rows: Sequence[int],
    bandwidth: float,
    device: str,
    timer: Timer = on_gpu,
    size: int = POOL,
) -> dict[int, dict[str, Any]]:
    """The records of one shape for each number of rows.

    Args:
        out, width: the shape of the weight.
        all_rows: of the input.
        bandwidth: of a copy, bytes/s.
        device: where it runs.
        timer: what times calls.
        size: bytes of a pool.

    Returns:
        Rows -> figures ``KEY_time`` (s), ``KEY_share`` (of the bandwidth) and ``KEY_ratio`` (times as fast as
        the dense product), and what could not be timed as the fact ``failed``.
    """
    found: dict[int, dict[str, Any]] = {rows: {"figures": {}, "facts": {}} for rows in all_rows}
    for make in contenders(out, width, device, size):
        try:
            contender = make()
            for rows in all_rows:
                _time(contender, out, width, rows, bandwidth, device, timer, found[rows]["figures"])
        except torch.OutOfMemoryError as error:
            for rows in all_rows:
                found[rows]["facts"]["failed"] = f"too little memory: {first_line(error)}"
        except (RuntimeError, NotImplementedError) as error:
            if "CUDA error" in str(error):  # nothing works in this process any more
                raise
            for rows in all_rows:
                found[rows]["facts"]["failed"] = first_line(error)
    return found


def _time(
    contender: Contender,
    out: int,
    width: int,
    rows: int,
    bandwidth: float,
    device: str,
    timer: Timer,
    figures: dict[str, Any],
) -> None:
    input = torch.randn(rows, width, device=device).bfloat16()
    calls = [
        lambda weight=weight: contender.multiply(input, *weight)  # type: ignore[misc]
        for weight in contender.weights
    ]
    seconds, key = timer(calls), contender.key
    least = moved_bytes(contender.nbytes, out, width, rows) / bandwidth
    figures[f"{key}_time"] = {"value": seconds * 1e6}
    figures[f"{key}_share"] = {"value": least / seconds, "unit": "fraction"}
    if key != "bfloat16" and "bfloat16_time" in figures:
        figures[f"{key}_ratio"] = {"value": figures["bfloat16_time"]["value"] / (seconds * 1e6)}


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
