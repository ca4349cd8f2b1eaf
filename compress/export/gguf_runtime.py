"""What llama.cpp computes with a GGUF file: a process of its own, which may crash without harm.

    python -m compress.export.gguf_runtime FILE TOKENS.json RESULT.npy

TOKENS.json holds windows of token ids of one length. RESULT.npy gets the natural log-probabilities of all
tokens behind each, float32 [windows, tokens, vocabulary]. llama.cpp comes with one of two packages:
llama-cpp-python, or xllamacpp, which need not be compiled.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = {"llama_cpp": "llama-cpp-python", "xllamacpp": "xllamacpp"}
"""Module -> package, the first of which is taken that is here."""

ALL = 1 << 30
"""More tokens than any vocabulary has."""


def runtime() -> str:
    """llama.cpp, and the package that brings it with its version, if one is installed."""
    for module, package in PACKAGES.items():
        if find_spec(module) is not None:
            try:
                return f"llama.cpp ({package} {version(package)})"
            except PackageNotFoundError:
                return f"llama.cpp ({package})"
    return "llama.cpp"


def installed() -> bool:
    """Whether one of the packages is here."""
    return any(find_spec(module) is not None for module in PACKAGES)


def log_probabilities(file: Path, windows: list[list[int]]) -> np.ndarray:
    """The log-probabilities behind all tokens, float32 [windows, tokens, vocabulary].

    Raises:
        RuntimeError: llama.cpp cannot load the file, or fails on it.
    """
    if find_spec("llama_cpp") is None:
        return _of_server(file, windows)
    found = _logits(file, windows)
    found -= found.max(-1, keepdims=True)
    return found - np.log(np.exp(found).sum(-1, keepdims=True))


def _of_server(file: Path, windows: list[list[int]]) -> np.ndarray:
    """With xllamacpp, whose server tells the chances of the token behind a prompt."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(windows[0]) + 32
    settings.n_parallel, settings.n_gpu_layers, settings.port = 1, 0, 0
    settings.warmup = settings.fit_params = False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
    found = []
    for window in windows:
        # With sliding windows a server that has answered for one window is wrong about the next one.
        server = xllamacpp.Server(settings)
        found.append(np.stack([_behind(server, window[: at + 1]) for at in range(len(window))]))
    return np.stack(found)


def _behind(server: Any, prompt: list[int]) -> np.ndarray:
    """The log-probabilities of all tokens behind a prompt, float32 [vocabulary]. The server has kept what it
    computed for the beginning of the prompt.

    It tells them with the token that it chooses, unless that ends the text or is half a character. So it has
    to choose an "a"; what it tells are the chances before that.
    """
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": ALL, "temperature": 0.0, "logit_bias": [["a", 1e4]]}
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp fails on the tokens ({answer.get('error')})")
    chances = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = np.empty(len(chances), np.float32)
    for each in chances:
        found[each["id"]] = each["logprob"]
    return found


def _logits(file: Path, windows: list[list[int]]) -> np.ndarray:
    """With llama-cpp-python: the logits of all tokens."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    length = len(windows[0])
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise RuntimeError("llama.cpp cannot load the file")
    wanted = llama_cpp.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = max(length, 32)
    wanted.n_threads = wanted.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, wanted)
    if not context:
        raise RuntimeError("llama.cpp cannot run the file")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    found = np.empty((len(windows), length, size), np.float32)
    for number, window in enumerate(windows):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for at, token in enumerate(window):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp fails on the tokens")
        for at in range(length):
            row = llama_cpp.llama_get_logits_ith(context, at)
            found[number, at] = np.ctypeslib.as_array(
                ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (size,)
            )
    return found


if __name__ == "__main__":
    file, tokens, output = map(Path, sys.argv[1:])
    try:
        np.save(output, log_probabilities(file, json.loads(tokens.read_text())))
    except RuntimeError as error:
        sys.exit(str(error))
