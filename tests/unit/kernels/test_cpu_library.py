"""Compiling and loading the native kernels, and everything that can go wrong with it.

Most tests compile one tiny source in place of ours, or pretend to be the compiler, which takes no time.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import BadInput, CompressError
from compress.kernels import native
from compress.kernels.cpu import build, library, processor

ROOT = Path(__file__).resolve().parents[3]
SIMPLEST = "portable"

needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None, reason="needs a C++ compiler (apt install g++)"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one native source, which takes the place of ours; its cache is new."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE", folder)
    return folder


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel is chosen or loaded, the cache is empty, and every sentence is still to be said."""
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library._State, "loaded", {})
    monkeypatch.setattr(library._State, "decided", False)
    monkeypatch.setattr(library._State, "path", None)
    monkeypatch.setattr(library._State, "library", None)
    for remembered in (native.warn_once, native.version_of, processor.paths):
        remembered.cache_clear()
    yield
    processor.paths.cache_clear()


@pytest.fixture
def spoken(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="compress")
    return caplog


def cached_libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob(f"*/{native.LIBRARY}"))


def fake_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script as $CXX; ``real`` in it runs the true compiler."""
    true = build.find_compiler()
    file = folder / "fake-c++"
    real = f'real() {{ {true[0] if true else "false"} "$@"; }}'
    file.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo fake 1.0; exit 0;; esac\n{real}\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    return file


@needs_compiler
def test_it_is_compiled_once_and_stays(source: Path, tmp_path: Path, spoken):
    assert library.load(SIMPLEST).answer() == 42
    assert spoken.messages == ["Compiling the CPU kernels (portable), once."]
    library._State.loaded.clear()
    spoken.clear()
    assert library.load(SIMPLEST).answer() == 42
    assert spoken.messages == []
    assert len(cached_libraries(tmp_path)) == 1
    assert (tmp_path / "cache" / "kernels").stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_another_source_or_compiler_is_another_library(source: Path, tmp_path: Path, monkeypatch):
    library.load(SIMPLEST)
    (source / "answer.cpp").write_text('extern "C" int answer() { return 43; }\n')
    library._State.loaded.clear()
    assert library.load(SIMPLEST).answer() == 43
    library._State.loaded.clear()
    fake_compiler(tmp_path, 'real "$@"', monkeypatch)
    library.load(SIMPLEST)
    assert len(cached_libraries(tmp_path)) == 3


@needs_compiler
def test_our_own_sources_compile_for_every_path_here(monkeypatch, users_cache: Path):
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(users_cache))  # compiled once for all runs
    for path in library.paths():
        library.use(f"cpu:{path}")
        assert library.kernel_name() == f"cpu:{path}"
        assert library.library() is library.load(path)


def test_without_a_compiler_one_sentence_and_plain_torch(source: Path, monkeypatch, spoken):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    for _ in range(2):
        assert library.library() is None
        assert library.kernel_name() == "reference"
    (sentence,) = spoken.messages
    assert "there is no C++ compiler" in sentence
    assert sentence.endswith("Packed layers run in plain torch, which is slower.")
    with pytest.raises(CompressError, match="no C\\+\\+ compiler"):
        library.use("cpu")


@needs_compiler
def test_compiled_ahead_it_runs_without_a_compiler(source: Path, monkeypatch):
    library.load(SIMPLEST)
    library._State.loaded.clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert library.load(SIMPLEST).answer() == 42


def test_a_compiler_that_is_not_there(source: Path, monkeypatch, spoken):
    monkeypatch.setenv("CXX", "/nowhere/c++ -pipe")
    assert library.library() is None
    assert "/nowhere/c++ cannot be run: No such file or directory" in spoken.text


def test_the_first_error_of_the_compiler_is_said_once(source: Path, tmp_path: Path, spoken, monkeypatch):
    fake_compiler(tmp_path, 'echo "a.cpp:1: error: no such luck" >&2; echo more >&2; exit 1', monkeypatch)
    assert library.library() is None
    library.use("auto")  # as the next model that is loaded does
    assert library.kernel_name() == "reference"
    (sentence,) = [text for text in spoken.messages if not text.startswith("Compiling")]
    assert "says: a.cpp:1: error: no such luck. Packed" in sentence
    assert cached_libraries(tmp_path) == []


@needs_compiler
def test_an_old_compiler_gets_the_next_path(source: Path, tmp_path: Path, spoken, monkeypatch):
    monkeypatch.setattr(library, "paths", lambda: ("amx", "portable"))
    script = 'case "$*" in *amx*) echo "error: unrecognized -mamx-tile" >&2; exit 1;; esac; real "$@"'
    fake_compiler(tmp_path, script, monkeypatch)
    assert library.kernel_name() == "cpu:portable"
    (sentence,) = [text for text in spoken.messages if not text.startswith("Compiling")]
    assert "(amx)" in sentence
    assert "unrecognized -mamx-tile" in sentence
    assert sentence.endswith("The path portable is used instead.")
    with pytest.raises(CompressError, match="unrecognized"):
        library.load("amx")


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a compiler for x86-64")
def test_the_tiles_of_amx_are_compiled_where_they_cannot_run(tmp_path: Path):
    compiler, flags = build.find_compiler(), (*build.FLAGS, "-O1", *processor.PATHS["amx"].flags)
    (tmp_path / "empty.cpp").touch()
    assert compiler
    known, done = (
        subprocess.run(
            [*compiler, *flags, "-c", source, "-o", tmp_path / "a.o"], capture_output=True, text=True
        )
        for source in (tmp_path / "empty.cpp", build.SOURCE / "gemm.cpp")
    )
    if known.returncode:
        pytest.skip("this compiler does not know AMX")
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("cache", ["/proc/nowhere", "{tmp}/file"])
def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, spoken, monkeypatch, cache):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", cache.format(tmp=tmp_path))
    assert library.load(SIMPLEST).answer() == 42
    (sentence,) = spoken.messages
    assert "cannot be written" in sentence
    assert "every process compiles the CPU kernels anew" in sentence


@needs_compiler
def test_a_full_cache(source: Path, tmp_path: Path, spoken, monkeypatch):
    def full(*paths: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(native.shutil, "copyfile", full)
    assert library.load(SIMPLEST).answer() == 42
    assert "No space left on device" in spoken.text
    assert cached_libraries(tmp_path) == []


@needs_compiler
def test_nothing_is_loaded_from_where_others_can_write(source: Path, tmp_path: Path, spoken):
    library.load(SIMPLEST)
    (file,) = cached_libraries(tmp_path)
    file.unlink()
    file.write_bytes(b"planted")
    file.parents[1].chmod(0o777)
    library._State.loaded.clear()
    assert library.load(SIMPLEST).answer() == 42
    assert "Other users can write to the folder" in spoken.text


@needs_compiler
def test_a_file_that_cannot_be_loaded(source: Path, spoken, tmp_path: Path, monkeypatch):
    fake_compiler(tmp_path, 'for last; do :; done; echo text > "$last"', monkeypatch)
    assert library.library() is None
    assert "file too short" in spoken.text or "invalid ELF header" in spoken.text


def start(source: Path, after: str = "") -> subprocess.Popen[str]:
    """A process that loads the library, does something, and prints the answer."""
    program = f"""
