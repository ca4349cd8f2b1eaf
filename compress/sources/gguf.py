"""A GGUF file as a model folder, which lies in the cache: dense weights in float32, config and tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.gguf.checkpoint import GGUFCheckpoint
from compress.storage.gguf.configs import config_of_gguf
from compress.storage.gguf.reader import GGUFFile
from compress.storage.gguf.tokenizer import CONTROL, SPLITS, USER_DEFINED
from compress.storage.writer import write_weights
from compress.system.cache import cached
from compress.system.files import file_sha256

log = logging.getLogger(__name__)

LOADS_WITH = "llama.cpp and the programs built on it"
ABOUT = "gguf.json"
VERSION = 1
"""The version of what is written into the cache; another number makes all files be converted again."""


def gguf_folder(path: Path) -> Path:
    """The model folder of a GGUF file, converted once.

    Raises:
        BadInput: the file is damaged, or holds no model that can be read.
    """
    checkpoint = gguf_checkpoint(path)
    digest = file_sha256(path)
    folder = cached(
        f"gguf/{digest[:32]}-{VERSION}", lambda fresh: _convert(checkpoint, digest, fresh), about=ABOUT
    )
    kinds = {there.kind for there in checkpoint.file.tensors.values()}
    few = sorted(kind.name for kind in kinds if kind.dtype is None)
    if few:
        log.warning(
            "'%s' was quantized before (%s); what is made of it starts from its rounded weights.",
            *(path, ", ".join(few)),
        )
    return folder


def gguf_checkpoint(path: Path) -> GGUFCheckpoint:
    """The weights of a GGUF file under the names of transformers; no weight has been read yet.

    Raises:
        BadInput: the file is damaged, or holds no model that can be read.
    """
    file = GGUFFile.open(path)
    config = config_of_gguf(file)
    model = _skeleton(file, config)
    tied = config["tie_word_embeddings"]
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not (tied and parameter is model.get_output_embeddings().weight and name != _table(model))
    }
    return GGUFCheckpoint(file, model.config, config, shapes)


def _convert(checkpoint: GGUFCheckpoint, digest: str, folder: Path) -> dict[str, Any]:
    file = checkpoint.file
    (folder / "config.json").write_text(json.dumps(checkpoint.config, indent=2), encoding="utf-8")
    write_weights(checkpoint, folder)
    _write_tokenizer(file, folder)
    nbytes = sum(there.nbytes for there in file.tensors.values())
    return {
        "file": file.path.name,
        "sha256": digest,
        "bytes": file.path.stat().st_size,
        "weight_bytes": nbytes,
    }


def _table(model: Any) -> str:
    """Full name of the weight of the token embedding."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _skeleton(file: GGUFFile, config: dict[str, Any]) -> Any:
    """The model without memory for its weights.

    Raises:
        BadInput: transformers cannot build it.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    if layers > len(file.tensors):
        raise BadInput(f"'{file.path}' claims {layers:,} layers and has {len(file.tensors):,} tensors.")
    try:
        wanted = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(wanted, trust_remote_code=False)
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"'{file.path}' describes a model that cannot be built ({reason}).") from None


def _write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write the tokenizer of the file, if it has one that can be made again."""
    kind, data = file.metadata.get("tokenizer.ggml.model"), file.metadata
    tokens = data.get("tokenizer.ggml.tokens")
    if kind == "no_vocab" or not isinstance(tokens, list):
        log.warning("'%s' has no tokenizer, so it can only be given token ids.", file.path)
        return
    if kind == "gpt2":
        made = _byte_level(file, tokens)
    elif kind == "llama":
        made = _sentencepiece(file)
    else:
        raise BadInput(f"'{file.path}' has a tokenizer of the kind '{str(kind)[:40]}', which cannot be read.")
    template = data.get("tokenizer.chat_template")
    if isinstance(template, str):
        made.chat_template = template
    made.save_pretrained(folder)


def _byte_level(file: GGUFFile, tokens: list[Any]) -> Any:
    """A BPE tokenizer of bytes from tokens and merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = file.metadata
    kinds, merges = data.get("tokenizer.ggml.token_type") or [], data.get("tokenizer.ggml.merges") or []
    texts = [merge for merge in merges if isinstance(merge, str) and merge.count(" ") == 1]
    pairs = [(first, second) for first, _, second in (text.partition(" ") for text in texts)]
    vocabulary = {str(token): number for number, token in enumerate(tokens)}
    pairs = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    core = Tokenizer(models.BPE(vocabulary, pairs))
    name = data.get("tokenizer.ggml.pre", "default")
    split = next((rule for rule, theirs in SPLITS.items() if theirs == name), "byte-level")
    parts: list[Any] = []
    if split.startswith("digits"):
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if "byte-level" not in split:
        parts.append(pre_tokenizers.Split(Regex(split), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="byte-level" in split))
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            core.add_tokens([AddedToken(token, normalized=False)])
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = data.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and number < len(tokens):
            special[f"{role}_token"] = tokens[number]
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _sentencepiece(file: GGUFFile) -> Any:
    """A tokenizer with scores, which transformers makes into one with merges."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, trust_remote_code=False
        )
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"The tokenizer of '{file.path}' cannot be read ({reason}).") from None


def bytes_of(folder: Path) -> int | None:
    """The bytes of the weights in the GGUF file that a folder was made of; None if it was made otherwise."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["weight_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(found)
