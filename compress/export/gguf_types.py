"""The type of every tensor of a GGUF file: llama.cpp's mixtures, one type for all, or a map from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import BadInput, unknown
from compress.kernels.codes.gguf import TYPES, BlockType, find_type

FALLBACK = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What llama.cpp takes for rows that are not whole blocks of 256 weights."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the model.

    Attributes:
        part: the part of its name that says what it does, such as ``attn_v``.
        layer: its layer; 0 outside the layers.
        layers: of the model.
        shared: query heads of each key head.
        weighted: whether there are importances.
    """

    part: str
    layer: int
    layers: int
    shared: int
    weighted: bool

    @property
    def more(self) -> bool:
        """Whether it is in the first or last eighth of the layers, or the third one of three between."""
        eighth = self.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2

    @property
    def early(self) -> bool:
        return self.layer < self.layers // 8


Rule = Callable[[Place], str | None]


def _q2_k(at: Place) -> str | None:
    if at.part in ("attn_v", "attn_qkv"):
        return "Q4_K" if at.shared >= 4 else "Q3_K"
    return "Q3_K" if at.part in ("ffn_down", "attn_output") else None


def _q3_k_m(at: Place) -> str | None:
    if at.part in ("attn_v", "attn_qkv"):
        return "Q5_K" if at.layer < 2 else "Q4_K"
    if at.part == "ffn_down":
        return "Q5_K" if at.layer < at.layers // 16 else "Q4_K"
    return "Q4_K" if at.part == "attn_output" else None


def _q3_k_l(at: Place) -> str | None:
    return "Q5_K" if at.part in ("attn_v", "attn_qkv", "ffn_down", "attn_output") else None


def _q4_k_s(at: Place) -> str | None:
    if at.part in ("attn_v", "attn_qkv") and at.layer < 4:
        return "Q5_K"
    return "Q5_K" if at.part == "ffn_down" and at.early else None


def _more_bits(at: Place) -> str | None:
    return "Q6_K" if at.part in ("attn_v", "attn_qkv", "ffn_down") and at.more else None


def _iq4(at: Place) -> str | None:
    if at.part in ("attn_v", "attn_qkv") and at.shared >= 4:
        return "Q5_K"
    return "Q5_K" if at.part == "ffn_down" and at.early and not at.weighted else None


def _old(better: str) -> Rule:
    return lambda at: better if at.part == "ffn_down" and at.early and at.weighted else None


def _same(at: Place) -> str | None:
    return None


MIXTURES: dict[str, tuple[str, int, Rule]] = {
    "F32": ("F32", 0, _same),
    "F16": ("F16", 1, _same),
    "Q4_0": ("Q4_0", 2, _old("Q4_1")),
    "Q4_1": ("Q4_1", 3, _same),
    "Q8_0": ("Q8_0", 7, _same),
    "Q5_0": ("Q5_0", 8, _old("Q5_1")),
    "Q5_1": ("Q5_1", 9, _same),
    "Q2_K": ("Q2_K", 10, _q2_k),
    "Q3_K_S": ("Q3_K", 11, _same),
    "Q3_K_M": ("Q3_K", 12, _q3_k_m),
    "Q3_K_L": ("Q3_K", 13, _q3_k_l),
    "Q4_K_S": ("Q4_K", 14, _q4_k_s),
    "Q4_K_M": ("Q4_K", 15, _more_bits),
    "Q5_K_S": ("Q5_K", 16, _same),
    "Q5_K_M": ("Q5_K", 17, _more_bits),
    "Q6_K": ("Q6_K", 18, _same),
    "IQ4_NL": ("IQ4_NL", 25, _iq4),
    "IQ4_XS": ("IQ4_XS", 30, _iq4),
    "BF16": ("BF16", 32, _same),
}
"""Name of a mixture of llama.cpp -> the type of most tensors, its number in a file, and the exceptions."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""What llama.cpp understands by these."""


@dataclass(frozen=True)
class Wanted:
    """The types that the user asks for: a mixture, or types by name.

    Attributes:
        mixture: a key of `MIXTURES`; None if types are given by name.
        named: name of a tensor in the file -> type.
    """

    mixture: str | None
    named: Mapping[str, BlockType]

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """A mixture or type, or a JSON file with an object: name of a tensor -> type.

        Raises:
            BadInput: it is neither, or names types that do not exist.
        """
        name = ALIASES.get(text.upper(), text.upper())
        if name in MIXTURES:
            return cls(name, {})
        path = Path(text).expanduser()
        if not path.is_file():
            if path.suffix or "/" in text:
                raise BadInput(f"There is no file '{text}' with types of tensors.")
            raise unknown("GGUF type", text, [*MIXTURES, *ALIASES])
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"'{text}' is not JSON ({error}).") from None
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise BadInput(f"'{text}' is not a JSON object of names of tensors and their types.")
        return cls(None, {name: find_type(kind) for name, kind in found.items()})

    @property
    def number(self) -> int:
        """``general.file_type``; of types by name, that of the most frequent one."""
        if self.mixture is not None:
            return MIXTURES[self.mixture][1]
        kinds = [kind.name for kind in self.named.values()]
        most = max(set(kinds), key=lambda name: (kinds.count(name), name), default="F16")
        return next((number for kind, number, _ in MIXTURES.values() if kind == most), 1)


def types_of(
    wanted: Wanted, shapes: Mapping[str, tuple[int, ...]], config: Any, weighted: bool
) -> dict[str, BlockType]:
    """The type of every tensor of a file.

    Args:
        wanted: what the user asks for. A map must name every weight of the layers and the tables, or what it
            leaves out stays in float16.
        shapes: name in the file -> shape, of all tensors.
        config: of the model.
        weighted: whether there are importances, on which some of llama.cpp's exceptions depend.

    Raises:
        BadInput: a name in the map is no weight of the model, or its rows cannot have that type.
    """
    weights = [name for name, shape in shapes.items() if is_weight(name, shape)]
    if strange := sorted(wanted.named.keys() - set(weights)):
        raise unknown("weight", strange[0], weights)
    tied = "output.weight" not in shapes
    found = {}
    for name, shape in shapes.items():
        if name not in weights:
            found[name] = TYPES["F32"]
        elif wanted.mixture is None:
            found[name] = wanted.named.get(name, TYPES["F16"])
            found[name].row_bytes(shape[-1])  # refuses what does not fit
        else:
            found[name] = _fitting(_mixed(wanted.mixture, name, shape, tied, config, weighted), shape[-1])
    return found


def is_weight(name: str, shape: Iterable[int]) -> bool:
    """Whether a tensor of a file can have a type of few bits; others are float32."""
    return (
        len(tuple(shape)) == 2
        and name.endswith(".weight")
        and not name.endswith("_norm.weight")
        and not name.startswith(("position_embd", "rope_"))
    )


def _mixed(mixture: str, name: str, shape: tuple[int, ...], tied: bool, config: Any, weighted: bool) -> str:
    usual, _, rule = MIXTURES[mixture]
    if TYPES[usual].dtype is not None:
        return usual
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if usual == "Q8_0" or shape[-1] % TYPES[usual].size else "Q6_K"
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" else 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    place = Place(parts[-2], layer, config.num_hidden_layers, config.num_attention_heads // heads, weighted)
    return rule(place) or usual


def _fitting(name: str, width: int) -> BlockType:
    if TYPES[name].fits(width):
        return TYPES[name]
    name = FALLBACK.get(name, "F16")
    return TYPES[name] if TYPES[name].fits(width) else TYPES["F16"]
