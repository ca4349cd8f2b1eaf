"""Importance matrices of llama.cpp: what the error of each input of a linear counts when it is rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from compress.anatomy import linears_by_input
from compress.calibration.text.prepare import prepare_calibration
from compress.calibration.text.settings import Calibration
from compress.calibration.text.windows import Windows
from compress.engine.journal import Journal
from compress.engine.stream import Seen, StreamedModel
from compress.export.base import Progress, Promise, Target, TargetOptions, journal_beside
from compress.export.gguf_layout import Layout, plan_layout
from compress.export.model import ExportedModel
from compress.storage.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from compress.storage.lineage import Verification
from compress.system.files import file_sha256


class ImatrixOptions(TargetOptions):
    """The text that inputs are measured on."""

    calibration: str = Field("bundled", description="text that inputs are measured on, as in recipes")
    nsamples: int = Field(64, gt=0, description="windows of that text")
    seqlen: int = Field(512, gt=0, description="tokens of a window")
    seed: int = Field(0, description="seed for drawing the text")


class Imatrix(Target[ImatrixOptions]):
    """The mean square of every input of every linear inside the layers, in the model as it is.

    As llama.cpp's own program measures it, without the head.
    """

    name = "imatrix"
    summary = "importances of the inputs of linears, for llama.cpp's quantizer and for --format gguf"
    runtime = "llama.cpp's quantizer"
    suffix = ".gguf"
    holds = "importances"
    Options = ImatrixOptions

    def check(self, model: ExportedModel, options: ImatrixOptions) -> Promise:
        layout = plan_layout(model, "F32", False)
        widths = [layout.shapes[theirs][-1] for theirs in _names(model, layout).values()]
        return Promise(4 * sum(width + 1 for width in widths), self.runtime)

    def write(
        self,
        model: ExportedModel,
        path: Path,
        options: ImatrixOptions,
        recipe: dict[str, Any],
        progress: Progress,
    ) -> dict[str, str]:
        layout = plan_layout(model, "F32", False)
        text = Calibration(source=options.calibration, nsamples=options.nsamples, seqlen=options.seqlen)
        windows = prepare_calibration(text, options.seed, model.checkpoint, "cpu", progress)
        self.calibration = windows.describe()
        names = _names(model, layout)
        journal = journal_beside(path, model, measured="mean squares", calibration=windows.sha256)
        found = _mean_squares(layout, windows, journal, progress)
        values = {names[name]: mean for name, mean in found.items()}
        count, length = windows.tokens.shape
        write_imatrix(ImportanceMatrix(values, count, length, options.calibration), path)
        return {path.name: file_sha256(path)}

    def verify(self, model: ExportedModel, path: Path, options: ImatrixOptions, device: str) -> Verification:
        read_imatrix(path)  # refuses what is not finite
        return Verification(runtime=self.runtime, not_tried="no package of Python brings it")


def _names(model: ExportedModel, layout: Layout) -> dict[str, str]:
    """Name in the checkpoint -> name in a GGUF file, of the weights of the linears inside the layers."""
    return {f"{name}.weight": layout.names[f"{name}.weight"] for name in model.linears}


def _mean_squares(
    layout: Layout, windows: Windows, journal: Journal, progress: Progress
) -> dict[str, torch.Tensor]:
    """Name of a weight in the checkpoint -> mean square of its inputs, float32 [in]."""
    streamed = StreamedModel(layout.dense, "cpu", progress)
    stream = streamed.stream(windows, journal.folder / "stream")
    for layer in streamed.walk(journal, stream, label="measuring inputs"):
        sums: dict[str, torch.Tensor] = {}

        def add(seen: Seen, path: str, sums: dict[str, torch.Tensor] = sums) -> None:
            total = seen.real(seen.inputs).square().sum(0, dtype=torch.float64)
            sums[path] = sums[path] + total if path in sums else total

        groups = linears_by_input(streamed.anatomy, layer.linears)
        observers = {paths[0]: lambda seen, path=paths[0]: add(seen, path) for paths in groups}
        stream.advance(layer, observe=observers)
        for paths in groups:
            mean = (sums[paths[0]] / windows.num_tokens).float()
            journal.state |= {name: mean for path in paths if (name := layer.stored(path))}
    return journal.state
