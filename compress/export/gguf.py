"""GGUF, the format of llama.cpp and of the programs built on it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from compress.engine.logits import streamed_logits
from compress.errors import BadInput, CompressError
from compress.export.base import Progress, Promise, Target, TargetOptions
from compress.export.gguf_codes import as_fields, exact
from compress.export.gguf_layout import HEAD, TABLE, Layout, plan_layout
from compress.export.gguf_runtime import installed, runtime
from compress.export.model import ExportedModel
from compress.export.verify import check_same, compared
from compress.kernels.codes.gguf import TYPES
from compress.pipeline.reload import EIGHT_BIT_INPUTS, HALF_PRECISION, probe_of
from compress.sources.gguf import LOADS_WITH
from compress.storage.gguf.architectures import architecture_of
from compress.storage.gguf.checkpoint import GGUFCheckpoint
from compress.storage.gguf.imatrix import read_imatrix
from compress.storage.gguf.reader import GGUFFile
from compress.storage.gguf.writer import Planned, file_bytes, write_gguf
from compress.storage.lineage import Verification

LONGEST_RUN = 900.0
"""Seconds after which llama.cpp is given up."""

LEAST = -87.0
"""The smallest log-probability that is compared, nats: servers know no float32 that is closer to 0."""


class GGUFOptions(TargetOptions):
    """Types of the weights, and what counts when they are rounded."""

    types: str | None = Field(
        None,
        description="a mixture of llama.cpp such as Q4_K_M, or a JSON file with the type of each tensor; "
        "without it codes are carried over where a type has their grid, and other weights keep their dtype, "
        "those of a float32 model as float16",
    )
    importance: str = Field(
        "none",
        description="what the error of each input channel counts: none, measured (on --calibration), or a "
        "file with an importance matrix of llama.cpp",
    )
    feedback: bool = Field(
        True, description="with measured importance, let later columns compensate the error (GPTQ)"
    )
    scaling: bool = Field(
        True, description="with measured importance, scale input channels before rounding (AWQ)"
    )
    calibration: str = Field("bundled", description="text that importances are measured on, as in recipes")
    nsamples: int = Field(64, gt=0, description="windows of that text")
    seqlen: int = Field(512, gt=0, description="tokens of a window")
    seed: int = Field(0, description="seed for drawing the text")


class GGUF(Target[GGUFOptions]):
    """One file with weights, tokenizer and chat template.

    Weights that a type of few bits is asked for are rounded by this package: scales are chosen so that the
    error, weighted by importance, is least. With measured importance AWQ's scaling is folded in before, and
    the columns that are not rounded yet compensate the error of those that are (GPTQ inside the grid of the
    blocks).
    """

    name = "gguf"
    summary = "one file for llama.cpp, with weights in its block types"
    runtime = "llama.cpp"
    suffix = ".gguf"
    Options = GGUFOptions

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._scales: set[str] = set()
        self._weights: set[str] = set()

    def check(self, model: ExportedModel, options: GGUFOptions) -> Promise:
        layout = plan_layout(model, options.types, options.importance != "none")
        nbytes = file_bytes(layout.metadata, self._planned(model, layout, {}))
        return Promise(nbytes, LOADS_WITH, tuple(layout.notes))

    def write(
        self,
        model: ExportedModel,
        path: Path,
        options: GGUFOptions,
        recipe: dict[str, Any],
        progress: Progress,
    ) -> dict[str, str]:
        layout = plan_layout(model, options.types, options.importance != "none")
        found: dict[str, Callable[[], torch.Tensor]] = {}
        importance: dict[str, torch.Tensor] = {}
        if layout.rounded and options.importance == "measured":
            from compress.export.gguf_rounding import measured

            found, self.calibration = measured(model, layout, options, path, progress)
        elif layout.rounded and options.importance != "none":
            importance = self._importances(layout, Path(options.importance).expanduser())
        planned = self._planned(model, layout, found, importance)
        digest = write_gguf(
            path,
            architecture_of(layout.config).name,
            layout.metadata,
            planned,
            lambda share: progress("writing the file", share),
        )
        if self._scales:
            self._notes.append(
                f"The scales of {len(self._scales)} of the {len(layout.carried)} weights in few bits, such "
                f"as '{min(self._scales)}', are rounded to float16; their codes stay."
            )
        if self._weights:
            self._notes.append(
                f"{len(self._weights)} of the {len(layout.plain)} tensors, such as '{min(self._weights)}', "
                "are rounded to 16 bits; with --types F32 they stay whole."
            )
        return {path.name: digest}

    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def _importances(self, layout: Layout, file: Path) -> dict[str, torch.Tensor]:
        """Importances by the names of the checkpoint.

        Raises:
            BadInput: the file is not an importance matrix, or one of another model.
        """
        there = read_imatrix(file).values
        found = {}
        for name in layout.rounded:
            theirs = layout.names[name]
            if (values := there.get(theirs)) is None:
                continue
            width = layout.shapes[theirs][-1]
            if len(values) != width:
                raise BadInput(
                    f"The importance matrix '{file}' has {len(values):,} values for '{theirs}', whose rows "
                    f"have {width:,} weights; it was made for another model."
                )
            found[name] = values
        if not found:
            raise BadInput(f"The importance matrix '{file}' has none of the weights that are rounded.")
        if lacking := [name for name in layout.rounded if name not in found]:
            self._notes.append(
                f"The importance matrix lacks {len(lacking)} of the rounded weights, such as "
                f"'{layout.names[lacking[0]]}'; there all inputs count alike."
            )
        return found

    def _planned(
        self,
        model: ExportedModel,
        layout: Layout,
        found: dict[str, Callable[[], torch.Tensor]],
        importance: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Planned]:
        """All tensors of the file. ``found`` has those that are made already, by names of the checkpoint."""
        importance = importance or {}
        planned = {}
        for name, theirs in layout.names.items():
            kind, shape = layout.kinds[theirs], layout.shapes[theirs]

            def make(name: str = name, kind: Any = kind, shape: tuple[int, ...] = shape) -> torch.Tensor:
                if name in layout.carried:
                    weight: Any = model.codes(layout.carried[name])
                    if not exact(weight):
                        self._scales.add(layout.carried[name])
                    return _ordered(layout, name, kind.pack(as_fields(weight, kind)).view(shape[0], -1))
                if name in found:
                    made = found[name]()
                    if made.dtype == torch.uint8:
                        return _ordered(layout, name, made)
                    return kind.encode(_rows(layout.changed(name, made)))
                values = _rows(layout.values(name))
                made = kind.encode(values, importance.get(name))
                if name in layout.plain and not torch.equal(kind.decode(made), values):
                    self._weights.add(name)
                return made

            planned[theirs] = Planned(kind, shape, make)
        full = TYPES["F32"]
        for name, tensor in layout.extra.items():
            planned[name] = Planned(full, tuple(tensor.shape), partial(full.encode, _rows(tensor)))
        if HEAD in layout.kinds and HEAD not in planned:
            planned[HEAD] = Planned(layout.kinds[HEAD], layout.shapes[HEAD], planned[TABLE].make)
        return planned

    def verify(self, model: ExportedModel, path: Path, options: GGUFOptions, device: str) -> Verification:
        if not installed():
            return Verification(
                runtime=runtime(), not_tried="neither llama-cpp-python nor xllamacpp is installed"
            )
        layout = plan_layout(model, options.types, options.importance != "none")
        probe = probe_of(model.checkpoint)
        before = streamed_logits(layout.dense, probe, device).log_softmax(-1).clamp(LEAST)
        shapes = {name: layout.dense.tensors[name].shape for name in layout.names}
        written = GGUFCheckpoint(GGUFFile.open(path), layout.config, layout.dense.config, shapes)
        read = streamed_logits(written, probe, device).log_softmax(-1).clamp(LEAST)
        if options.types is None:  # nothing is rounded by more than 16 bits
            check_same(before, read, "compress-model", HALF_PRECISION)
        loaded = llama_log_probabilities(path, probe.tokens)
        blocks = None in {kind.dtype for kind in layout.kinds.values()}
        allowed = allowed_with_blocks(model.shape.num_layers) if blocks else HALF_PRECISION
        check_same(read, loaded, runtime(), allowed)
        return compared(before, loaded, runtime(), probe.tokens.numel())


def allowed_with_blocks(layers: int) -> float:
    """The difference that passes between us and llama.cpp, which rounds the inputs of block types to 8 bits.

    That adds up over the layers, so a shallow model must agree more closely. A setting that is lost, such as
    a scaling of the rotary embedding, moves even a model of two layers by more than this.
    """
    return min(EIGHT_BIT_INPUTS, 0.1 + 0.015 * layers)


def llama_log_probabilities(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probabilities that llama.cpp computes, float32 [N, S, V], in a process of its own.

    None is below `LEAST`.

    Args:
        path: of the GGUF file.
        tokens: ids [N, S].

    Raises:
        CompressError: it fails on the file.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="compress-model-llama-") as scratch:
        asked, answer = Path(scratch, "tokens.json"), Path(scratch, "result.npy")
        asked.write_text(json.dumps(tokens.tolist()))
        call = [sys.executable, "-m", "compress.export.gguf_runtime", *map(str, (path, asked, answer))]
        try:
            ended = subprocess.run(
                call, capture_output=True, text=True, errors="replace", timeout=LONGEST_RUN, check=False
            )
        except subprocess.TimeoutExpired:
            raise CompressError(f"{runtime()} did not answer within {LONGEST_RUN:.0f} seconds.") from None
        if ended.returncode:
            lines = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
            said = (lines or ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise CompressError(
                f"{runtime()} cannot run the exported file ({said.strip()[:200]}); nothing was published. "
                "With --no-verify it is written without this check."
            )
        return torch.from_numpy(np.load(answer)).clamp(LEAST)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _ordered(layout: Layout, name: str, blocks: torch.Tensor) -> torch.Tensor:
    order = layout.order(name, len(blocks))
    return blocks if order is None else blocks[order]
