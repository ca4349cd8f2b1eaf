"""The format of Nemotron-NAS (DeciLM), whose layers may differ in width or lack a block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compress.anatomy import LayerShape, anatomy_of, layer_shapes
from compress.engine.config import config_of
from compress.engine.logits import streamed_logits
from compress.engine.pruned_config import mark_pruned
from compress.errors import BadInput
from compress.export.base import FolderTarget, Progress, TargetOptions
from compress.export.converted import Converted, Made
from compress.export.huggingface import rounding_notes, unpacked
from compress.export.legacy import with_rope
from compress.export.model import ExportedModel
from compress.export.verify import allowed_for, check_same, compared
from compress.kernels.cpu.library import REFERENCE, using
from compress.pipeline.promise import in_words, obstacle, promised_logits
from compress.pipeline.reload import HALF_PRECISION, probe_of
from compress.pruning.parts.width import pruned_parts
from compress.storage import adapter
from compress.storage.adapter import write_config
from compress.storage.checkpoint import Checkpoint
from compress.storage.companions import copy_companions
from compress.storage.formats.loaders import MLX
from compress.storage.lineage import Verification
from compress.storage.tensors import DTYPE_NAMES, TensorInfo
from compress.storage.writer import write_weights

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""The architectures that it can hold: none with norms of queries and keys, or behind the blocks."""
STEP = 256
"""Runtimes round the width of an MLP up to a multiple of this."""
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NOT_KEPT = ("pruned", "auto_map", "quantization_config", "quantization", adapter.KEY, "quantized_kv_cache")


@dataclass(frozen=True)
class Block:
    """One layer of the export.

    Attributes:
        source: index of the layer in the model that is exported.
        before: its widths there.
        groups: key-value heads in the export; 0 for no attention.
        width: of the MLP in the export; 0 for none.
    """

    source: int
    before: LayerShape
    groups: int
    width: int


class NemotronNAS(FolderTarget[TargetOptions]):
    """Dense weights with ``block_configs``, which say for each layer what it has.

    Layers without attention and MLP are left out. Runtimes give every layer all query heads, and MLP widths
    in steps of 256, so pruned heads and neurons are filled up with zeros where they have to be, which changes
    nothing but the size.
    """

    name = "nemotron-nas"
    summary = "layers that differ in width or lack a block, as DeciLM block_configs"
    runtime = "vLLM, llama.cpp's converter and mlx-lm"

    def loads_with(self, found: Converted) -> str:
        return "vLLM and mlx-lm, as DeciLMForCausalLM"

    def converted(self, model: ExportedModel, options: TargetOptions) -> tuple[Converted, tuple[str, ...]]:
        _refuse(model)
        blocks, notes = _blocks(model)
        biased = {kind: _has_bias(model, paths) for kind, paths in (("attn", ATTENTION), ("mlp", MLP))}
        made: list[Made] = []
        layers = model.shape.anatomy.in_model(model.shape.anatomy.layers)
        for number, block in enumerate(blocks):
            made += _layer(model, f"{layers}.{block.source}", f"{layers}.{number}", block, biased)
        gone = {name for name in model.checkpoint.tensors if name.startswith(f"{layers}.")}
        for name in (name for name in (*model.packed, *model.stacked) if name not in model.linears):
            gone |= model.tensors_of(name)
            made.append(unpacked(model, name, model.dtype))
        if model.packed or model.stacked:
            notes.append(f"Codes are unpacked to {_shown(model.dtype)}, because {self.name} holds none.")
        kept = [name for name in model.checkpoint.tensors if name not in gone]
        config = _config(model, blocks, biased)
        return Converted(model.checkpoint, config, kept, made), (*notes, *rounding_notes(model))

    def write(
        self,
        model: ExportedModel,
        path: Path,
        options: TargetOptions,
        recipe: dict[str, Any],
        progress: Progress,
    ) -> dict[str, str]:
        progress("writing the model", 0.0)
        found, _ = self.converted(model, options)
        path.mkdir(parents=True)
        copy_companions(model.source.folder, path)
        write_config(found.config, path)
        return write_weights(found, path)

    def verify(self, model: ExportedModel, path: Path, options: TargetOptions, device: str) -> Verification:
        probe = probe_of(model.checkpoint)
        with using(REFERENCE):
            before = streamed_logits(model.checkpoint, probe, device)
            read = streamed_logits(read_back(path, model.checkpoint.config), probe, device)
        tokens = probe.tokens.numel()
        check_same(before, read, "compress-model", HALF_PRECISION)
        if reason := obstacle(model.shape, device, MLX):
            found = compared(before, read, "compress-model", tokens)
            return found.model_copy(update={"runtime": in_words(MLX), "not_tried": reason})
        loaded = promised_logits(path, probe.tokens, MLX)
        check_same(read, loaded, in_words(MLX), allowed_for(MLX))
        return compared(before, loaded, in_words(MLX), tokens)


