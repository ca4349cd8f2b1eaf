#!/usr/bin/env python
"""How fast the runtimes are with what `compress-model export` writes: the demo model in each of them.

All rows are timed in one run of `compress.evaluation.bench`: each in a process of its own, taking turns. The
first one is the dense model in transformers, which the others are compared with. Runtimes that are not
installed are left out, and a line says so.

    python scripts/benchmarks/runtime_speeds.py [--threads 2] [--llama-cpp FOLDER]

An interrupted benchmark goes on: what is in --folder already is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import Sheet, command, compressed, dense_model, parser
from decode import LlamaCpp, figures, timed

from compress.evaluation.bench import Contestant
from compress.evaluation.measure import ModelProcess
from compress.evaluation.timed import PROMPT_TOKENS, Settings, Timed, device_name, serve
from compress.export.onnx import GRAPH
from compress.system.memory import peak_memory

ROUNDED = {"method": "rtn", "bits": 4, "group_size": 64, "embedding_bits": 8}
PACKAGES = {"mlx": "mlx_lm", "onnx": "onnxruntime", "bitsandbytes": "bitsandbytes", "gguf": "llama_cpp"}


@dataclass(frozen=True)
class Elsewhere(Contestant):
    """An export, run by the program that it is for in a process of its own."""

    runtime: str = "transformers"

    def process(self) -> ModelProcess:
        found = ModelProcess(self.folder, self.settings, self.name)
        found._command = [sys.executable, __file__, "--serve", str(self.folder), "--runtime", self.runtime]
        found._command += [f"--threads={self.settings.threads}"]
        return found


class Runtime:
    """What runtimes that are not transformers share: a prompt, and the state of the process."""

    longest, generates, prompt_tokens = 2048, True, PROMPT_TOKENS
    kernel, dtype = "", ""
    vocabulary = 49152

    def __init__(self, threads: int) -> None:
        self._baseline, self._threads = peak_memory(), threads

    def prompt(self, count: int) -> Any:
        import numpy as np

        return np.random.default_rng(0).integers(0, self.vocabulary, (1, count))

    def state(self) -> dict[str, Any]:
        import torch

        return {
            "peak_resident_bytes": peak_memory(),
            "baseline_resident_bytes": self._baseline,
            "threads": self._threads,
            "device": device_name(torch.device("cpu")),
            "kernel": self.kernel,
            "storage_dtype": self.dtype,
        }


class InMlx(Runtime):
    """A folder in mlx-lm on the CPU."""

    dtype = "4 bits"

    def __init__(self, folder: Path, threads: int) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        super().__init__(threads)
        mx.set_default_device(mx.cpu)
        self._mx, self._cache = mx, make_prompt_cache
        self._model: Any = load_model(folder)[0]
        self.kernel = f"mlx {mx.__version__}"

    def prefill(self, tokens: int) -> float:
        prompt, cache = self._mx.array(self.prompt(tokens)), self._cache(self._model)
        return seconds(lambda: self._mx.eval(self._model(prompt, cache=cache)[:, -1]))

    def decode(self, tokens: int) -> float:
        cache = self._cache(self._model)
        token = self._next(self._mx.array(self.prompt(self.prompt_tokens)), cache)

        def generate() -> None:
            nonlocal token
            for _ in range(tokens):
                token = self._next(token, cache)

        return seconds(generate)

    def _next(self, tokens: Any, cache: Any) -> Any:
        found = self._model(tokens, cache=cache)[:, -1:].argmax(-1)
        self._mx.eval(found)
        return found


class InOnnxRuntime(Runtime):
    """A graph in onnxruntime. It has no cache of keys and values, so only the prefill is timed."""

    generates, dtype = False, "float32"

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        super().__init__(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=providers)
        self.kernel = f"onnxruntime {onnxruntime.__version__}"

    def prefill(self, tokens: int) -> float:
        prompt = self.prompt(tokens)
        given = {"input_ids": prompt, "attention_mask": prompt * 0 + 1}
        return seconds(lambda: self._session.run(None, given))


def in_transformers(folder: Path, threads: int) -> Timed:
    """A folder as any user of transformers loads it, without compress-model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return Timed(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


RUNTIMES: dict[str, Callable[[Path, int], Any]] = {
    "transformers": in_transformers,
    "mlx": InMlx,
    "onnx": InOnnxRuntime,
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def contestants(folder: Path, threads: int, llama_cpp: Path | None) -> Iterator[Contestant]:
    """The rows; those whose runtime is missing are left out."""
    dense = dense_model(folder)
    rounded, nf4 = folder / "4-bits", folder / "nf4"
    compressed(rounded, dense, [ROUNDED])
    compressed(nf4, dense, [{"method": "nf4"}])
    settings = Settings(threads=threads)
    yield Elsewhere("dense, as huggingface", exported(dense, "huggingface"), settings)
    yield Contestant("4 bits, in compress-model", rounded, settings)
    for name, source, format in (
        ("4 bits, as compressed-tensors", rounded, "compressed-tensors"),
        ("NF4, as bitsandbytes", nf4, "bitsandbytes"),
        ("4 bits, as mlx", rounded, "mlx"),
        ("dense, as onnx", dense, "onnx"),
        ("4 bits, as gguf", rounded, "gguf"),
    ):
        if (package := PACKAGES.get(format)) and not find_spec(package):
            print(f"{package} is not here, so its row is left out.", file=sys.stderr)
        elif format == "gguf":
            yield LlamaCpp(name, exported(source, format, ".gguf"), settings, llama_cpp)
        else:
            runtime = format if format in RUNTIMES else "transformers"
            yield Elsewhere(name, exported(source, format), settings, runtime)


def exported(source: Path, format: str, suffix: str = "") -> Path:
    """The export of a folder, made once beside it."""
    output = source.with_name(f"{source.name}.{format}{suffix}")
    if not output.exists():
        command("export", source, "--format", format, "-o", output)
    return output


def main() -> None:
    options = parser(__doc__, "runtime_speeds")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--prefill-tokens", type=int, default=512)
    options.add_argument("--decode-tokens", type=int, default=64)
    options.add_argument("--repetitions", type=int, default=9)
    options.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where pip --target put it")
    options.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options.add_argument("--runtime", choices=list(RUNTIMES), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.llama_cpp:
        sys.path.append(str(arguments.llama_cpp))
    if arguments.serve:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        serve(RUNTIMES[arguments.runtime](arguments.serve, arguments.threads), sys.stdin, answers)
        return
    sheet = Sheet(arguments, "runtime_speeds")
    rows = list(contestants(sheet.folder, arguments.threads, arguments.llama_cpp))
    found = timed("speeds", rows, sheet.folder, arguments)
    for row, contestant in zip(found.models, rows, strict=True):
        measured = {"figures": figures(row, contestant.folder), "facts": {"kernel": row.kernel}}
        sheet.row(row.name, lambda measured=measured: measured)
    sheet.show()


if __name__ == "__main__":
    main()
