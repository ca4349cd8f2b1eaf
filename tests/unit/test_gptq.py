"""GPTQ through the command line's way: every architecture, packed, loaded again, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import compress
from compress.recipe import parse_recipe
from compress.run import execute

SIZE = {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {**SIZE, "intermediate_size": 96, "num_key_value_heads": 2}
CASES = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GQA)),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**GQA, pad_token_id=0)),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**SIZE)),
    "gpt_neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**SIZE, intermediate_size=96)),
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture(params=CASES)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    cls, config = CASES[request.param]
    torch.manual_seed(0)
    model = cls(config())
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def quantized(dense: Path, output: Path, method: str = "gptq", **options: object) -> Path:
    step = {"method": method, "bits": 3, "group_size": 16, "symmetric": False, **options}
    calibration = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 64}
    execute(parse_recipe({"model": str(dense), "calibration": calibration, "steps": [step]}), output)
    return output


@torch.no_grad()
def error(dense: Path, folder: Path) -> float:
    """Mean squared error of the logits on the text."""
    tokens = hf.AutoTokenizer.from_pretrained(dense)(TEXT[:256], return_tensors="pt").input_ids
    first, second = (compress.load(path)(tokens).logits for path in (dense, folder))
    return float((first - second).square().mean())


def test_it_is_nearer_than_rounding(dense: Path, tmp_path: Path) -> None:
    nearest = error(dense, quantized(dense, tmp_path / "rtn", method="rtn"))
    for number, options in enumerate(({}, {"act_order": False}, {"true_sequential": True})):
        found = error(dense, quantized(dense, tmp_path / f"gptq-{number}", **options))
        assert found < 0.9 * nearest
