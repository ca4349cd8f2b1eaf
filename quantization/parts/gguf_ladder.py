"""The ladder of GGUF files: every tensor can have each of their types that its rows are whole blocks of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from compress.engine.shape import ModelShape
from compress.kernels.codes.gguf import TYPES, find_type
from compress.quantization.parts.head import pack_head
from compress.quantization.parts.layout import stored_weights
from compress.storage.gguf.architectures import architecture_of, extra_tensors, tensor_names
from compress.storage.gguf.tokenizer import tokenizer_metadata
from compress.storage.gguf.writer import ALIGNMENT, Planned, file_bytes
from compress.storage.writer import write_tensors

FEW_BITS = tuple(name for name, kind in TYPES.items() if kind.dtype is None)
"""The types of few bits."""

MARGIN = 0.05
"""Share by which metadata may be larger than `file_bytes` reckons."""


class GGUFLadder:
    """The types of GGUF, weighted by the importance of input channels where there is text to measure it.

    What rounding gives is kept as blocks on disk, since it is asked for again and again.

    Args:
        shape: of the dense model.
        kinds: names of types to choose from; None for all that have few bits.
        room: a folder for the blocks, for this model only: about 5 bytes per weight if all types are tried.

    Attributes:
        sizes, fixed: as of every ladder; ``fixed`` counts metadata with a margin, so that the file is never
            larger than the sum.
        in_file: full name of a linear or table -> names of its tensors in the file, two where a tied head is
            written beside the embedding.

    Raises:
        BadInput: there is no such type, or models of this architecture cannot be written as GGUF.
    """

    POWER = 2.0
    """Errors count as the squares of the inputs do."""

    def __init__(self, shape: ModelShape, kinds: Sequence[str] | None, room: Path) -> None:
        self.shape, self.room = shape, room
        config, anatomy = shape.pretrained_config, shape.anatomy
        wanted = FEW_BITS if kinds is None else tuple(dict.fromkeys(find_type(kind).name for kind in kinds))
        copy = f"{anatomy.head}.weight" if anatomy.tied else ""  # which some files hold beside the table
        names = tensor_names(config, [name for name in shape.tensors if name != copy])
        tables = {anatomy.in_model(anatomy.embeddings[0]), *filter(None, (anatomy.head,))}
        choosable = [*shape.linears(), *(name for name in sorted(tables) if f"{name}.weight" in names)]
        stored = stored_weights(shape, choosable)
        self.tables = tables
        self.in_file = {name: [names[f"{name}.weight"]] for name in choosable}
        if anatomy.tied and architecture_of(config).head_is_needed:
            for name in tables & self.in_file.keys():
                self.in_file[name] = ["token_embd.weight", "output.weight"]
        self.sizes: dict[str, dict[str, int]] = {}
        for name, ((out, width), _) in stored.items():
            copies = len(self.in_file[name])
            fitting = [kind for kind in wanted if TYPES[kind].fits(width)] or ["F16"]
            sizes = {kind: copies * aligned(out * TYPES[kind].row_bytes(width)) for kind in fitting}
            self.sizes[name] = dict(sorted(sizes.items(), key=lambda entry: entry[1]))
        self.fixed = self._fixed(names, stored)

    def powers(self, name: str) -> Sequence[float]:
        anatomy = self.shape.anatomy
        only_embedding = name == anatomy.in_model(anatomy.embeddings[0]) and not anatomy.tied
        return (0.0,) if only_embedding else (self.POWER,)

    def rounded(
        self, name: str, dense: torch.Tensor, kind: str, importance: torch.Tensor | None, power: float
    ) -> torch.Tensor:
        form, file = find_type(kind), self.room / f"{name}.{kind}.safetensors"
        if not file.exists():
            if importance is not None and importance.ndim == 2 and power:
                tied = self.shape.anatomy.tied
                blocks = pack_head(dense, importance, form, name, tied=tied).cpu()
            else:
                weights = importance**power if importance is not None and power else None
                blocks = form.encode(dense, weights).cpu()
            self.room.mkdir(parents=True, exist_ok=True)
            write_tensors({"blocks": blocks}, file)
        return form.decode(load_file(file)["blocks"].to(dense.device))

    def types_for(self, kinds: dict[str, str]) -> dict[str, str]:
        """Name of a tensor in the file -> type, as ``export --format gguf --types`` reads it."""
        return {tensor: kind for name, kind in kinds.items() for tensor in self.in_file[name]}

    def _fixed(self, names: dict[str, str], stored: dict[str, tuple[tuple[int, int], str]]) -> int:
        """Bytes of the file without the tensors that have a choice."""
        config = self.shape.pretrained_config

        def planned(shape: tuple[int, ...], kind: str) -> Planned:
            return Planned(TYPES[kind], shape, lambda: torch.empty(0))

        tensors = {
            theirs: planned(self.shape.tensors[name].shape, "F32")
            for name, theirs in names.items()
            if name.removesuffix(".weight") not in stored
        }
        tensors |= {name: planned(tuple(value.shape), "F32") for name, value in extra_tensors(config).items()}
        nbytes = file_bytes({}, tensors)
        form = architecture_of(config)
        metadata = form.metadata(config) | tokenizer_metadata(self.shape.folder, config.vocab_size).values
        entries = {tensor: 0 for each in self.in_file.values() for tensor in each}
        head = file_bytes(metadata, {}) + sum(len(tensor) + 64 for tensor in entries) + 4096
        return nbytes + int((1 + MARGIN) * head)


def aligned(nbytes: int) -> int:
    """Bytes with what aligns the next tensor."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
