"""Folded scales leave the function of every architecture as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compress.anatomy import linears_by_input
from compress.engine.stream import Seen, StreamedModel
from compress.engine.windows import Windows
from compress.quantization.parts.folding import fold, fold_of, write_changed
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}
GEMMA = {**WIDE, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48}
ALL, NO_MLP, ATTENTION = 4, 3, 1
# Configs, and how many of the four inputs of a layer take scales.
CASES: dict[str, tuple[Any, int]] = {
    "llama": (hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True), ALL),
    "mistral": (hf.MistralConfig(**WIDE), ALL),
    "qwen2": (hf.Qwen2Config(**GQA), ALL),
    "qwen3": (hf.Qwen3Config(**WIDE), ALL),
    "gemma2": (hf.Gemma2Config(**GEMMA), ALL),
    "gemma3": (hf.Gemma3TextConfig(**GEMMA), ALL),
    "phi3": (hf.Phi3Config(**GQA), ALL),
    "opt": (hf.OPTConfig(**OPT), NO_MLP),
    "opt, post-norm": (hf.OPTConfig(**OPT, do_layer_norm_before=False), ATTENTION),
    "opt, norms without weights": (hf.OPTConfig(**OPT, layer_norm_elementwise_affine=False), ATTENTION),
    "gpt2": (hf.GPT2Config(**SIZE), NO_MLP),
    "gpt_neox": (hf.GPTNeoXConfig(**SIZE, intermediate_size=48), NO_MLP),
    "gpt_neox, sequential": (
        hf.GPTNeoXConfig(**SIZE, intermediate_size=48, use_parallel_residual=False),
        NO_MLP,
    ),
    "bert": (hf.BertConfig(**SIZE, intermediate_size=48), ATTENTION),
    "mpnet": (hf.MPNetConfig(**SIZE, intermediate_size=48), ATTENTION),
}


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Checkpoint:
    torch.manual_seed(0)
    auto = hf.AutoModelForMaskedLM if config.model_type in ("bert", "mpnet") else hf.AutoModelForCausalLM
    model = auto.from_config(config)
    for parameter in model.parameters():  # norms away from 1, biases from 0
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    return Checkpoint.open(folder)


def windows() -> Windows:
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random")


def hidden(checkpoint: Checkpoint) -> torch.Tensor:
    model = StreamedModel(checkpoint)
    stream = model.stream(windows())
    for layer in model.walk(None, stream):
        stream.advance(layer)
    return stream.hidden.read(0, 2)


def folded(checkpoint: Checkpoint, work: Path) -> tuple[Draft, set[int]]:
    """The model with random scales folded in wherever that can be done, and how often it was in a layer."""
    model, draft = StreamedModel(checkpoint), Draft(checkpoint, work / "draft")
    generator, counts = torch.Generator().manual_seed(2), set()
    for layer in model.walk(None):
        changed, count = set(), 0
        for paths in linears_by_input(model.anatomy, layer.linears):
            if (where := fold_of(model, layer.index, paths)) is not None:
                scales = torch.exp(torch.randn(len(where.rows), generator=generator))
                fold(model, layer, where, paths, scales)
                changed |= {where.producer, *paths}
                count += 1
        write_changed(draft, model, layer, changed)
        counts.add(count)
    return draft, counts


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case: str, tmp_path: Path) -> None:
    config, expected = CASES[case]
    checkpoint = saved(tmp_path / "dense", config)
    draft, counts = folded(checkpoint, tmp_path)

    assert counts == {expected}
    for name in draft.tensors:
        if name.endswith(("v_proj.weight", "v_proj.bias", "input_layernorm.weight")) and expected == ALL:
            assert not torch.equal(draft.read(name), checkpoint.read(name)), name
    before, after = hidden(checkpoint), hidden(draft)
    assert float((before - after).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_norm_stored_in_16_bits_costs_nothing(case: str, tmp_path: Path) -> None:
    """The linears, in float32 here, are multiplied by what the norm was really divided by."""
    checkpoint = saved(tmp_path / "dense", CASES[case][0], torch.bfloat16)
    model = StreamedModel(checkpoint)
    stream = model.stream(windows())
    for layer in model.walk(None, stream):
        expected = torch.empty(0)

        def keep(seen: Seen) -> None:
            nonlocal expected
            expected = seen.output

        stream.look(layer, {model.anatomy.query: keep})
        dense, paths = expected, [model.anatomy.query, model.anatomy.key, model.anatomy.value]
        where = fold_of(model, layer.index, paths)
        norm = layer.module.get_submodule(where.producer)
        scales = torch.exp(torch.randn(len(where.rows), generator=torch.Generator().manual_seed(2)))
        fold(model, layer, where, paths, scales)
        assert torch.equal(norm.weight, norm.weight.bfloat16().float())
        stream.look(layer, {model.anatomy.query: keep})
        assert float((dense - expected).abs().max()) < 1e-5 * float(dense.abs().max())
        stream.advance(layer)


def test_a_norm_weight_of_zero_takes_no_scale(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "dense", hf.LlamaConfig(**GQA))
    model = StreamedModel(checkpoint)
    with model.layer(0) as layer:
        layer.module.input_layernorm.weight[3] = 0
        paths = linears_by_input(model.anatomy, layer.linears)[0]
        where = fold_of(model, 0, paths)
        scales = fold(model, layer, where, paths, torch.full((32,), 2.0))
        assert scales[3] == 1
        assert layer.module.input_layernorm.weight[3] == 0
        assert (scales == 2).sum() == 31
