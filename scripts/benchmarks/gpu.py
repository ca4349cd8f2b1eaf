#!/usr/bin/env python
"""Everything that is to be known of the kernels for GPUs on a real one, in a call of less than eight minutes.

    python scripts/benchmarks/gpu.py [--parts build time] [--list]

It compiles the kernels for the GPU, checks every operator against float64, times products with packed weights
beside those of torch and beside a copy, sends a small random model through `quantize`, `evaluate` and
`bench`, and decodes with a random Llama of 1.1 billion parameters, dense and packed, with and without a CUDA
graph. It needs nvcc, torch for CUDA and no network.

Each part runs in a process of its own and ends when its time is up. A part that fails, and a row that fails,
becomes a row that says so; the others go on, and in the end the exit code is 1. Tables are printed, and the
rows go into results/gpu.json, from which scripts/update_docs.py draws a page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Sheet, machine, parser
from records import FOLDER, Results, markdown_table

STARTED = time.monotonic()
RESERVE = 6  # seconds that a part leaves for writing its last row
ALL_ROWS = (1, 2, 4, 8, 16, 32, 64)
DEVICE = "cuda"
KERNELS = "kernels"  # the cache of this benchmark, in its folder: it compiles anew
LONGEST = 4096  # tokens in a cache that is checked
SMALL = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
# The shape of TinyLlama.
LLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 4}
LLAMA_LAYERS = 22


@dataclass
class Part:
    """A part of the benchmark, in a process of its own.

    Attributes:
        seconds: after which it is ended.
        rows: what it does; it puts rows into a sheet.
    """

    seconds: int
    rows: Callable[[Bench], None]


class Bench:
    """The sheet of a part, and how its rows are measured.

    Args:
        arguments: of the command line.
        seconds: that the part has.
    """

    def __init__(self, arguments: argparse.Namespace, seconds: float) -> None:
        self.sheet = Sheet(arguments, "gpu")
        self.folder: Path = self.sheet.folder
        self.end = STARTED + seconds - RESERVE

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def time_is_up(self) -> bool:
        return self.left() <= 0

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Put a row into the sheet; where something fails, the row says what."""

        def attempt() -> dict[str, Any]:
            started = time.perf_counter()
            try:
                found = measure()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                found = failure(error)
            return {"machine": where(), "seconds": time.perf_counter() - started, **found}

        self.sheet.row(name, attempt)

    def bandwidth(self) -> float:
        """Bytes/s of a copy, from the row that the build made."""
        row = next((row for row in self.sheet.results.records if row.name == "copy"), None)
        if row is None or "bandwidth" not in row.figures:
            raise RuntimeError("there is no bandwidth of a copy, because that part failed")
        return row.figures["bandwidth"].value * 1e9


def failure(error: BaseException | str) -> dict[str, Any]:
    """What is measured where something fails: one line of words."""
    text = str(error) or type(error).__name__
    line = next((line.strip() for line in text.splitlines() if line.strip()), text)
    return {"facts": {"failed": line[:300]}}


def where() -> str:
    """The GPU and the processor."""
    import torch

    return f"{torch.cuda.get_device_name()}, {machine()}"


@contextmanager
def only_kernels(operators: Any, kernel: str) -> Iterator[Any]:
    """The operators, for the length of a ``with`` block; a call that the kernel does not answer is an error.

    Args:
        operators: as `gpu_checks.Operators`.
        kernel: ``cuda`` or ``triton``.
    """
    library = import_module(f"compress.kernels.{kernel}.library")
    start, answered = library.start, 0

    def counting(tensors: Any, call: Any) -> Any:
        nonlocal answered
        found = start(tensors, call)
        answered += found is not None
        return found

    class Checked:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                before = answered
                found = getattr(operators, name)(*arguments)
                if answered == before:
                    raise RuntimeError(f"'{name}' was computed in plain torch, and not by a kernel")
                return found

            return call

    library.start = counting
    try:
        yield Checked()
    finally:
        library.start = start


# --- parts ---


def build(bench: Bench) -> None:
    """Compile the kernels, and measure a copy."""

    def compiled() -> dict[str, Any]:
        import torch

        from compress.kernels.cuda import library

        capability = torch.cuda.get_device_capability()
        library.load(capability)
        return {"facts": {"result": "compiled and loaded for {}.{}".format(*capability)}}

    def copied() -> dict[str, Any]:
        from gpu_times import copy_bandwidth

        return {
            "figures": {"bandwidth": {"value": copy_bandwidth(DEVICE) / 1e9}},
            "facts": {"result": "GB/s"},
        }

    bench.row("build", compiled)
    bench.row("copy", copied)


