"""A model in another format, made of a checkpoint one tensor at a time while it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from compress.storage.checkpoint import Checkpoint
from compress.storage.tensors import CASTABLE, DTYPE_NAMES, TensorInfo


@dataclass(frozen=True)
class Made:
    """Tensors that are made together, such as those of one linear.

    Attributes:
        infos: full name -> dtype and shape, which are known before.
        make: makes them.
    """

    infos: dict[str, TensorInfo]
    make: Callable[[], dict[str, torch.Tensor]]


class Converted(Checkpoint):
    """A checkpoint that does not exist yet: some tensors are those of ``parent``, others are made when read.

    Args:
        parent: what it is made of.
        config: config.json of the result.
        kept: names of the parent's tensors that stay.
        made: all others.
        dtype: what kept floating-point tensors are rounded to, such as ``BF16``; None keeps their dtypes.
    """

    def __init__(
        self,
        parent: Checkpoint,
        config: dict[str, Any],
        kept: Iterable[str],
        made: Iterable[Made],
        dtype: str | None = None,
    ) -> None:
        kept = list(kept)
        infos = {name: parent.tensors[name] for name in kept}
        if dtype is not None:
            infos = {
                name: TensorInfo(dtype, info.shape) if info.dtype in CASTABLE else info
                for name, info in infos.items()
            }
        super().__init__(parent.folder, config, infos, {name: parent.sources[name] for name in kept})
        self._made = {name: part for part in made for name in part.infos}
        self.tensors |= {name: part.infos[name] for name, part in self._made.items()}
        self._last: tuple[Made, dict[str, torch.Tensor]] | None = None

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        found = super().read_many(name for name in names if name not in self._made)
        return found | {name: self._make(name) for name in names if name in self._made}

    def _make(self, name: str) -> torch.Tensor:
        part = self._made[name]
        if self._last is None or self._last[0] is not part:
            self._last = (part, part.make())
        tensor = self._last[1][name]
        info = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        if info != part.infos[name]:
            raise AssertionError(f"'{name}' was planned as {part.infos[name]} and made as {info}")
        return tensor

    @property
    def file_bytes(self) -> int:
        """Bytes that the weights take on disk: all tensors, and the headers that name them.

        Headers are counted with offsets as long as the largest, so this may be some bytes too many.
        """
        digits = len(str(self.nbytes))
        entry = len(json.dumps({"dtype": "BF16", "shape": [], "data_offsets": []}, separators=(",", ":")))
        headers = sum(
            len(name) + entry + len(str(list(info.shape))) + 2 * digits + 4
            for name, info in self.tensors.items()
        )
        return self.nbytes + headers
