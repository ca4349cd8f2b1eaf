"""FLOPs against what torch counts when a tiny model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import compress
from compress.anatomy import ROWS, anatomy_of, layer_shapes, model_class, sizes_of
from compress.engine.config import config_of
from compress.engine.flops import Flops, flops, unit_flops
from compress.engine.stream import StreamedModel
from compress.pipeline.artefact import write_model
from compress.pruning.parts.width import Kept, finish, narrow, write_layer
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 5}
MLP = {**SIZE, "intermediate_size": 48}
GQA = {**MLP, "num_key_value_heads": 2, "head_dim": 12}
GEMMA = {**GQA, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 16}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "num_labels": 5}

CASES: dict[str, Any] = {
    "LlamaForCausalLM": hf.LlamaConfig(**GQA),
    "LlamaForSequenceClassification": hf.LlamaConfig(**GQA),
    "LlamaForTokenClassification": hf.LlamaConfig(**GQA),
    "LlamaForQuestionAnswering": hf.LlamaConfig(**GQA),
    "MistralForCausalLM": hf.MistralConfig(**GQA),
    "Qwen2ForCausalLM": hf.Qwen2Config(**MLP, num_key_value_heads=1),
    "Qwen3ForCausalLM": hf.Qwen3Config(**GQA),
    "Gemma2ForCausalLM": hf.Gemma2Config(**GEMMA),
    "Gemma3ForCausalLM": hf.Gemma3TextConfig(**GEMMA),
    "Phi3ForCausalLM": hf.Phi3Config(**MLP, num_key_value_heads=2),
    "OPTForCausalLM": hf.OPTConfig(**OPT),
    "OPTForSequenceClassification": hf.OPTConfig(**OPT),
    "OPTForQuestionAnswering": hf.OPTConfig(**OPT),
    "GPT2LMHeadModel": hf.GPT2Config(**SIZE),
    "GPT2ForTokenClassification": hf.GPT2Config(**SIZE),
    "GPTNeoXForCausalLM": hf.GPTNeoXConfig(**MLP),
    "BertForMaskedLM": hf.BertConfig(**MLP),
    "BertForSequenceClassification": hf.BertConfig(**MLP),
    "BertForTokenClassification": hf.BertConfig(**MLP),
    "BertForQuestionAnswering": hf.BertConfig(**MLP | {"num_labels": 2}),
    "DistilBertForMaskedLM": hf.DistilBertConfig(**DISTIL),
    "DistilBertForSequenceClassification": hf.DistilBertConfig(**DISTIL),
    "DistilBertForQuestionAnswering": hf.DistilBertConfig(**DISTIL | {"num_labels": 2}),
    "DistilBertModel": hf.DistilBertConfig(**DISTIL),
    "RobertaForMaskedLM": hf.RobertaConfig(**MLP),
    "RobertaForSequenceClassification": hf.RobertaConfig(**MLP),
    "RobertaForTokenClassification": hf.RobertaConfig(**MLP),
    "MPNetForMaskedLM": hf.MPNetConfig(**MLP),
    "MPNetForSequenceClassification": hf.MPNetConfig(**MLP),
    "MPNetForQuestionAnswering": hf.MPNetConfig(**MLP | {"num_labels": 2}),
}


def test_every_architecture_is_counted():
    assert {config.model_type for config in CASES.values()} == set(ROWS)


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_torch_counts(name: str):
    tokens = 20
    config = CASES[name]
    config.architectures = [name]
    model = model_class(config)._from_config(config, attn_implementation="eager").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.arange(3, 3 + tokens)[None])
    found = flops(config, tokens)
    assert found.total == counter.get_total_flops()

    anatomy = anatomy_of(config)
    layers = f"{model_class(config).__name__}.{anatomy.in_model(anatomy.layers)}."
    inside = {
        module: sum(count.values())
        for module, count in counter.get_flop_counts().items()
        if module.startswith(layers)
    }

    def of(*paths: str) -> int:
        """FLOPs of submodules of the layers; those of a fused linear once."""
        wanted = {f"{layers}{index}.{path}" for index in range(3) for path in paths}
        return sum(count for module, count in inside.items() if module in wanted)

    projections = of(anatomy.query, anatomy.key, anatomy.value, anatomy.attention_output)
    assert found.projections == projections
    linears = of(*anatomy.linear_paths)
    assert found.mlp == linears - projections
    whole = sum(count for module, count in inside.items() if module.removeprefix(layers).isdigit())
    assert found.attention == whole - linears
    assert found.head == counter.get_total_flops() - whole


def test_a_bare_encoder_has_no_head():
    config = hf.BertConfig(**MLP, architectures=["BertModel"])
    assert flops(config, 9).head == 0


def test_shares_of_a_bert_by_hand():
    config = hf.BertConfig(num_labels=2, architectures=["BertForSequenceClassification"])  # bert-base
    assert flops(config, 128) == Flops(
        projections=12 * 4 * 2 * 128 * 768 * 768,
        attention=12 * 2 * 2 * 128 * 128 * 768,
        mlp=12 * 2 * 2 * 128 * 768 * 3072,
        head=2 * (768 * 768 + 768 * 2),
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"])
def test_what_is_pruned_costs_nothing(name: str, tmp_path: Path):
    """Layer 0 has one head (or group) and some neurons, layer 1 no attention, layer 2 no MLP."""
    config = CASES[name]
    config.architectures = [name]
    model_class(config)._from_config(config).save_pretrained(tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense")
    model, draft = StreamedModel(source), Draft(source, tmp_path / "work")
    tokens = torch.arange(3, 23)[None]
    groups, neurons = torch.arange(sizes_of(config).num_key_value_heads), torch.arange(30)
    none = torch.arange(0)
    kept = [Kept(groups[1:2], neurons[:7]), Kept(none, neurons), Kept(groups, none)]
    for layer in model.walk(None):
        narrow(model, layer, kept[layer.index])
        write_layer(draft, model, layer)
    finish(draft, model, kept)
    draft.flush("step")
    write_model(draft, source.folder, tmp_path / "pruned", {})

    pruned = compress.load(tmp_path / "pruned")
    pruned.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        pruned(tokens)
    found = flops(config_of(Checkpoint.open(tmp_path / "pruned")), tokens.shape[1])
    assert found.total == counter.get_total_flops()
    assert found.layers < flops(config, tokens.shape[1]).layers / 2


@pytest.mark.parametrize("name", CASES)
def test_the_units_make_up_the_layers(name: str):
    config = CASES[name]
    config.architectures = [name]
    total = 0
    for index, shape in enumerate(layer_shapes(config)):
        group, neuron = unit_flops(config, index, 12)
        total += shape.num_key_value_heads * group + shape.intermediate_size * neuron
    assert total == flops(config, 12).layers
