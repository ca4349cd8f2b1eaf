#!/usr/bin/env python
"""GGUF files of Llama models by llama.cpp's own quantizer, and back, for the benchmarks that compare with it.

As a program, it quantizes one file; its libraries have threads of their own, so a benchmark does this in a
process of its own.

    python scripts/benchmarks/llama_files.py F16.gguf Q4_0.gguf Q4_0 [FOLDER of llama-cpp-python]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def gguf_file(dense: Path, folder: Path, kind: str, packages: Path | None) -> Path:
    """The GGUF file of a dense folder in one of llama.cpp's types, such as Q4_0; made once in ``folder``."""
    file, wide = folder / f"{dense.name}.{kind}.gguf", folder / f"{dense.name}.F16.gguf"
    if not file.exists():
        write_gguf(dense, wide)
        quantize = [sys.executable, __file__, wide, file, kind, *([packages] if packages else [])]
        subprocess.run(list(map(str, quantize)), check=True, stdout=sys.stderr)
        wide.unlink()
    return file


def quantize(wide: Path, file: Path, kind: str) -> None:
    """Let llama.cpp round a file in float16, without an importance matrix."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    partial = file.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(wide).encode(), str(partial).encode(), parameters):
        raise RuntimeError(f"llama.cpp cannot make {file}")
    partial.replace(file)


def write_gguf(dense: Path, file: Path) -> None:
    """Write a Llama folder as a GGUF file in float16 that has no vocabulary: it is given token ids."""
    import torch
    from gguf import GGUFWriter

    from compress.storage.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(dense)
    config = checkpoint.config
    heads, width = config["num_attention_heads"], config["hidden_size"]
    few = config["num_key_value_heads"]
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(few)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(rope_base(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)  # mostly float16
    for name in checkpoint.tensors:
        if (theirs := gguf_name(name)) is None:
            continue
        weight = checkpoint.read(name).float()
        for projection, count in (("q_proj", heads), ("k_proj", few)):
            if projection in name:  # llama.cpp turns neighbours, where transformers turns halves
                weight = weight.view(count, 2, -1, width).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(theirs, (weight if weight.ndim == 1 else weight.to(torch.float16)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_base(config: dict[str, Any]) -> float:
    """The base of the rotary embedding, which transformers 5 stores with its other settings."""
    return config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta") or 10_000.0


THEIRS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str | None:
    """The name of a Llama's tensor in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module in AROUND:
        return f"{AROUND[module]}.{kind}"
    _, layers, number, *path = module.split(".", 3)
    return f"blk.{number}.{THEIRS[path[0]]}.{kind}" if layers == "layers" else None


def dequantized(file: Path, dense: Path, output: Path) -> Path:
    """A GGUF file as a folder in float32, with the tokenizer of the dense folder; made once."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    from compress.storage.checkpoint import Checkpoint

    if (output / "config.json").exists():  # which is written last
        return output
    checkpoint = Checkpoint.open(dense)
    config = checkpoint.config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    output.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name in checkpoint.tensors:
        if (found := gguf_name(name)) is None:
            continue
        tensor = theirs[found]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for projection, count in heads.items():
            if projection in name:
                weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight.contiguous()
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    for kept in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(dense / kept, output / kept)
    (output / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return output


if __name__ == "__main__":
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("wide", type=Path, help="the file in float16")
    options.add_argument("file", type=Path, help="the result")
    options.add_argument("kind", help="such as Q4_0")
    options.add_argument("packages", type=Path, nargs="?", help="where pip --target put llama-cpp-python")
    arguments = options.parse_args()
    if arguments.packages:
        sys.path.append(str(arguments.packages))
    quantize(arguments.wide, arguments.file, arguments.kind)
