"""The table of architectures: one row for each model type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compress.anatomy.roles import Anatomy

# fmt: off
_LLAMA = Anatomy(
    model_type="llama", kind="decoder",
    layers="layers", embeddings=("embed_tokens",), final_norm="norm", head="lm_head",
    attention="self_attn", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    mlp="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", activation="mlp.act_fn",
    attention_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    has_head_dim=True, attention_bias_key="attention_bias", mlp_bias_key="mlp_bias",
)
_QWEN3 = replace(
    _LLAMA, model_type="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm", mlp_bias_key=None
)
_PLAIN: dict[str, Any] = {"attention_bias_key": None, "mlp_bias_key": None}
_GEMMA2 = replace(
    _LLAMA, model_type="gemma2", mlp_bias_key=None, norm_offset=1.0, softcap="attn_logit_softcapping",
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm",
)
_GEMMA3 = replace(
    _GEMMA2, model_type="gemma3_text", query_norm=_QWEN3.query_norm, key_norm=_QWEN3.key_norm, softcap=None
)
_PHI3 = replace(
    _LLAMA, model_type="phi3", **_PLAIN, attention_reads_config=True,
    query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj", qkv_layout="stacked",
    gate="mlp.gate_up_proj", up="mlp.gate_up_proj", activation="mlp.activation_fn",
)
_OPT = replace(
    _LLAMA, model_type="opt", **_PLAIN, has_head_dim=False,
    layers="decoder.layers", embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    final_norm="decoder.final_layer_norm",
    attention_output="self_attn.out_proj",
    mlp=None, gate=None, up="fc1", down="fc2", activation="activation_fn",
    intermediate_size_key="ffn_dim", flat_mlp=True, scales_query=True,
    attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm",
)
_GPT2 = replace(
    _LLAMA, model_type="gpt2", **_PLAIN, has_head_dim=False,
    layers="h", embeddings=("wte", "wpe"), final_norm="ln_f",
    attention="attn", query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", qkv_layout="stacked",
    attention_output="attn.c_proj", conv1d=True,
    gate=None, up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act", intermediate_size_key="n_inner",
    attention_norm="ln_1", mlp_norm="ln_2",
)
_GPT_NEOX = replace(
    _LLAMA, model_type="gpt_neox", **_PLAIN, has_head_dim=False,
    embeddings=("embed_in",), final_norm="final_layer_norm", head_aliases=("embed_out",),
    attention="attention", query="attention.query_key_value", key="attention.query_key_value",
    value="attention.query_key_value", qkv_layout="interleaved", attention_output="attention.dense",
    gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.act",
)
_BERT = Anatomy(
    model_type="bert", kind="encoder",
    layers="encoder.layer", embedding_norm="embeddings.LayerNorm", head="cls.predictions.decoder",
    embeddings=tuple(f"embeddings.{table}_embeddings" for table in ("word", "position", "token_type")),
    attention="attention", attention_core="attention.self", attention_output="attention.output.dense",
    query="attention.self.query", key="attention.self.key", value="attention.self.value",
    mlp=None, up="intermediate.dense", down="output.dense", activation="intermediate.intermediate_act_fn",
    attention_norm="attention.output.LayerNorm", mlp_norm="output.LayerNorm", norm_first=False,
)
_MPNET = replace(
    _BERT, model_type="mpnet", head="lm_head.decoder",
    embeddings=(*_BERT.embeddings[:2], "encoder.relative_attention_bias"),
    query="attention.attn.q", key="attention.attn.k", value="attention.attn.v",
    attention_output="attention.attn.o", attention_norm="attention.LayerNorm",
    attention_core="attention.attn", shared_position_bias=True,
)
_DISTILBERT = replace(
    _BERT, model_type="distilbert",
    layers="transformer.layer", embeddings=_BERT.embeddings[:2], head="vocab_projector",
    query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    attention_output="attention.out_lin", attention_core=None,
    mlp="ffn", up="ffn.lin1", down="ffn.lin2", activation="ffn.activation",
    intermediate_size_key="hidden_dim",
    attention_norm="sa_layer_norm", mlp_norm="output_layer_norm",
)
_SAME = (
    replace(_LLAMA, model_type="mistral", **_PLAIN),
    replace(_LLAMA, model_type="qwen2", **_PLAIN),
    replace(_BERT, model_type="roberta", head="lm_head.decoder"),
)


ROWS: dict[str, Anatomy] = {
    row.model_type: row
    for row in (
        *(_LLAMA, _QWEN3, _GEMMA2, _GEMMA3, _PHI3, _OPT, _GPT2, _GPT_NEOX),
        *(_BERT, _MPNET, _DISTILBERT),
        *_SAME,
    )
}


def _opt_variant(config: Any) -> dict[str, Any]:
    variant: dict[str, Any] = {"norm_first": config.do_layer_norm_before}
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        variant["final_norm"] = None
    if config.word_embed_proj_dim != config.hidden_size:
        variant["embeddings"] = (*_OPT.embeddings, "decoder.project_in")
        variant["final_projection"] = "decoder.project_out"
    return variant


# The entries of a row that depend on the config.
VARIANTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "opt": _opt_variant,
    "gpt_neox": lambda config: {"parallel_residual": config.use_parallel_residual},
}
