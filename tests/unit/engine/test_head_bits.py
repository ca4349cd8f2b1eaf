"""The head of a model that is rounded when the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.errors import BadInput
from compress.kernels.layers.embedding import PackedEmbedding
from compress.kernels.layers.linear import PackedLinear

TOKENS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS)[0].float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_a_rounded_head_is_near_the_dense_one(
    architecture: str, tied: bool, shared_decoder: Callable[..., Path]
) -> None:
    folder = shared_decoder(architecture, tie_word_embeddings=tied)
    dense, rounded = compress.load(folder), compress.load(folder, head_bits=8)
    head = rounded.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    assert isinstance(rounded.get_input_embeddings(), PackedEmbedding) == tied
    if tied:
        assert rounded.get_input_embeddings().table is head
    difference = (logits(rounded) - logits(dense)).norm() / logits(dense).norm()
    coarser = compress.load(folder, head_bits=3)
    assert 0 < difference < 0.02 < (logits(coarser) - logits(dense)).norm() / logits(dense).norm()
    assert rounded.generate(TOKENS, max_new_tokens=2, do_sample=False).shape == (2, 16)


def test_a_packed_head_stays_as_it_is(artefact: Callable[..., Path]) -> None:
    folder = artefact("packed-embedding")
    assert torch.equal(logits(compress.load(folder, head_bits=4)), logits(compress.load(folder)))


def test_what_a_head_cannot_be(shared_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shared_decoder()
    with pytest.raises(BadInput, match="2 to 8 bits, not 9"):
        compress.load(folder, head_bits=9)
    with pytest.raises(BadInput, match="load the model without head_bits"):
        compress.load(folder, head_bits=8).save_pretrained(tmp_path / "copy")
