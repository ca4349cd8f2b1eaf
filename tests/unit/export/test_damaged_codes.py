"""Packed weights with tensors that do not fit: refused when a model is opened, or at the latest when read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.engine.opening import open_checkpoint
from compress.errors import BadInput
from compress.export.run import open_for_export

INTEGERS = ("rtn", {"bits": 4, "group_size": 32, "symmetric": False})
GPTQ = ("rtn", {"bits": 4, "group_size": 32, "format": "gptq"})
NF4 = ("nf4", {"double_quant": True})
INT8 = ("llm-int8", {})
STATE = "weight.quant_state.bitsandbytes__nf4"

Change = Callable[[torch.Tensor], torch.Tensor | None]


def without(tensor: torch.Tensor) -> None:
    return None


def in_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int8)


def with_an_axis(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None].contiguous()


def text(words: str) -> Change:
    return lambda tensor: torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("how", "leaf", "change", "message"),
    [
        (INTEGERS, "weight_shape", without, "lacks the tensor"),
        (INTEGERS, "weight_shape", with_an_axis, "has shape"),
        (INTEGERS, "weight_packed", in_bytes, "is I8 where I32 was expected"),
        (INTEGERS, "weight_zero_point", in_bytes, "is I8 where I32 was expected"),
        (GPTQ, "qweight", torch.flatten, "has shape"),
        (GPTQ, "qzeros", in_bytes, "is I8 where I32 was expected"),
        (GPTQ, "qzeros", without, "lacks the tensor"),
        (NF4, "weight", lambda tensor: tensor.float(), "is F32 where U8 was expected"),
        (NF4, "weight.quant_map", with_an_axis, "has shape"),
        (NF4, "weight.nested_absmax", without, "lacks the tensor"),
        (NF4, STATE, lambda tensor: tensor.float(), "is F32 where U8 was expected"),
        (INT8, "weight", lambda tensor: tensor[:, :-1].contiguous(), "has shape"),
        (INT8, "weight_format", lambda tensor: tensor.view(1)[:0], "has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_told_when_the_model_is_opened(
    how: tuple[str, dict[str, Any]],
    leaf: str,
    change: Change,
    message: str,
    quantized: Callable[..., Path],
) -> None:
    folder = quantized(how[0], **how[1])
    rewrite(folder, f"model.layers.0.self_attn.q_proj.{leaf}", change)
    with pytest.raises(BadInput, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("how", "leaf", "change"),
    [
        (INTEGERS, "weight_shape", lambda tensor: torch.tensor([64, 60])),
        (NF4, STATE, text("[1]")),
        (NF4, STATE, text('{"shape": ["a", 64], "dtype": "bfloat16", "blocksize": 64}')),
        (NF4, STATE, text('{"shape": [64, 64], "dtype": "nn", "blocksize": 64, "nested_offset": 0}')),
        (NF4, STATE, text('{"shape": [32, 128], "dtype": "float16", "blocksize": 64, "nested_offset": 0}')),
    ],
)
def test_values_that_do_not_fit_are_told_when_a_weight_is_read(
    how: tuple[str, dict[str, Any]], leaf: str, change: Change, quantized: Callable[..., Path]
) -> None:
    folder, name = quantized(how[0], **how[1]), "model.layers.0.self_attn.q_proj"
    rewrite(folder, f"{name}.{leaf}", change)
    with pytest.raises(BadInput, match="q_proj"):
        open_for_export(str(folder)).dense(name)


@pytest.mark.parametrize("size", [None, "32", 1.5])
def test_a_group_size_that_is_no_number(size: Any, quantized: Callable[..., Path]) -> None:
    folder = quantized(GPTQ[0], **GPTQ[1])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="groups of whole numbers of values"):
        open_checkpoint(folder)


def rewrite(folder: Path, name: str, change: Change) -> None:
    """Change a tensor of a model, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors")
