"""Compiling, loading and starting the CUDA kernels, and everything that can go wrong with it, without a GPU.

A shell script stands for nvcc, and has a C++ compiler make a tiny library in its place.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.errors import BadInput, CompressError
from compress.kernels import cache_ops, embedding_ops, ops
from compress.kernels.codes.packing import pack
from compress.kernels.cpu import library as cpu_library
from compress.kernels.cpu.build import find_compiler
from compress.kernels.cuda import build, library, linear
from compress.kernels.native import ABLE, LIBRARY, OFF, NotBuilt, version_of, warn_once
from compress.kernels.reference import ops as reference
from compress.kernels.triton import library as triton

HOPPER = (9, 0)
SAID = "Packed layers run in plain torch on the GPU, which is slower."
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (apt install g++)")

# What the script does unless told otherwise: nvcc's own options are left away, and .cu is C++.
COMPILE = """
for word in "$@"; do shift; case "$word" in -arch=*|-Xcompiler) ;; *) set -- "$@" "$word";; esac; done
case "$*" in *-shared*) exec {compiler} "$@";; *) exec {compiler} -x c++ "$@";; esac
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One tiny source, an empty cache, a Hopper GPU, nothing loaded, and every sentence still to be said; no
    Triton."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "answer.cu").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "sysconfig", SimpleNamespace(get_paths=lambda: {"purelib": str(tmp_path)}))
    monkeypatch.setattr(library._State, "loaded", {})
    monkeypatch.setattr(triton._State, "wanted", OFF)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    for remembered in (warn_once, version_of):
        remembered.cache_clear()
    yield
    warn_once.cache_clear()
    library.want(library.ABLE)


def nvcc(folder: Path, script: str = COMPILE) -> Path:
    """A script named nvcc in a new folder ``bin``. It writes a line into ``calls`` at each compilation."""
    file = folder / "bin" / "nvcc"
    file.parent.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which((find_compiler() or ("false",))[0])
    body = script.replace("{compiler}", str(compiler))
    calls = folder / "calls"
    file.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo fake 1.0; exit 0;; esac\necho >> {calls}\n{body}'
    )
    file.chmod(0o755)
    return file


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an nvcc that works, on the PATH."""
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path).parent}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="compress")
    return caplog


@needs_compiler
def test_it_is_compiled_once_for_each_architecture(on_path: Path, spoken) -> None:
    assert library.load(HOPPER).answer() == 42
    library._State.loaded.clear()
    assert library.load(HOPPER).answer() == 42
    assert spoken.messages == ["Compiling the CUDA kernels (compute capability 9.0), once."]
    assert len((on_path / "calls").read_text()) == 2  # one source, and the link
    library.load((8, 6))
    kept = on_path / "cache" / "kernels"
    assert len(list(kept.glob(f"compute*/{LIBRARY}"))) == 2
    assert kept.stat().st_mode & 0o777 == 0o700


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.find_nvcc() is None
    package = nvcc(tmp_path / "nvidia" / "cu13")
    assert build.find_nvcc() == str(package)
    home = nvcc(tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(home)


def test_without_nvcc_one_sentence_and_plain_torch(monkeypatch, spoken) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for _ in range(2):
        assert library.library(torch.device("cuda")) is None
    (sentence,) = spoken.messages
    assert "there is no nvcc" in sentence
    assert sentence.endswith(SAID)


def test_without_nvcc_and_triton_what_follows_is_said_once(monkeypatch, spoken) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(triton._State, "wanted", ABLE)
    monkeypatch.setattr(triton._State, "tried", {torch.device("cuda"): NotBuilt("it is not installed")})
    assert library.library(torch.device("cuda")) is None
    assert sum(SAID in sentence for sentence in spoken.messages) == 1
    assert all("cannot be used here" in sentence for sentence in spoken.messages)
    assert len(spoken.messages) == 2


@needs_compiler
def test_compiled_ahead_it_runs_without_nvcc(on_path: Path, monkeypatch) -> None:
    library.load(HOPPER)
    library._State.loaded.clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert library.load(HOPPER).answer() == 42


def test_an_older_gpu(on_path: Path, monkeypatch, spoken) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert library.library(torch.device("cuda")) is None
    assert spoken.messages == [
        "The CUDA kernels cannot be used here: they need a GPU of compute capability 8.0, not 7.5. " + SAID
    ]
    assert not (on_path / "calls").exists()


def test_an_nvcc_that_fails(tmp_path: Path, monkeypatch, spoken) -> None:
    script = "echo 'nvcc fatal: error: no such luck' >&2; exit 1"
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path, script).parent}:{os.environ['PATH']}")
    assert library.library(torch.device("cuda")) is None
    assert "no such luck" in spoken.messages[-1]
    assert not list((tmp_path / "cache" / "kernels").glob("compute*"))


@needs_compiler
def test_a_cache_that_cannot_be_written(on_path: Path, monkeypatch, spoken) -> None:
    (on_path / "cache").write_text("a file in the place of the folder")
    assert library.load(HOPPER).answer() == 42
    assert spoken.messages[0].endswith("Until then, every process compiles the CUDA kernels anew.")


@needs_compiler
def test_a_full_disk(tmp_path: Path, monkeypatch, spoken) -> None:
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path).parent}:{os.environ['PATH']}")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert library.load(HOPPER).answer() == 42  # from a temporary folder
    assert "No space left on device" in spoken.text
    assert not list((tmp_path / "cache" / "kernels").glob("compute*"))


@needs_compiler
def test_two_processes_compile_it_once(on_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from compress.kernels.cuda import build\n"
        "build.SOURCE = Path(sys.argv[1])\n"
        "with build.built((9, 0)) as file: print(file)"
    )
    command = [sys.executable, "-c", program, str(on_path / "source")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert first == second != ""
    assert len((on_path / "calls").read_text()) == 2


def test_by_name_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BadInput, match="There is no CUDA device here"):
        cpu_library.use("cuda")
    with pytest.raises(BadInput, match="There is no kernel 'abacus'"):
        cpu_library.use("abacus")
    assert ops.backend_of("cuda") == "reference"


def test_by_name_it_runs_or_is_an_error(monkeypatch, spoken) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompressError, match="there is no nvcc"):
        cpu_library.use("cuda")
    monkeypatch.setattr(library, "load", lambda capability: ctypes.CDLL(None))
    cpu_library.use("cuda")
    assert ops.backend_of("cuda") == "cuda"
    with cpu_library.using("reference"):
        assert ops.backend_of("cuda") == "reference"
    assert library.wanted() == library.NAMED


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU count as those of a GPU, and there is a library."""
    monkeypatch.setattr(library, "load", lambda capability: library._State.loaded.get(capability, object()))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7))


