"""The native kernels without Python: on an emulated Arm processor, and watched by sanitizers.

Both take minutes to compile, so they run only if asked for with COMPRESS_TEST_NATIVE=1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress.kernels.cpu import build
from compress.kernels.cpu.library import paths
from compress.kernels.cpu.processor import PATHS

DRIVER = Path(__file__).with_name("driver.cpp")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMPRESS_TEST_NATIVE"), reason="takes minutes; runs with COMPRESS_TEST_NATIVE=1"
)


def compiled(folder: Path, compiler: str, *flags: str) -> Path:
    """The driver, linked with all sources."""

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        run(compiler, *build.FLAGS, *flags, "-w", "-O1", f"-I{build.SOURCE}", "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [DRIVER, *sorted(build.SOURCE.glob("*.cpp"))]))
    run(compiler, *build.FLAGS, *flags, *objects, "-o", folder / "driver")
    return folder / "driver"


def run(*command: object, **environment: str) -> str:
    ended = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=os.environ | environment
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


def test_neon_in_an_emulator(tmp_path: Path):
    if not (shutil.which(CROSS) and shutil.which(EMULATOR)):
        pytest.skip("needs 'apt-get install g++-aarch64-linux-gnu qemu-user'")
    driver = compiled(tmp_path, CROSS, *PATHS["neon"].flags, "-static")
    assert run(EMULATOR, driver) == "720 right, 0 wrong\n"


@pytest.mark.parametrize("path", [*paths(), "tiles"])
def test_memory_is_left_alone(path: str, tmp_path: Path):
    """Nothing outside the tensors is read or written, and no arithmetic is undefined."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = PATHS["avx512"].flags if path == "tiles" else PATHS[path].flags
    emulated = ("-DCOMPRESS_EMULATE_TILES",) if path == "tiles" else ()
    if path == "tiles" and "avx512" not in paths():
        pytest.skip("needs a processor with AVX-512 BF16")
    driver = compiled(tmp_path, *compiler, *flags, *emulated, *SANITIZERS)
    assert run(driver, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2") == "720 right, 0 wrong\n"
