"""Load a model folder with the programs that it promises, as its users will, and compute logits.

What this process uses anyway (transformers, compressed-tensors, the modelling code that this package writes)
runs here. Other libraries run in a process of their own, ``python -m compress.pipeline.promise FOLDER FILE``:
gptqmodel changes classes of transformers and the environment when it is imported, bitsandbytes prints, and
both run native code that a processor may not know. None of that may reach a finished run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

import compress
from compress.anatomy import model_class
from compress.engine.at_inference import paused
from compress.engine.loading import load
from compress.engine.logits import first_output
from compress.engine.shape import ModelShape
from compress.errors import CompressError
from compress.kernels.cpu.library import REFERENCE
from compress.storage import adapter
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.loaders import MLX, NOT_AVX512, ON_A_GPU, LoadsWith
from compress.system.memory import available_memory

log = logging.getLogger(__name__)

IN_THIS_PROCESS = {"transformers", "compressed-tensors"}
SHARE_OF_MEMORY = 1 / 4
"""A model is loaded whole for the check only if it takes no more than this share of the free memory."""


def in_words(who: LoadsWith) -> str:
    """The promised programs with the installed versions, such as "transformers 5.24 with peft 0.21"."""
    if who.compress_model_only:
        return f"compress-model {compress.__version__}"
    first, *others = [f"{name} {_version(name) or ''}".strip() for name in who.programs]
    return f"{first} with {' and '.join(others)}" if others else first


def obstacle(shape: ModelShape, device: str = "cpu", who: LoadsWith | None = None) -> str | None:
    """Why some programs cannot be tried here, as the end of a sentence; None if they can.

    Args:
        shape: of the model.
        device: where the run computes.
        who: the programs; None for those that the model is promised to load with.
    """
    who = who or shape.loads_with
    for name in () if who.compress_model_only else who.programs:
        found, wanted = _version(name), _wanted(name)
        if found is None:
            return f"{name} is not installed"
        if wanted and not wanted.specifier.contains(found, prereleases=True):
            return f"{name} {found} is installed, and {wanted.specifier} is asked for"
    if who.where == ON_A_GPU and not device.startswith("cuda"):
        return "it runs on a GPU"
    if who.where == NOT_AVX512 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "this CPU has AVX-512"
    needed, free = 4 * shape.parameters + shape.nbytes, available_memory()
    if needed > SHARE_OF_MEMORY * free:
        return f"it takes {needed / 1e9:,.1f} GB, which is over a quarter of the free {free / 1e9:,.1f} GB"
    return None


def promised_logits(folder: Path, tokens: torch.Tensor, who: LoadsWith | None = None) -> torch.Tensor:
    """The logits that the promised programs compute with a model folder.

    Args:
        folder: the model.
        tokens: ids [N, S].
        who: the programs; None for those that config.json promises.

    Returns:
        float32 [N, S, V] on the CPU, or the `first_output` of a model without a vocabulary head.

    Raises:
        CompressError: the programs cannot load the folder, or fail when they run it.
    """
    who = who or ModelShape.of(Checkpoint.open(folder)).loads_with
    if who.compress_model_only or set(who.programs) <= IN_THIS_PROCESS:
        try:
            with contextlib.redirect_stderr(_for_progress_bars()):
                return _logits(folder, tokens)
        except Exception as error:  # whatever foreign code raises
            raise CompressError(_failure(who, f"{type(error).__name__}: {error}")) from error
    return _logits_elsewhere(folder, tokens, who)


def _logits_elsewhere(folder: Path, tokens: torch.Tensor, who: LoadsWith) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "exchange.safetensors"
        save_file({"tokens": tokens}, file)
        command = [sys.executable, "-m", __spec__.name, str(folder), str(file)]
        command += ["mlx-lm"] if who.packages == MLX.packages else []
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise CompressError(_failure(who, said[-1] if said else f"exit code {done.returncode}"))
        return load_file(file)["logits"]


def _for_progress_bars() -> TextIO:
    """Where the progress bars of transformers go: nowhere, unless the user wants to hear everything."""
    return sys.stderr if log.isEnabledFor(logging.DEBUG) else io.StringIO()


def _failure(who: LoadsWith, reason: str) -> str:
    return f"The written model does not load with {in_words(who)} ({' '.join(reason.split())})"


@torch.no_grad()
def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """In float32, so that a difference comes from what was written, as far as the programs compute in it.

    Without unlearning at inference, whose decisions differ where a sum is rounded differently.
    """
    shape = ModelShape.of(Checkpoint.open(folder))
    who = shape.loads_with
    if who.compress_model_only:
        model: Any = load(folder, dtype=torch.float32, kernel=REFERENCE)
    elif who.transformers:
        model = _class(shape, folder).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=who.trust_remote_code
        )
    else:
        from gptqmodel import GPTQModel

        model = GPTQModel.load(str(folder), device="cpu").model
    if who.adapter and not who.compress_model_only:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / adapter.KEY)
    with paused(model):
        return first_output(model.eval()(tokens.to(model.device))).float().cpu()


def _logits_with_mlx(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """In float32 on the CPU. Scales and offsets are widened, which changes no weight."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    loaded: Any = load_model(folder)
    model = loaded[0]
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(tokens.numpy())).astype(mx.float32)))


def _class(shape: ModelShape, folder: Path) -> Any:
    """The class to load with: that of config.json, or the Auto class for modelling code in the folder.

    That code is this package's own, just written, and the one that users will run.
    """
    names = [name for name in shape.config.get("auto_map", {}) if name != "AutoConfig"]
    if shape.is_pruned and names:
        return getattr(transformers, names[0])
    return model_class(shape.pretrained_config)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wanted(package: str) -> Requirement | None:
    """What this package's own metadata asks of another one."""
    found = (Requirement(line) for line in requires("compress-model") or ())
    return next((requirement for requirement in found if requirement.name == package), None)


if __name__ == "__main__":
    _folder, _file = map(Path, sys.argv[1:3])
    _run = _logits_with_mlx if sys.argv[3:] == ["mlx-lm"] else _logits
    _found = _run(_folder, load_file(_file)["tokens"])
    save_file({"logits": _found.contiguous()}, _file)