def _refuse(model: ExportedModel) -> None:
    """Refuse (BadInput) an architecture that block_configs do not describe."""
    config, anatomy, sizes = model.shape.pretrained_config, model.shape.anatomy, model.shape.sizes
    instead = "export it as huggingface, which brings modelling code for layers that differ"
    if anatomy.model_type not in MODEL_TYPES:
        raise BadInput(
            f"Nemotron-NAS describes models built like Llama ({', '.join(MODEL_TYPES)}), and this one is "
            f"{anatomy.model_type}; {instead}."
        )
    if sizes.head_dim * sizes.num_attention_heads != sizes.hidden_size:
        raise BadInput(
            f"Nemotron-NAS takes hidden_size / num_attention_heads for the width of a head, which is "
            f"{sizes.hidden_size / sizes.num_attention_heads:g} here instead of {sizes.head_dim}; {instead}."
        )
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windows and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        raise BadInput(f"The layers of this model attend to a sliding window; {instead}.")


def _blocks(model: ExportedModel) -> tuple[list[Block], list[str]]:
    """The layers of the export, and sentences about what was filled up."""
    heads, blocks, notes = model.shape.sizes.num_attention_heads, list[Block](), dict[str, None]()
    for index, shape in enumerate(layer_shapes(model.shape.pretrained_config)):
        groups, width = 0, ceil(shape.intermediate_size / STEP) * STEP
        if shape.num_attention_heads:
            groups = heads * shape.num_key_value_heads // shape.num_attention_heads
        if not groups and not width:
            continue
        if not groups and not blocks:
            groups = 1
            notes["The first layer gets an attention block of zeros, because vLLM needs one there."] = None
        elif groups and not width:
            width = STEP
            notes["Layers without an MLP get one of zeros, because llama.cpp would drop their attention."] = (
                None
            )
        if groups and shape.num_attention_heads not in (0, heads):
            notes["Pruned heads are filled up with zeros, because every layer has all query heads."] = None
        if width != shape.intermediate_size and shape.intermediate_size:
            notes[f"MLP widths are filled up with zeros to multiples of {STEP}."] = None
        blocks.append(Block(index, shape, groups, width))
    return blocks, list(notes)


def _has_bias(model: ExportedModel, paths: tuple[str, ...]) -> bool:
    return any(
        name.rpartition(".")[2] in paths and f"{name}.bias" in model.checkpoint for name in model.linears
    )


def _layer(
    model: ExportedModel, source: str, target: str, block: Block, biased: Mapping[str, bool]
) -> list[Made]:
    """The tensors of one layer, of which those that are not there are zeros (norms: ones)."""
    sizes, found = model.shape.sizes, list[Made]()
    width, queries = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    keys = block.groups * sizes.head_dim
    shapes: dict[str, tuple[int, int]] = {}
    if block.groups:
        shapes |= {"q_proj": (queries, width), "k_proj": (keys, width)}
        shapes |= {"v_proj": (keys, width), "o_proj": (width, queries)}
        found.append(_norm(model, f"{source}.input_layernorm", f"{target}.input_layernorm"))
    if block.width:
        shapes |= dict.fromkeys(("gate_proj", "up_proj"), (block.width, width))
        shapes["down_proj"] = (width, block.width)
        found.append(_norm(model, f"{source}.post_attention_layernorm", f"{target}.post_attention_layernorm"))
    for leaf, shape in shapes.items():
        kind = "attn" if leaf in ATTENTION else "mlp"
        path = f"{'self_attn' if kind == 'attn' else 'mlp'}.{leaf}"
        found.append(_linear(model, f"{source}.{path}", f"{target}.{path}", shape, biased[kind]))
    return found