def checks(bench: Bench, kind: str) -> None:
    """Check one kind of operator, or what Triton does."""
    import gpu_checks
    import torch

    from compress.kernels.cpu.library import use

    kernel = "triton" if kind == "triton" else "cuda"
    use(kernel)
    torch.manual_seed(0)
    for name, cases in kinds_of_checks()[kind].items():

        def summary(cases: Any = cases) -> dict[str, Any]:
            with only_kernels(gpu_checks.Operators(), kernel) as operators:
                return gpu_checks.summary(cases(operators, DEVICE), bench.time_is_up)

        bench.row(name, summary)


def kinds_of_checks() -> dict[str, dict[str, Callable[..., Any]]]:
    """Part -> row -> the checks in it."""
    import gpu_checks as of

    return {
        "linear": {
            "packed_linear: odd shapes": lambda *to: of.linears(*to, of.ODD),
            "packed_linear: 1 to 200 rows": of.every_row,
            "packed_linear: layers of 1 B to 70 B": lambda *to: of.linears(*to, of.WHOLE),
        },
        "others": {
            "packed_linear: NF4, MXFP4, NVFP4, E4M3": of.formats,
            "plane_linear, factor_linear": of.stacks,
            "packed_embedding": of.embeddings,
            "kv_quantize, kv_attention": lambda *to: of.key_values(*to, LONGEST),
        },
        "triton": {  # it compiles each of the calls that differ
            "Triton, packed_linear: NF4, MXFP4, NVFP4, E4M3": lambda *to: of.formats(*to, of.SOME[-1:]),
            "Triton, packed_embedding": of.embeddings,
            "Triton, packed_linear": lambda *to: of.linears(*to, of.ODD[1:2]),
        },
    }


def times(bench: Bench) -> None:
    """Time products of all shapes; the most telling shape comes first."""
    from gpu_checks import LAYERS
    from gpu_times import shape_figures

    bandwidth = bench.bandwidth()
    for size, out, width in sorted(LAYERS, key=lambda layer: layer[1:] != (4096, 14336)):
        found: dict[int, dict[str, Any]] = {}
        error: str | None = None
        if bench.time_is_up():
            error = "left out, because the time was up"
        else:
            try:
                found = shape_figures(out, width, ALL_ROWS, bandwidth, DEVICE)
            except Exception as raised:
                error = failure(raised)["facts"]["failed"]
        for rows in ALL_ROWS:
            name = f"{out}x{width} ({size}), {rows} row{'s' if rows > 1 else ''}"
            record = found.get(rows) or failure(error or "not timed")
            bench.row(name, lambda record=record: record)  # type: ignore[misc]


def pipeline(bench: Bench) -> None:
    """Send a small random model through the commands, on the GPU."""
    from streaming import write_model

    model, text = bench.folder / "small", bench.folder / "text.txt"
    shutil.rmtree(model, ignore_errors=True)
    write_model(model, 2, SMALL)
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 200)
    calibration = ("--calibration", text, "--nsamples", "8", "--seqlen", "128")
    packed, other = bench.folder / "small-rtn", bench.folder / "small-gptq"
    on_gpu = ("--device", DEVICE)
    shape = ("--bits", "4", "--group-size", "128")
    output = ("--overwrite", "-o")
    windows = ("--windows", "8", "--context", "128")
    few = ("--prefill-tokens", "64", "--decode-tokens", "16", "--repetitions", "3")
    for name, words in {
        "quantize, rtn": ("quantize", model, "--method", "rtn", *shape, *output, packed),
        "quantize, gptq": ("quantize", model, "--method", "gptq", *shape, *calibration, *output, other),
        "evaluate": ("evaluate", packed, "--baseline", model, "--text", text, *windows),
        "bench": ("bench", model, packed, *few),
    }.items():
        bench.row(name, partial(commanded, bench, (*words, *on_gpu)))


def commanded(bench: Bench, words: tuple[str | Path, ...]) -> dict[str, Any]:
    """Run a command of the program; its output goes to stderr."""
    command = [sys.executable, "-m", "compress", *map(str, words)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, bench.left()))
    except subprocess.TimeoutExpired:
        return failure("left unfinished, because the time was up")
    print(ended.stdout, ended.stderr, sep="\n", file=sys.stderr, flush=True)
    if ended.returncode:
        return failure((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])
    return {"facts": {"result": "done"}}