from pathlib import Path
from compress.kernels.cpu import build, library
build.SOURCE = Path({str(source)!r})
loaded = library.load("portable")
{after}
print(loaded.answer())
"""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True)


@needs_compiler
def test_a_killed_compilation_leaves_nothing(source: Path, tmp_path: Path, monkeypatch):
    begun = tmp_path / "begun"
    fake_compiler(tmp_path, f'touch {begun}; [ -e {tmp_path}/go ] || sleep 600; real "$@"', monkeypatch)
    process = start(source)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert cached_libraries(tmp_path) == []
    (tmp_path / "go").touch()
    assert library.load(SIMPLEST).answer() == 42
    assert len(cached_libraries(tmp_path)) == 1
    assert not list((tmp_path / "cache" / "kernels").glob(".*-*/fresh"))


@needs_compiler
def test_a_compiler_killed_for_memory_is_named(source: Path, tmp_path: Path, spoken, monkeypatch):
    fake_compiler(tmp_path, "kill -9 $$", monkeypatch)
    assert library.library() is None
    assert "was killed by signal 9" in spoken.text


@needs_compiler
def test_two_processes_compile_once(source: Path, tmp_path: Path, monkeypatch):
    script = f'case "$*" in *-shared*) echo once >> {tmp_path}/linked; sleep 0.5;; esac; real "$@"'
    fake_compiler(tmp_path, script, monkeypatch)
    both = [start(source), start(source)]
    assert [process.communicate()[0].strip() for process in both] == ["42", "42"]
    assert (tmp_path / "linked").read_text() == "once\n"


def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", file)
    monkeypatch.setattr(processor.sys, "platform", "linux")


AVX2 = "fpu sse2 fma f16c avx2"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"flags\t\t: {AVX512} amx_tile amx_bf16", ("amx", "avx512", "avx2", "portable")),
        (f"flags\t\t: {AVX512}", ("avx512", "avx2", "portable")),
        (f"flags\t\t: {AVX512.replace('avx512_bf16', '')}", ("avx2", "portable")),
        ("flags\t\t: fpu sse2", ("portable",)),
        ("Features\t: fp asimd asimddp", ("neon", "portable")),
        ("Features\t: fp asimd", ("portable",)),
        ("isa\t: rv64gc", ("portable",)),
        ("", ("portable",)),
    ],
)
def test_paths_follow_the_processor(tmp_path: Path, monkeypatch, flags: str, expected: tuple[str, ...]):
    cpuinfo(tmp_path, monkeypatch, f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(processor, "_may_use_tiles", lambda: True)
    assert processor.paths() == expected


def test_tiles_need_the_permission_of_the_system(tmp_path: Path, monkeypatch):
    cpuinfo(tmp_path, monkeypatch, f"flags\t: {AVX512} amx_tile amx_bf16\n")
    monkeypatch.setattr(processor, "_may_use_tiles", lambda: False)
    assert processor.paths()[0] == "avx512"


def test_an_unknown_system_is_portable(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "nothing")
    monkeypatch.setattr(processor.sys, "platform", "haiku")
    assert processor.paths() == ("portable",)


def test_what_cannot_run_is_bad_input_that_names_what_can(monkeypatch):
    monkeypatch.setattr(library, "paths", lambda: ("avx2", "portable"))
    for name in ("gpu", "cpu:sse", "cpu:", "avx2", "reference:avx2"):
        with pytest.raises(BadInput, match="There is no kernel"):
            library.use(name)
    with pytest.raises(BadInput, match=r"cannot run the kernel 'cpu:neon'.*cpu:avx2, cpu:portable"):
        library.use("cpu:neon")


@needs_compiler
def test_the_choice_holds_for_the_process(source: Path):
    library.use("reference")
    assert (library.library(), library.kernel_name()) == (None, "reference")
    library.use(f"cpu:{SIMPLEST}")
    assert library.library().answer() == 42
    assert library.kernel_name() == "cpu:portable"
    library.use("cpu")
    assert library.kernel_name() == f"cpu:{library.paths()[0]}"
    library.use("auto")
    assert library.kernel_name() == f"cpu:{library.paths()[0]}"


@needs_compiler
def test_it_shares_the_threads_of_torch(source: Path):
    """Even if it is loaded before anything else has imported torch."""
    text = '#include <omp.h>\nextern "C" int answer() { return omp_get_max_threads(); }\n'
    (source / "answer.cpp").write_text(text)
    process = start(source, "import torch; torch.set_num_threads(3)")
    assert process.communicate()[0].strip() == "3"


def test_the_sources_are_in_the_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["package-data"]["compress.kernels.cpu"] == ["source/*"]
    assert all(file.is_file() for file in (ROOT / "kernels" / "cpu" / "source").iterdir())
