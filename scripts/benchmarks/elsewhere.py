"""Other programs, timed as compress-model is: each in a process of its own that answers the same questions.

    python scripts/benchmarks/elsewhere.py FOLDER-OR-FILE --runtime onnx --threads 2

serves one of them, as `compress.evaluation.timed` does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.evaluation.bench import Contestant
from compress.evaluation.measure import ModelProcess
from compress.evaluation.timed import PROMPT_TOKENS, Timed, device_name, serve
from compress.export.onnx import GRAPH
from compress.system.memory import peak_memory


@dataclass(frozen=True)
class Elsewhere(Contestant):
    """A folder or file that another program runs.

    Attributes:
        runtime: a key of ``RUNTIMES``.
        packages: where pip put llama-cpp-python with ``--target``, if not here.
    """

    runtime: str = "transformers"
    packages: Path | None = None

    def process(self) -> ModelProcess:
        found = ModelProcess(self.folder, self.settings, self.name)
        found._command = [sys.executable, __file__, str(self.folder), "--runtime", self.runtime]
        found._command += [f"--threads={self.settings.threads}"]
        found._command += [f"--packages={self.packages}"] if self.packages else []
        return found


class Runtime:
    """What programs that are not transformers share: a random prompt, and the state of the process.

    Args:
        threads: that the program uses.
    """

    longest, generates, prompt_tokens = 2048, True, PROMPT_TOKENS
    kernel, dtype, vocabulary = "", "", 0

    def __init__(self, threads: int) -> None:
        self._baseline, self._threads = peak_memory(), threads

    def prompt(self, count: int) -> Any:
        """Tokens, int64 [1, count]."""
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


class InLlamaCpp(Runtime):
    """A GGUF file in llama.cpp."""

    dtype = "GGUF"

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        super().__init__(threads)
        self._library = llama_cpp
        size = {"n_ctx": self.longest, "n_batch": self.longest, "n_ubatch": 512}
        self._model = llama_cpp.Llama(
            str(file), n_threads=threads, n_threads_batch=threads, verbose=False, **size
        )
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self._model._model.vocab)
        self.kernel = f"llama.cpp ({llama_cpp.__version__} of llama-cpp-python)"

    def prefill(self, tokens: int) -> float:
        self._forget()
        prompt = self.prompt(tokens)[0].tolist()
        return seconds(lambda: self._next(prompt))

    def decode(self, tokens: int) -> float:
        self._forget()
        token = self._next(self.prompt(self.prompt_tokens)[0].tolist())

        def generate() -> None:
            nonlocal token
            for _ in range(tokens):
                token = self._next([token])

        return seconds(generate)

    def _forget(self) -> None:
        context = self._model._ctx.ctx
        self._library.llama_memory_clear(self._library.llama_get_memory(context), True)

    def _next(self, tokens: list[int]) -> int:
        """The likeliest token after ``tokens``; only the last position gets logits."""
        import numpy as np

        context, given = self._model._ctx.ctx, (self._library.llama_token * len(tokens))(*tokens)
        if self._library.llama_decode(context, self._library.llama_batch_get_one(given, len(tokens))):
            raise RuntimeError("llama.cpp cannot run these tokens")
        logits = self._library.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


class InOnnxRuntime(Runtime):
    """A graph in onnxruntime. It has no cache of keys and values, so only the prefill is timed."""

    generates, dtype = False, "ONNX"

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from transformers import AutoConfig

        super().__init__(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=providers)
        self.vocabulary = AutoConfig.from_pretrained(folder).vocab_size
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
    "onnx": InOnnxRuntime,
    "gguf": InLlamaCpp,
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument("--runtime", choices=list(RUNTIMES), required=True)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--packages", type=Path, metavar="FOLDER", help="where pip --target put llama-cpp-python"
    )
    arguments = options.parse_args()
    if arguments.packages:
        sys.path.append(str(arguments.packages))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what these programs print is not an answer
    serve(RUNTIMES[arguments.runtime](arguments.model, arguments.threads), sys.stdin, answers)


if __name__ == "__main__":
    main()
