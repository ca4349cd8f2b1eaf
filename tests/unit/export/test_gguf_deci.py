"""GGUF files of models whose layers differ, computed as llama.cpp computes its architecture ``deci``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

import compress
from compress.errors import BadInput
from compress.export.gguf_runtime import installed
from compress.sources.find import find_model

gguf = pytest.importorskip("gguf")
TOKENS = torch.tensor([7, 100, 31, 200, 5, 9])
Export = Callable[..., dict[str, Any]]


class Deci:
    """llama.cpp's graph of ``deci`` in float64, with the ways in which it treats layers that lack a block."""

    def __init__(self, file: Path) -> None:
        read = gguf.GGUFReader(file)
        self.tensors = {each.name: torch.from_numpy(each.data.copy()).double() for each in read.tensors}
        self.values = {key: field.contents() for key, field in read.fields.items()}
        assert self.values["general.architecture"] == "deci"

    def value(self, key: str, layer: int | None = None) -> Any:
        found = self.values[f"deci.{key}"]
        return found if layer is None else found[layer]

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = (
            hidden.square().mean(-1, keepdim=True) + self.value("attention.layer_norm_rms_epsilon")
        ).rsqrt()
        return hidden * scale * self.tensors[f"{name}.weight"]

    def linear(self, hidden: Tensor, name: str) -> Tensor:
        found = hidden @ self.tensors[f"{name}.weight"].T
        return found + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else found

    def turned(self, heads: Tensor) -> Tensor:
        """Rotary embedding of pairs of neighbours, [tokens, heads, width]."""
        width = heads.shape[-1]
        frequency = self.value("rope.freq_base") ** (-torch.arange(0, width, 2).double() / width)
        angle = torch.arange(len(heads)).double()[:, None, None] * frequency
        even, odd = heads[..., ::2], heads[..., 1::2]
        pair = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        return torch.stack(pair, dim=-1).flatten(-2)

    def attention(self, hidden: Tensor, layer: int) -> Tensor:
        count, groups = (self.value(f"attention.{key}", layer) for key in ("head_count", "head_count_kv"))
        # The width of a head is read where the first layer has heads.
        assert self.value("attention.head_count", 0)
        width = self.value("attention.key_length")
        normed = self.norm(hidden, f"blk.{layer}.attn_norm")
        query, key, value = (
            self.linear(normed, f"blk.{layer}.attn_{name}").view(len(hidden), -1, width) for name in "qkv"
        )
        assert (query.shape[1], key.shape[1]) == (count, groups)
        query, key = self.turned(query), self.turned(key)
        key, value = (each.repeat_interleave(count // groups, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
        later = torch.ones(len(hidden), len(hidden)).triu(1).bool()
        chances = softmax(scores.masked_fill(later, -torch.inf), -1)
        return self.linear(
            torch.einsum("hqk,khd->qhd", chances, value).flatten(1), f"blk.{layer}.attn_output"
        )

    def logits(self, tokens: Tensor) -> Tensor:
        stream = self.tensors["token_embd.weight"][tokens]
        for layer in range(self.value("block_count")):
            there = self.value("attention.head_count", layer) > 0
            inner = stream + self.attention(stream, layer) if there else stream
            if not self.value("feed_forward_length", layer):
                continue  # the attention is dropped
            normed = self.norm(inner, f"blk.{layer}.ffn_norm")
            up, gate = (self.linear(normed, f"blk.{layer}.ffn_{name}") for name in ("up", "gate"))
            assert up.shape[1] == self.value("feed_forward_length", layer)
            stream = inner + self.linear(silu(gate) * up, f"blk.{layer}.ffn_down")
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.norm(stream, "output_norm") @ self.tensors[f"{head}.weight"].T


@pytest.mark.parametrize(
    ("architecture", "step"),
    [
        ("LlamaForCausalLM", {"method": "flap", "ratio": 0.4, "compensate": "bias"}),
        ("LlamaForCausalLM", {"method": "blockpruner", "blocks": 3}),
        ("Qwen2ForCausalLM", {"method": "blockpruner", "blocks": 4}),
        ("MistralForCausalLM", {"method": "kprune", "ratio": 0.3, "width_multiple": 8}),
    ],
)
def test_llama_cpp_computes_the_same(
    tmp_path: Path,
    export: Export,
    pruned: Callable[..., Path],
    shared_decoder: Callable[..., Path],
    architecture: str,
    step: dict[str, Any],
) -> None:
    settings = {"sliding_window": None} if architecture.startswith("Mistral") else {}
    settings |= {"num_hidden_layers": 4, "intermediate_size": 320}
    model = shared_decoder(architecture, dtype=torch.float32, **settings)
    source = pruned(model, tmp_path / "pruned", step)
    file = tmp_path / "model.gguf"
    record = export(source, "--format", "gguf", "--types", "F32", "-o", file)
    with torch.no_grad():
        expected = compress.load(source, dtype="float32", kernel="reference")(TOKENS[None]).logits[0]
    torch.testing.assert_close(Deci(file).logits(TOKENS), expected.double(), atol=2e-5, rtol=1e-4)
    if installed():
        assert record["exported"]["verification"]["kl"] < 1e-5
    assert abs(record["result"]["predicted_bytes"] - file.stat().st_size) <= 0.02 * file.stat().st_size
    with pytest.raises(BadInput, match="give the folder that it was made from"):
        find_model(str(file))


def test_layers_that_differ_are_rounded_and_carried_over(
    tmp_path: Path, export: Export, pruned: Callable[..., Path], shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder("LlamaForCausalLM", dtype=torch.float32, num_hidden_layers=4)
    source = pruned(
        model,
        tmp_path / "pruned",
        {"method": "flap", "ratio": 0.4, "compensate": "bias", "width_multiple": 32},
        {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True},
    )
    export(source, "--format", "gguf", "-o", tmp_path / "carried.gguf", "--no-verify")
    file = tmp_path / "carried.gguf"
    found = {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}
    assert found["blk.0.ffn_down.weight"] == "Q4_0"
    rounded = tmp_path / "rounded.gguf"
    record = export(source, "--format", "gguf", "--types", "Q4_K_M", "-o", rounded, "--no-verify")
    assert record["result"]["predicted_bytes"] == pytest.approx(rounded.stat().st_size, rel=0.02)


def test_other_architectures_are_refused(
    tmp_path: Path, export: Export, pruned: Callable[..., Path], shared_decoder: Callable[..., Path]
) -> None:
    model = shared_decoder("Qwen3ForCausalLM", head_dim=16, num_hidden_layers=4)
    source = pruned(model, tmp_path / "pruned", {"method": "blockpruner", "blocks": 3})
    with pytest.raises(BadInput, match="different widths, which a GGUF file can hold for llama"):
        export(source, "--format", "gguf", "-o", tmp_path / "model.gguf")
