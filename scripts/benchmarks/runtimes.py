#!/usr/bin/env python
"""What loads what: every kind of artefact in every export format, tried with the program that it is for.

    python scripts/benchmarks/runtimes.py                    a tiny random model, minutes
    python scripts/benchmarks/runtimes.py --model demo       another model

Each kind of artefact is made from the model and exported to every format. The runtimes that are installed
load the result; logits are compared with those of the artefact itself, and so is greedy text: the artefact's
own continuation is given to the runtime, which would choose the same token at every place if it wrote the
same text. A refusal is kept with its reason. Formats whose runtimes lie in an environment of their own
(optimum and gptqmodel) are tried by a second call with that environment's Python and ``--formats gptq awq``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Sheet, parser, slug

import compress
from compress.errors import CompressError
from compress.export.base import Target
from compress.export.registry import TARGETS, find_target
from compress.export.run import export, open_for_export
from compress.pipeline.promise import promised_logits
from compress.storage.formats.loaders import MLX

PROMPT, CONTINUED = 16, 16
"""Tokens that are given, and tokens that follow greedily."""

ROUNDED: dict[str, Any] = {"method": "rtn", "group_size": 32}
QAT: dict[str, Any] = {"method": "llm-qat", "steps": 2, "batch_size": 1, "kv_scale": "head"}
KINDS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "4 bits": [{**ROUNDED, "bits": 4}],
    "3 bits, zero points, table 8 bits": [{**ROUNDED, "bits": 3, "symmetric": False, "embedding_bits": 8}],
    "4 and 6 bits": [{**ROUNDED, "bits": 4, "set": {"*down_proj": 6}}],
    "8 bits, whole rows": [{"method": "rtn", "bits": 8, "group_size": "channel"}],
    "W4A8 KV8": [{**QAT, "bits": 4, "activation_bits": 8, "kv_bits": 8, "kv_position": "after-rope"}],
    "W8A8": [{**QAT, "bits": 8, "activation_bits": 8, "kv_bits": 16}],
    "FP8": [{"method": "float", "type": "fp8"}],
    "MXFP4": [{"method": "float", "type": "mxfp4"}],
    "NVFP4": [{"method": "float", "type": "nvfp4"}],
    "NF4": [{"method": "nf4"}],
    "LLM.int8()": [{"method": "llm-int8"}],
    "3 bits with an adapter": [{"method": "apiq", "bits": 3, "group_size": 32, "rank": 4, "epochs": 1}],
    "bitstack": [{"method": "bitstack", "blocks": 4}],
    "heads and neurons pruned": [{"method": "flap", "ratio": 0.3}],
    "blocks removed": [{"method": "blockpruner", "blocks": 2}],
    "layers replaced, 4 bits": [{"method": "replaceme", "layers": 1}, {**ROUNDED, "bits": 4}],
}


def tiny_model(folder: Path) -> Path:
    """A random Llama with a tokenizer of bytes, large enough for every format's groups."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sizes = {"vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 512, "max_position_embeddings": 256}
    config = hf.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.to(torch.bfloat16).save_pretrained(folder)
    symbols = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return folder


def artefact(folder: Path, model: str, kind: str, steps: list[dict[str, Any]]) -> Path:
    """The folder of one kind of artefact, made once."""
    output = folder / slug(kind)
    if not output.exists():
        text = {"source": "bundled", "nsamples": 16, "seqlen": 64}
        compress.run({"model": model, "calibration": text, "steps": steps}, output)
    return output


@torch.no_grad()
def continued(folder: Path) -> torch.Tensor:
    """A prompt and what the artefact itself writes greedily: token ids [1, PROMPT + CONTINUED]."""
    model = compress.load(folder, dtype=torch.float32, kernel="reference")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, model.config.vocab_size, (1, PROMPT), generator=generator)
    for _ in range(CONTINUED):
        chosen = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, chosen), dim=1)
    return tokens


def same_text(target: Target[Any], output: Path, tokens: torch.Tensor) -> bool:
    """Whether the runtime continues the prompt greedily with the same tokens."""
    if target.name == "onnx":
        from compress.export.onnx import GRAPH, onnx_logits

        logits = onnx_logits(output / GRAPH, tokens)
    elif target.name == "gguf":
        from compress.export.gguf import llama_log_probabilities

        logits = llama_log_probabilities(output, tokens)
    else:
        logits = promised_logits(output, tokens, MLX if target.name == "nemotron-nas" else None)
    chosen = logits[:, PROMPT - 1 : -1].argmax(-1)
    return bool((chosen == tokens[:, PROMPT:]).all())


def tried(source: Path, target: Target[Any], output: Path) -> dict[str, Any]:
    """The record of one artefact in one format."""
    try:
        lineage = export(open_for_export(str(source)), target, target.Options(), output)
    except CompressError as error:
        return {"facts": {"loads": f"no: {error}".replace(f"{source.parent}/", "")}}
    assert lineage.exported is not None
    found = lineage.exported.verification
    figures: dict[str, Any] = {"bytes": {"value": lineage.result.bytes, "unit": "bytes"}}
    if found.kl is not None:
        figures["kl"] = {"value": found.kl}
    if found.agreement is not None:
        figures["agreement"] = {"value": found.agreement, "unit": "fraction"}
    if found.not_tried is not None:
        return {"figures": figures, "facts": {"loads": f"not tried: {found.not_tried}"}}
    text = "same" if same_text(target, output, continued(source)) else "differs"
    return {"figures": figures, "facts": {"loads": f"yes: {found.runtime}", "text": text}}


def main() -> None:
    arguments = parser(__doc__, "runtimes")
    arguments.add_argument("--model", help="the model to make artefacts of; a tiny random one by default")
    formats = [name for name in TARGETS if name != "imatrix"]  # which no program runs
    arguments.add_argument("--formats", nargs="+", default=formats, choices=formats)
    given = arguments.parse_args()
    sheet = Sheet(given, "runtimes")
    model = given.model or str(sheet.folder / "model")
    if given.model is None and not Path(model).exists():
        tiny_model(Path(model))
    for kind, steps in KINDS.items():
        source = artefact(sheet.folder, model, kind, steps)
        for name in given.formats:
            target = find_target(name)
            with tempfile.TemporaryDirectory(dir=sheet.folder) as work:
                output = Path(work) / f"model{target.suffix}"
                sheet.row(f"{kind}, as {name}", lambda: tried(source, target, output))  # noqa: B023
    sheet.show()


if __name__ == "__main__":
    main()