WIDTH, OUT, BITS = 64, 24, 4


def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = pack(torch.randint(2**BITS, (OUT, WIDTH), dtype=torch.uint8), BITS)
    return packed, torch.rand(OUT, 2) / 8, torch.randint(2**BITS, (OUT, 2), dtype=torch.uint8)


@pytest.mark.usefixtures("no_device")
def test_what_the_kernel_takes_goes_there_and_the_rest_to_the_reference(monkeypatch) -> None:
    asked: list[torch.dtype] = []

    def multiply(native: object, input: torch.Tensor, *rest: object) -> tuple[torch.Tensor, int]:
        assert rest[-1] == 7
        asked.append(input.dtype)
        return input.new_full((1,), 5), 0

    monkeypatch.setattr(linear, "multiply", multiply)
    packed, scales, zeros = weight()
    for dtype in (torch.float16, torch.bfloat16):
        input = torch.randn(3, WIDTH, dtype=dtype)
        given = (input, packed, scales, zeros, None, None, BITS, 32, OUT, "floating")
        assert ops._packed_linear_cuda(*given) == 5
    given = (torch.randn(3, WIDTH), *given[1:])
    assert torch.equal(ops._packed_linear_cuda(*given), reference.packed_linear(*given))
    with pytest.raises(ValueError, match="'packed' has the shape"):
        ops._packed_linear_cuda(input, packed[1:], *given[2:])
    assert asked == [torch.float16, torch.bfloat16]
    library.want(library.OFF)
    given = (input, *given[1:])
    assert torch.equal(ops._packed_linear_cuda(*given), reference.packed_linear(*given))


def test_a_driver_that_does_not_start_them(monkeypatch, spoken) -> None:
    monkeypatch.setitem(library._State.loaded, HOPPER, ctypes.CDLL(None))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(linear, "multiply", lambda *_: (torch.zeros(1), 35))
    packed, scales, zeros = weight()
    input = torch.randn(3, WIDTH, dtype=torch.float16)
    given = (input, packed, scales, zeros, None, None, BITS, 32, OUT, "floating")
    for _ in range(2):
        assert torch.equal(ops._packed_linear_cuda(*given), reference.packed_linear(*given))
    assert spoken.messages == [
        f"The CUDA kernels cannot be used here: the driver does not start them (CUDA error 35). {SAID}"
    ]


@pytest.mark.usefixtures("no_device")
def test_tensors_of_two_devices_are_left_to_torch() -> None:
    tensors = (torch.zeros(1), torch.zeros(1, device="meta"))
    assert library.start(tensors, lambda *_: (1, 0)) is None
    assert library.start((tensors[0], None), lambda *_: (1, 0)) == 1


def test_every_operator_has_one() -> None:
    for name in ("packed_linear", "packed_embedding", "kv_quantize", "kv_attention"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compress::{name}", "CUDA")
    assert {embedding_ops, cache_ops}
