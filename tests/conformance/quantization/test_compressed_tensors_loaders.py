"""Who loads our compressed-tensors files, as we say it: tried on stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import compress
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.method import StepContext
from compress.quantization.round_to_nearest import RoundToNearest
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.writer import write_weights

TOKENS = torch.arange(48).view(2, 24)
DOWN = {"re:.*down_proj": 8, "*.v_proj": 2, "*.o_proj": 3}
TABLE = {"embedding_bits": 8}
STOCK, OURS = "transformers with compressed-tensors", "compress-model only"
CASES: dict[str, tuple[str, dict, bool]] = {  # who loads it, options, whether head and embedding are tied
    "2 bits": (STOCK, {"bits": 2, "format": "compressed-tensors"}, False),
    "3 bits": (STOCK, {"bits": 3, "format": "compressed-tensors"}, False),
    **{f"{bits} bits": (STOCK, {"bits": bits}, False) for bits in (5, 6, 7)},
    "7 bits, zero points fixed": (STOCK, {"bits": 7, "symmetric": True}, False),
    "5 bits in whole rows": (STOCK, {"bits": 5, "group_size": "channel"}, False),
    "six widths": (STOCK, {"set": {**DOWN, "*.q_proj": 5, "*.k_proj": 6, "*.up_proj": 7}}, False),
    "head and embedding at 6 bits": (
        STOCK,
        dict.fromkeys(("bits", "lm_head_bits", "embedding_bits"), 6),
        False,
    ),
    "mixed": (STOCK, {"set": DOWN}, False),
    "mixed, one kept": (STOCK, {"set": DOWN, "ignore": ["*.k_proj"]}, False),
    "mixed, the default unused": (STOCK, {"bits": 2, "set": {"*": 4, **DOWN}}, False),
    "head and mixed": (STOCK, {"lm_head_bits": 8, "set": DOWN}, False),
    "head and embedding, all the same": (STOCK, {"lm_head_bits": 4, "embedding_bits": 4}, False),
    "tied asymmetric, all the same": (STOCK, {"bits": 8, **TABLE, "symmetric": False}, True),
    "mixed asymmetric": (OURS, {"set": DOWN, "symmetric": False}, False),
    "head asymmetric": (OURS, {"lm_head_bits": 8, "symmetric": False}, False),
    "embedding": (OURS, TABLE, False),
    "tied": (OURS, TABLE, True),
}


def quantized(dense: Path, output: Path, options: dict) -> Path:
    checkpoint, method = Checkpoint.open(dense), RoundToNearest()
    run = StepContext(Draft(checkpoint, output / "work"), None, 0, output, "cpu", lambda text, share: None)
    method.apply(StreamedModel(checkpoint), method.Options(**{"group_size": 32, **options}), run)
    write_weights(run.draft, output)
    (output / "config.json").write_text(json.dumps(run.draft.config))
    return output


@pytest.mark.parametrize("case", CASES)
def test_it_is_loaded_by_whom_we_say(case: str, tmp_path: Path) -> None:
    who, options, tied = CASES[case]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in dense.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    dense.save_pretrained(tmp_path / "dense")
    packed = quantized(tmp_path / "dense", tmp_path / "packed", options)
    assert str(ModelShape.of(Checkpoint.open(packed)).loads_with) == who

    if who == OURS:  # aloud: other logits without a word would be worse
        with pytest.raises((RuntimeError, AttributeError)):
            AutoModelForCausalLM.from_pretrained(packed)
        return
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(packed)(TOKENS).logits
        expected = compress.load(packed)(TOKENS).logits
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert float((got - expected).float().abs().mean()) < 2e-3 * float(expected.float().abs().max())
