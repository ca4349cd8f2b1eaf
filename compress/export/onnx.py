"""The graph of a dense model as ONNX, which onnxruntime and others run."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import BadInput, CompressError
from compress.export.base import Progress, Promise, Target, TargetOptions
from compress.export.huggingface import HuggingFace, HuggingFaceOptions
from compress.export.model import ExportedModel
from compress.export.verify import both_logits, check_same, compared
from compress.pipeline.artefact import write_model
from compress.pipeline.reload import SAME_ARITHMETIC, probe_of
from compress.storage.companions import copy_companions
from compress.storage.lineage import Verification
from compress.system.files import file_sha256
from compress.system.memory import available_memory

NEEDED = ("onnx", "onnxscript")
GRAPH = "model.onnx"
FLOAT32 = HuggingFaceOptions(dtype="float32")


class ONNX(Target[TargetOptions]):
    """The forward pass without a cache: ``input_ids`` and ``attention_mask`` [N, S] to float32 ``logits``.

    It is traced by torch's own exporter. Optimum's exporter for ONNX asks for transformers below 4.58, so it
    cannot be installed beside the version that this package needs.
    """

    name = "onnx"
    summary = "the forward pass of the dense model in float32, without a cache"
    runtime = "onnxruntime"

    def check(self, model: ExportedModel, options: TargetOptions) -> Promise:
        if missing := [package for package in NEEDED if find_spec(package) is None]:
            raise BadInput(f"An export to ONNX needs {missing[0]}: pip install 'compress-model[onnx]'.")
        if model.shape.anatomy.kind != "decoder" or model.shape.anatomy.head is None:
            raise BadInput(
                f"Only causal language models are exported to ONNX, and '{model.source.id}' is none; export "
                "it as huggingface, and convert that with optimum in an environment of its own."
            )
        if model.shape.is_pruned:
            raise BadInput(
                "The layers of this model differ in shape and its code is not in transformers, which the "
                "exporter traces; export it as huggingface, or prune with --shape uniform."
            )
        plain, notes = HuggingFace().converted(model, FLOAT32)
        needed, free = 3 * plain.nbytes, available_memory()
        if needed > free:
            raise BadInput(
                f"Tracing this model takes about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB "
                "are free; export it as gguf, which is written layer by layer."
            )
        found = ["The model is traced without a key-value cache, so every token runs the whole prompt again."]
        if model.packed or model.stacked:
            found.append("Codes are unpacked to float32, because ONNX has no such formats.")
        return Promise(plain.nbytes, "onnxruntime", (*found, *notes))

    def write(
        self,
        model: ExportedModel,
        path: Path,
        options: TargetOptions,
        recipe: dict[str, Any],
        progress: Progress,
    ) -> dict[str, str]:
        path.mkdir(parents=True)
        copy_companions(model.source.folder, path)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            progress("unpacking the model", 0.0)
            plain, _ = HuggingFace().converted(model, FLOAT32)
            write_model(plain, model.source.folder, Path(work) / "plain", recipe)
            progress("tracing the model", 0.0)
            _trace(Path(work) / "plain", path / GRAPH)
            (path / "config.json").write_bytes((Path(work) / "plain" / "config.json").read_bytes())
        return {file.name: file_sha256(file) for file in sorted(path.glob(f"{GRAPH}*"))}

    def verify(self, model: ExportedModel, path: Path, options: TargetOptions, device: str) -> Verification:
        if find_spec("onnxruntime") is None:
            return Verification(runtime="onnxruntime", not_tried="it is not installed")
        probe, runtime = probe_of(model.checkpoint), f"onnxruntime {_version('onnxruntime')}"
        plain, _ = HuggingFace().converted(model, FLOAT32)
        before, traced = both_logits(model, plain, probe, device)
        loaded = onnx_logits(path / GRAPH, probe.tokens)
        check_same(traced, loaded, runtime, SAME_ARITHMETIC)
        return compared(before, loaded, runtime, probe.tokens.numel())


class _Forward(nn.Module):
    """The part of a model that is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found.logits


def _trace(folder: Path, graph: Path) -> None:
    """Trace the model in a folder for any number of rows and tokens.

    Raises:
        CompressError: torch cannot trace or translate it.
    """
    from transformers import AutoModelForCausalLM

    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    names = ("input_ids", "attention_mask")
    given = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}  # one tensor would be one input
    try:
        with torch.no_grad(), _quietly():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            torch.onnx.export(
                _Forward(model),
                tuple(given.values()),
                graph,
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes={name: {0: rows, 1: tokens} for name in names},
                dynamo=True,
                external_data=True,
            )
    except Exception as error:  # whatever the exporter raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CompressError(
            f"torch {torch.__version__} cannot trace this model for ONNX ({reason})."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints and logs, such as operators of packages that are not installed."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def onnx_logits(graph: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits that onnxruntime computes.

    Args:
        graph: the file of the model.
        tokens: ids [N, S].

    Returns:
        float32 [N, S, V].

    Raises:
        CompressError: it cannot load the graph, or fails when it runs it.
    """
    import onnxruntime

    given = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    try:
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, given)[0])
    except Exception as error:  # whatever native code raises
        raise CompressError(
            f"The exported graph does not run with onnxruntime ({' '.join(str(error).split())[:200]})."
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