def _linear(model: ExportedModel, source: str, target: str, shape: tuple[int, int], biased: bool) -> Made:
    infos = {f"{target}.weight": TensorInfo(DTYPE_NAMES[model.dtype], shape)}
    if biased:
        infos[f"{target}.bias"] = TensorInfo(DTYPE_NAMES[model.dtype], shape[:1])

    def make() -> dict[str, torch.Tensor]:
        weight, bias = torch.zeros(shape, dtype=model.dtype), torch.zeros(shape[0], dtype=model.dtype)
        if source in model.packed or source in model.stacked:
            there = model.dense(source)
        elif f"{source}.weight" in model.checkpoint:
            there = model.checkpoint.read(f"{source}.weight")
        else:
            there = weight[:0, :0]
        weight[: there.shape[0], : there.shape[1]] = there.to(model.dtype)
        if f"{source}.bias" in model.checkpoint:
            given = model.checkpoint.read(f"{source}.bias")
            bias[: len(given)] = given.to(model.dtype)
        return {f"{target}.weight": weight} | ({f"{target}.bias": bias} if biased else {})

    return Made(infos, make)


def _norm(model: ExportedModel, source: str, target: str) -> Made:
    info = TensorInfo(DTYPE_NAMES[model.dtype], (model.shape.sizes.hidden_size,))

    def make() -> dict[str, torch.Tensor]:
        if f"{source}.weight" in model.checkpoint:
            return {f"{target}.weight": model.checkpoint.read(f"{source}.weight").to(model.dtype)}
        return {f"{target}.weight": torch.ones(info.shape, dtype=model.dtype)}

    return Made({f"{target}.weight": info}, make)


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(model: ExportedModel, blocks: list[Block], biased: Mapping[str, bool]) -> dict[str, Any]:
    """config.json with block_configs."""
    sizes = model.shape.sizes
    found = {
        key: value
        for key, value in with_rope(model.checkpoint.config).items()
        if key not in NOT_KEPT and key not in ("layer_types", "num_key_value_heads", "intermediate_size")
    }
    found |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "num_hidden_layers": len(blocks),
        "attention_bias": biased["attn"],
        "mlp_bias": biased["mlp"],
        "dtype": _shown(model.dtype),
        "block_configs": [_entry(block, sizes) for block in blocks],
    }
    return found


def _entry(block: Block, sizes: Any) -> dict[str, Any]:
    attention = {"n_heads_in_group": sizes.num_attention_heads // block.groups if block.groups else None}
    ffn = {"ffn_mult": 3 * block.width / (2 * sizes.hidden_size) if block.width else None}
    return {
        "attention": {
            **attention,
            "no_op": not block.groups,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {**ffn, "no_op": not block.width, "replace_with_linear": False, "sparsify": None},
    }


def read_back(folder: Path, like: Mapping[str, Any]) -> Checkpoint:
    """The export as this package reads it: a model whose layers differ, by what block_configs say.

    Args:
        folder: of the export.
        like: config.json of the model that was exported, for what block_configs do not say.
    """
    written = Checkpoint.open(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {key: value for key, value in like.items() if key not in NOT_KEPT and key != "layer_types"}
    values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    values |= {key: config[key] for key in ("num_hidden_layers", "attention_bias", "mlp_bias")}
    plain = config_of(Checkpoint(folder, values, {}, {}))
    biases = [f"self_attn.{leaf}" for leaf in ATTENTION] if config["attention_bias"] else []
    biases += [f"mlp.{leaf}" for leaf in MLP] if config["mlp_bias"] else []
    layers = []
    for entry in config["block_configs"]:
        attention, ffn = entry["attention"], entry["ffn"]
        heads = 0 if attention["no_op"] else config["num_attention_heads"]
        width = 0 if ffn["no_op"] else int(2 * round(ffn["ffn_mult"], 6) * config["hidden_size"] / 3)
        layers.append(
            {
                "num_attention_heads": heads,
                "num_key_value_heads": heads // attention["n_heads_in_group"] if heads else 0,
                "intermediate_size": -(-width // STEP) * STEP,
                "biases": biases,
            }
        )
    section = {"parts": pruned_parts(anatomy_of(plain), plain), "layers": layers}
    return Checkpoint(folder, mark_pruned(values, plain, section), written.tensors, written.sources)