def decode(bench: Bench) -> None:
    """Decode with a random Llama of 1.1 billion parameters, dense and at 4 and 2 bits."""
    from gpu_decode import decoded, pack_linears, random_llama, token_bytes

    bandwidth, dense, chosen = bench.bandwidth(), {}, {}
    for bits in (16, 4, 2):
        kind = "bfloat16" if bits == 16 else f"{bits} bits, head 8"
        model = random_llama(LLAMA, LLAMA_LAYERS, DEVICE)
        if bits < 16:
            pack_linears(model, bits)
        for graph in (False, True):

            def measured(model: Any = model, bits: int = bits, graph: bool = graph) -> dict[str, Any]:
                if bench.time_is_up():
                    return failure("left out, because the time was up")
                seconds, chosen[graph] = decoded(model, DEVICE, graph)
                if bits == 16:
                    dense[graph] = seconds
                if graph and chosen[True] != chosen[False]:
                    return failure("the graph chooses other tokens than the same steps without it")
                return {"figures": decode_figures(seconds, token_bytes(model), bandwidth, dense.get(graph))}

            bench.row(f"decode, {kind}{', CUDA graph' if graph else ''}", measured)
        del model
        release()


def decode_figures(seconds: float, nbytes: int, bandwidth: float, dense: float | None) -> dict[str, Any]:
    """Milliseconds per token, the share of a copy's bandwidth, and times as fast as the dense model."""
    found = {
        "token": {"value": 1e3 * seconds},
        "read": {"value": nbytes / 1e6},
        "share": {"value": nbytes / seconds / bandwidth, "unit": "fraction"},
    }
    return found | ({} if dense is None else {"ratio": {"value": dense / seconds}})


def release() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


PARTS = {
    "build": Part(120, build),
    "linear": Part(60, partial(checks, kind="linear")),
    "others": Part(40, partial(checks, kind="others")),
    "triton": Part(45, partial(checks, kind="triton")),
    "time": Part(95, times),
    "pipeline": Part(65, pipeline),
    "decode": Part(50, decode),
}
"""In all less than eight minutes."""


# --- all of it ---


def no_gpu() -> str | None:
    """The sentence that says why nothing can be measured here; None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    return "There is no CUDA device here that torch can use, and gpu.py measures nothing but that."


def child(name: str, arguments: argparse.Namespace) -> str | None:
    """Run one part in a process of its own: None, or what went wrong with the process."""
    words = [sys.executable, __file__, "--part", name, "--results", arguments.results]
    cache = arguments.folder.resolve() / KERNELS
    environment = os.environ | {"COMPRESS_MODEL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    print(f"{name}: at most {PARTS[name].seconds} s", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [*words, "--folder", str(arguments.folder)],
        env=environment,
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        code = process.wait(PARTS[name].seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the commands that it has started
        process.wait()
        return f"ended after {PARTS[name].seconds} s, in which it was not done"
    return f"its process ended with the code {code}" if code else None


def run_all(arguments: argparse.Namespace) -> int:
    """Run the parts, print the tables, and return the exit code."""
    folder = arguments.folder.resolve()
    for known in folder.glob("*.record.json"):
        known.unlink()
    shutil.rmtree(folder / KERNELS, ignore_errors=True)
    file = FOLDER / f"{arguments.results}.json"
    results = Results.named(arguments.results, "gpu")
    if set(arguments.parts) == set(PARTS):
        results.records = []
    results.write(file)
    for name in arguments.parts:
        if wrong := child(name, arguments):
            sheet = Sheet(arguments, "gpu")
            sheet.row(f"part {name}", partial(failure, wrong))
    results = Results.read(file)
    print("\n".join(markdown_table(table, results.records) for table in results.tables))
    print(f"Kept in {file}; {time.monotonic() - STARTED:.0f} s.", file=sys.stderr)
    failed = [record for record in results.records if "failed" in record.facts]
    for record in failed:
        print(f"{record.name}: {record.facts['failed']}", file=sys.stderr)
    return 1 if failed else 0


def listing() -> str:
    """The parts with their seconds, and the shapes that are timed."""
    from gpu_checks import LAYERS

    lines = [f"{name}: at most {part.seconds} s" for name, part in PARTS.items()]
    lines += [f"{out}x{width} ({size})" for size, out, width in LAYERS]
    return "\n".join([*lines, "rows: " + ", ".join(map(str, ALL_ROWS))])


def main() -> None:
    options = parser(__doc__, "gpu")
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--list", action="store_true", help="list parts and shapes, and run nothing")
    options.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.list:
        print(listing())
        return
    if sentence := no_gpu():
        sys.exit(sentence)
    if arguments.part:
        part = PARTS[arguments.part]
        part.rows(Bench(arguments, part.seconds))
        return
    sys.exit(run_all(arguments))


if __name__ == "__main__":
    main()
