"""What llama.cpp computes with a GGUF file: a process of its own, which may crash without harm.

    python -m compress.export.gguf_runtime FILE TOKENS.json LOGITS.npy

TOKENS.json holds windows of token ids of one length; LOGITS.npy gets float32 [windows, tokens, vocabulary].
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def runtime() -> str:
    """llama.cpp's Python package with its version, if it is installed."""
    try:
        return f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return "llama-cpp-python"


def installed() -> bool:
    """Whether llama-cpp-python is here."""
    return find_spec("llama_cpp") is not None


def logits(file: Path, windows: list[list[int]]) -> np.ndarray:
    """The logits of all tokens, float32 [windows, tokens, vocabulary].

    Raises:
        RuntimeError: llama.cpp cannot load the file, or fails on it.
    """
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
        np.save(output, logits(file, json.loads(tokens.read_text())))
    except RuntimeError as error:
        sys.exit(str(error))
