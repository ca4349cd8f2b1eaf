"""What is compiled for GPUs: the CUDA sources, for a compute capability.

Without nvcc this fails; `compress.kernels.cuda.library` says so and goes on in plain torch.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

from compress.kernels.native import NativeLibrary, NotBuilt

SOURCE = Path(__file__).parent / "source"
"""The folder of the CUDA sources."""

OLDEST = (8, 0)
"""The oldest compute capability that has the instructions of the kernels."""

FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")


def built(capability: tuple[int, int]) -> AbstractContextManager[Path]:
    """The library file for a GPU for the length of a ``with`` block (see `NativeLibrary.built`).

    Args:
        capability: the compute capability of the GPU, as in (9, 0).

    Raises:
        NotBuilt: the GPU is too old; or on entering the block: there is no nvcc, or it fails.
    """
    if capability < OLDEST:
        raise NotBuilt(f"they need a GPU of compute capability {_dotted(OLDEST)}, not {_dotted(capability)}")
    nvcc = find_nvcc()
    # Packages have their libraries in lib, where nvcc does not look.
    home = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return NativeLibrary(
        what="CUDA kernels",
        variant=f"compute capability {_dotted(capability)}",
        folder=SOURCE,
        pattern="*.cu",
        compiler=(nvcc,) if nvcc else (),
        flags=(*FLAGS, "-arch=sm_{}{}".format(*capability)),
        link=tuple(f"-L{folder / name}" for folder in home for name in ("lib", "lib64")),
        missing="there is no nvcc (on the PATH, in $CUDA_HOME, or from 'pip install compress-model[cuda]')",
    ).built()


def find_nvcc() -> str | None:
    """The compiler of CUDA: on the PATH, in ``$CUDA_HOME``, or in the package nvidia-cuda-nvcc; or None."""
    if found := shutil.which("nvcc"):
        return found
    folders = [Path(home, "bin")] if (home := os.environ.get("CUDA_HOME")) else []
    folders += sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"), reverse=True)
    return next((found for folder in folders if (found := shutil.which("nvcc", path=str(folder)))), None)


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
