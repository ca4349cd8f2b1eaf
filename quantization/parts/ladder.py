"""Ladders: the types that a target has for each tensor of a model, and what they make of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch

from compress.engine.shape import ModelShape
from compress.kernels.codes.integer import QuantizedWeight, quantize_weight
from compress.quantization.parts.head import is_head, round_head
from compress.quantization.parts.layout import linears_to_pack, plan_layout, plan_packed, stored_weights
from compress.quantization.parts.options import WeightOptions
from compress.quantization.parts.packer import round_by_rows
from compress.storage.formats.base import Format
from compress.storage.tensors import DTYPES

Tables = Literal["all", "head", "none"]
"""Which tables get a type: head and token embedding, only a head that is not also the embedding, or none."""


class Ladder(Protocol):
    """The types that each tensor of a model can have.

    Attributes:
        sizes: full name of a linear or a table -> type -> bytes.
        fixed: bytes of everything else in the file.
    """

    @property
    def sizes(self) -> Mapping[str, Mapping[str, int]]: ...

    @property
    def fixed(self) -> int: ...

    def powers(self, name: str) -> Sequence[float]:
        """How much a tensor may be rounded by the importance of its input channels: powers of it, to be tried
        one after the other. 0 is rounding that does not look at text."""
        ...

    def rounded(
        self, name: str, dense: torch.Tensor, kind: str, importance: torch.Tensor | None, power: float
    ) -> torch.Tensor:
        """What a weight is read back as, float32 [out, in].

        Args:
            name: full name of the linear or table.
            dense: its weight [out, in].
            kind: one of its types.
            importance: of its input channels, float32 [in], see `channel_importance`; not needed for power 0.
                Of a head, H of what it reads, float64 [in, in].
            power: one of `powers`.
        """
        ...


class CodesLadder:
    """Our integer codes of some widths: the types are the widths, written as numbers.

    Args:
        shape: of the dense model.
        options: of the method. They say what is packed and how; the widths are chosen.
        widths: to choose from.
        tables: which tables are among what gets a width. Of the others, packed are those for which the
            options have bits.
        stored_as: what a form is stored as where another program reads the result; None for the form itself.
        calibrated: whether the method looks at text. Such a method spares the input channels that matter, so
            its rounding is imitated with channels scaled by a power of their importance (`channel_scales`);
            it rounds the head as it will (`round_head`).

    Attributes:
        sizes, fixed: as of every ladder.
        tensors: number of tensors of the packed model.

    Raises:
        BadInput: the options do not fit the model.
    """

    POWERS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

    def __init__(
        self,
        shape: ModelShape,
        options: WeightOptions,
        widths: Sequence[int],
        *,
        tables: Tables = "none",
        stored_as: Callable[[Format], Format] | None = None,
        calibrated: bool,
    ) -> None:
        self.shape, self.calibrated = shape, calibrated
        self.options, self._varied = self._with_tables(options, tables)
        self._forms: dict[str, dict[str, Format]] = {}
        self._option_of: dict[str, str] = {}  # full name of a table that gets a width -> the option for it
        self._last: tuple[str, QuantizedWeight] | None = None  # a type and the head in it
        for bits in sorted(set(widths)):
            layout = plan_layout(shape, self._uniform(bits))
            for name in layout.around:
                if (option := self._table_option(name)) in self._varied:
                    self._option_of[name] = option
            around = {name: layout.around[name] for name in self._option_of}
            for name, form in {**layout.linears, **around}.items():
                self._forms.setdefault(name, {})[str(bits)] = form
        stored = stored_weights(shape, self._forms)

        def size(name: str, form: Format) -> int:
            return sum(info.nbytes for info in form.tensor_infos(name, *stored[name]).values())

        self.sizes = {
            name: {
                kind: size(name, form if stored_as is None else stored_as(form))
                for kind, form in forms.items()
            }
            for name, forms in self._forms.items()
        }
        smallest = plan_packed(shape, self._uniform(min(widths)))
        self.tensors = len(smallest.tensors)
        packed = sum(size(name, next(iter(forms.values()))) for name, forms in self._forms.items())
        self.fixed = smallest.nbytes - packed

    def powers(self, name: str) -> Sequence[float]:
        if name in self._option_of:
            return (1.0,) if self.calibrated and is_head(self.shape.anatomy, name) else (0.0,)
        return self.POWERS if self.calibrated else (0.0,)

    def rounded(
        self, name: str, dense: torch.Tensor, kind: str, importance: torch.Tensor | None, power: float
    ) -> torch.Tensor:
        form = self._forms[name][kind]
        scale_dtype = form.scale_dtype(DTYPES[self.shape.tensors[f"{name}.weight"].dtype])
        if name in self._option_of:
            if not power or importance is None:
                return round_by_rows(dense, form, name).dequantize()
            return self._rounded_head(name, dense, kind, importance, scale_dtype).dequantize()
        grid = (form.bits, form.group_size, form.symmetric, scale_dtype, name)
        if power == 0:
            return quantize_weight(dense, *grid).dequantize()
        assert importance is not None
        scales = channel_scales(importance, power)
        return quantize_weight(dense * scales, *grid).dequantize().div_(scales)

    def options_for(self, kinds: Mapping[str, str]) -> WeightOptions:
        """The options of the method with the widths that were chosen.

        Args:
            kinds: full name -> width, of everything that gets one.
        """
        bits = {name: int(kind) for name, kind in kinds.items() if name not in self._option_of}
        widths = list(bits.values())
        most = max(sorted(set(widths)), key=widths.count)
        around = {option: int(kinds[name]) for name, option in self._option_of.items()}
        patterns = patterns_of(self.shape, bits, most)
        return self.options.model_copy(update={"bits": most, "set": patterns, **around})

    def _with_tables(self, options: WeightOptions, tables: Tables) -> tuple[WeightOptions, list[str]]:
        """The options with dense tables, and the names of those for the bits of tables that get a width."""
        if tables == "none":
            return options, []
        anatomy = self.shape.anatomy
        kept = any(name in anatomy.heads for name in linears_to_pack(self.shape, options.ignore)[1])
        embedding = tables == "all" and not (anatomy.tied and kept)
        head = anatomy.head is not None and not anatomy.tied and not kept
        options = options.model_copy(update={"embedding_bits": None, "lm_head_bits": None})
        return options, ["embedding_bits"] * embedding + ["lm_head_bits"] * head

    def _rounded_head(
        self, name: str, dense: torch.Tensor, kind: str, hessian: torch.Tensor, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """The codes of a head. The last ones are kept, because they are asked for again and again."""
        if self._last is None or self._last[0] != kind:
            codes = round_head(dense, hessian, self._forms[name][kind], scale_dtype, name)
            self._last = kind, codes
        return self._last[1]

    def _table_option(self, name: str) -> str:
        anatomy = self.shape.anatomy
        return "lm_head_bits" if name == anatomy.head and not anatomy.tied else "embedding_bits"

    def _uniform(self, bits: int) -> WeightOptions:
        return self.options.model_copy(update={"bits": bits, **dict.fromkeys(self._varied, bits)})


def channel_importance(information: torch.Tensor) -> torch.Tensor:
    """How much each input channel matters: float32 [in], with a mean of about 1.

    A channel's share of the Fisher information grows with the squares of its inputs, so this is its root.

    Args:
        information: diagonal Fisher information of a weight, float32 [out, in].
    """
    importance = information.mean(0).sqrt()
    return (importance / importance.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=1e-4)


def channel_scales(importance: torch.Tensor, power: float) -> torch.Tensor:
    """c^power, where c is the importance of input channels, divided by sqrt(max * min): float32 [in].

    Args:
        importance: see `channel_importance`.
        power: between 0 (all 1) and 1.
    """
    scales = importance**power
    return scales / (scales.max() * scales.min()).sqrt()


def patterns_of(shape: ModelShape, bits: Mapping[str, int], default: int) -> dict[str, int]:
    """The widths other than the default as patterns for ``set``, one per projection and width."""
    anatomy = shape.anatomy
    indices: dict[tuple[str, int], list[str]] = defaultdict(list)
    for index in range(shape.num_layers):
        start = f"{anatomy.layer_name(index)}."
        for name, width in bits.items():
            if name.startswith(start) and width != default:
                indices[name.removeprefix(start), width].append(str(index))
    layers = re.escape(anatomy.layer_name(0).removesuffix("0"))
    return {
        f"re:{layers}({'|'.join(found)})\\.{re.escape(path)}$": width
        for (path, width), found in sorted(indices.items())
    }
