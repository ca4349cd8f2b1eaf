"""Rounding to block types with what calibration text says: importances, AWQ's scaling, and error feedback."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from compress.anatomy import linears_by_input, set_weight, weight
from compress.calibration.statistics.hessian import damping_of
from compress.calibration.text.prepare import prepare_calibration
from compress.calibration.text.settings import Calibration
from compress.engine.stream import Layer, StreamedModel
from compress.export.base import journal_beside
from compress.export.gguf_layout import Layout
from compress.export.model import ExportedModel
from compress.kernels.codes.gguf import BlockType
from compress.quantization.awq import Grid, Inputs, choose_scales
from compress.quantization.parts.block_rounding import round_with_feedback
from compress.quantization.parts.folding import fold, fold_of
from compress.quantization.parts.head import head_inputs, pack_head
from compress.storage.formats.compressed_tensors import CompressedTensorsFormat
from compress.storage.writer import write_tensors
from compress.system.progress import Progress

if TYPE_CHECKING:
    from compress.export.gguf import GGUFOptions

GROUP = 32
"""Weights that share a scale where AWQ's scales are chosen; the grid there is near those of the types."""


def measured(
    model: ExportedModel, layout: Layout, options: GGUFOptions, path: Path, progress: Progress
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, Any]]:
    """Round all weights inside the layers, each layer on the outputs of those before it as they are rounded.

    What an interrupted export has rounded is not rounded again.

    Args:
        model, layout: what is exported, and as what.
        options: say where the text comes from, and what is done.
        path: of the file. Results lie beside its folder until it is written.
        progress: told how far it is.

    Returns:
        Name in the checkpoint -> reads the blocks, uint8 [out, bytes of a row]; or the real numbers of a
        tensor that is not rounded and that the scaling changed. And what text it was, as a lineage describes
        it.

    Raises:
        BadInput: the text cannot be used.
    """
    text = Calibration(source=options.calibration, nsamples=options.nsamples, seqlen=options.seqlen)
    windows = prepare_calibration(text, options.seed, model.checkpoint, "cpu", progress)
    journal = journal_beside(
        path,
        model,
        types={name: kind.name for name, kind in layout.rounded.items()},
        calibration=windows.sha256,
        feedback=options.feedback,
        scaling=options.scaling,
    )
    streamed = StreamedModel(layout.dense, "cpu", progress)
    stream = streamed.stream(windows, journal.folder / "stream")
    for layer in streamed.walk(journal, stream, label="rounding to blocks"):
        groups = linears_by_input(streamed.anatomy, layer.linears)
        seen = [Inputs() for _ in groups]
        stream.look(layer, {paths[0]: inputs.add for paths, inputs in zip(groups, seen, strict=True)})
        touched: set[str] = set()
        if options.scaling:
            touched = _scaled(streamed, layer, layout, groups, seen)
        made = _rounded(layer, layout, groups, seen, options.feedback)
        made |= _changed(layer, layout, touched)
        write_tensors(made, journal.folder / f"rounded-{layer.index}.safetensors")
        stream.advance(layer)
    name, head = _head(streamed, layout), journal.folder / "rounded-head.safetensors"
    if name is not None and not head.exists():
        hessian = head_inputs(streamed, stream.hidden, windows)
        kind, tied = layout.rounded[name], streamed.anatomy.tied
        damping = damping_of(len(hessian), windows.num_tokens)
        packed = pack_head(layout.dense.read(name), hessian, kind, name, tied=tied, damping=damping)
        write_tensors({name: packed}, head)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for file in journal.folder.glob("rounded-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: partial(_read, file, name) for name in opened.keys()}  # noqa: SIM118
    return found, windows.describe()


def _head(model: StreamedModel, layout: Layout) -> str | None:
    """Name of the head's weight in the checkpoint, if it is rounded; a tied one is the embedding's."""
    anatomy = model.anatomy
    table = anatomy.in_model(anatomy.embeddings[0]) if anatomy.tied else anatomy.head
    return f"{table}.weight" if f"{table}.weight" in layout.rounded else None


def _kind(layer: Layer, layout: Layout, path: str) -> BlockType | None:
    """The type that a linear is rounded to, if it is."""
    name = layer.stored(path)
    return None if name is None else layout.rounded.get(name)


def _scaled(
    model: StreamedModel, layer: Layer, layout: Layout, groups: list[list[str]], seen: list[Inputs]
) -> set[str]:
    """Fold AWQ's scales into the layer where it can be done, and return the modules that changed.

    The modules that compute an input follow those that read it, so that rows are scaled before their own
    columns are.
    """
    touched: set[str] = set()
    for paths, inputs in zip(reversed(groups), reversed(seen), strict=True):
        kinds = {path: _kind(layer, layout, path) for path in paths}
        where = fold_of(model, layer.index, paths)
        grids = {
            path: Grid(CompressedTensorsFormat(_bits(kind), GROUP, False), torch.float32, path)
            for path, kind in kinds.items()
            if kind is not None
        }
        if where is None or not grids:
            continue
        dense = {path: weight(layer.linears[path]) for path in grids}
        scales = choose_scales(dense, grids, inputs, where)
        inputs.divide(fold(model, layer, where, paths, scales))
        touched |= {where.producer, *paths}
    return touched


def _bits(kind: BlockType) -> int:
    return max(2, min(8, (len(kind.levels) - 1).bit_length()))


def _rounded(
    layer: Layer, layout: Layout, groups: list[list[str]], seen: list[Inputs], feedback: bool
) -> dict[str, torch.Tensor]:
    """Round the linears in memory; name in the checkpoint -> blocks."""
    made = {}
    for paths, inputs in zip(groups, seen, strict=True):
        for path in paths:
            name, kind = layer.stored(path), _kind(layer, layout, path)
            if name is None or kind is None:
                continue
            dense = weight(layer.linears[path])
            if feedback:
                damping = damping_of(dense.shape[1], inputs.tokens)
                fields = round_with_feedback(dense, inputs.gram, kind, name, damping=damping)
            else:
                fields = kind.round(dense, inputs.gram.diagonal())
            made[name] = kind.pack(fields).view(len(dense), -1)
            set_weight(layer.linears[path], kind.values(fields).view(dense.shape))
    return made


def _changed(layer: Layer, layout: Layout, touched: set[str]) -> dict[str, torch.Tensor]:
    """The parameters of modules that the scaling changed and that are not rounded, float32."""
    found = {}
    for path in sorted(touched):
        for leaf, parameter in layer.module.get_submodule(path).named_parameters(recurse=False):
            name = layer.stored(path, leaf)
            if name is not None and name not in layout.rounded:
                found[name] = parameter.detach().float()
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(name)
        return found
