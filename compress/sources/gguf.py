"""A GGUF file as a model folder, which lies in the cache: dense weights in float32, config and tokenizer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from compress.errors import BadInput
from compress.storage.gguf.architectures import tensor_names
from compress.storage.gguf.checkpoint import GGUFCheckpoint
from compress.storage.gguf.configs import config_of_gguf
from compress.storage.gguf.reader import GGUFFile
from compress.storage.gguf.tokenizer import (
    CONTROL,
    SAME_SPLIT,
    SPLITS,
    USER_DEFINED,
    WHOLE_WORDS,
    splits_of,
)
from compress.storage.lineage import of_another_file, read_lineage
from compress.storage.writer import write_weights
from compress.system.cache import cached
from compress.system.files import file_sha256

log = logging.getLogger(__name__)

LOADS_WITH = "llama.cpp and the programs built on it"
ABOUT = "gguf.json"
VERSION = 2
"""The version of what is written into the cache; another number makes all files be converted again."""


def gguf_folder(path: Path) -> Path:
    """The model folder of a GGUF file, converted once.

    Raises:
        BadInput: the file is damaged, holds no model that can be read, or its record is of another file.
    """
    checkpoint = gguf_checkpoint(path)
    lineage, digest = read_lineage(path), file_sha256(path)
    if lineage is not None and digest not in lineage.result.files.values():
        raise of_another_file(path)
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
    checkpoint = GGUFCheckpoint(file, model.config, config, shapes)
    read = {*tensor_names(model.config, list(shapes)).values()}
    if strange := [name for name in file.tensors if name not in read and not name.startswith("rope_")]:
        raise BadInput(
            f"'{path}' holds '{strange[0][:80]}', which no {model.config.model_type} model of transformers "
            "has, so it would compute something else here; use the model's own folder."
        )
    return checkpoint


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
    if kind not in ("gpt2", "llama"):
        raise BadInput(f"'{file.path}' has a tokenizer of the kind '{str(kind)[:40]}', which cannot be read.")
    try:
        made = (_byte_level if kind == "gpt2" else _sentencepiece)(file, tokens)
    except BadInput:
        raise
    except Exception as error:  # of many types
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"The tokenizer of '{file.path}' cannot be read ({reason}).") from None
    template = data.get("tokenizer.chat_template")
    if isinstance(template, str):
        made.chat_template = template
    made.save_pretrained(folder)


def _byte_level(file: GGUFFile, tokens: list[str]) -> Any:
    """A BPE tokenizer of bytes from tokens and merges, which gives the ids that llama.cpp gives.

    Raises:
        BadInput: it is not known here how llama.cpp splits text for it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    data = file.metadata
    name = data.get("tokenizer.ggml.pre", "default")
    name = SAME_SPLIT.get(name, name) if isinstance(name, str) else ""
    if (rules := splits_of(name)) is None:
        raise BadInput(
            f"'{file.path}' splits text as '{str(data['tokenizer.ggml.pre'])[:40]}', which is not known here "
            f"(there are default, {', '.join([*SPLITS.values(), *SAME_SPLIT])}); give the model's own folder."
        )
    texts = [merge for merge in data.get("tokenizer.ggml.merges") or [] if merge.count(" ") == 1]
    pairs = [(first, second) for first, _, second in (text.partition(" ") for text in texts)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    core = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=name in WHOLE_WORDS))
    core.pre_tokenizer, core.decoder = _splitting(rules), decoders.ByteLevel()
    for token, kind in zip(tokens, data.get("tokenizer.ggml.token_type") or [], strict=False):
        if kind == CONTROL:
            core.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            core.add_tokens([AddedToken(token, normalized=False)])
    special = _special(file, tokens)
    begins = data.get("tokenizer.ggml.add_bos_token", name in WHOLE_WORDS)
    first = special.get("bos_token") if begins else None
    last = special.get("eos_token") if data.get("tokenizer.ggml.add_eos_token", False) else None
    if first or last:
        core.post_processor = _around(vocabulary, first, last)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def _splitting(rules: tuple[str, ...]) -> Any:
    """What splits text by the rules of `splits_of`, and makes it bytes."""
    from tokenizers import Regex, pre_tokenizers

    own = {"digits": pre_tokenizers.Digits(individual_digits=True)}
    parts = [
        own.get(rule) or pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in rules
        if rule != "byte-level"
    ]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="byte-level" in rules)
    return pre_tokenizers.Sequence([*parts, whole])


def _around(vocabulary: dict[str, int], first: str | None, last: str | None) -> Any:
    """What puts tokens before and behind each text."""
    from tokenizers import processors

    one, other = ([part for part in (first, text, last) if part] for text in ("$A:0", "$B:1"))
    return processors.TemplateProcessing(
        single=one,
        pair=one + other,
        special_tokens=[(token, vocabulary[token]) for token in {first, last} if token],
    )


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Any:
    """A tokenizer with scores, which transformers makes into one with merges."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(
        str(file.path.parent), gguf_file=file.path.name, trust_remote_code=False
    )
    # transformers gives a space to the first word alone, and llama.cpp to all text behind a special token.
    prefixed = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [*([normalizers.Prepend("\u2581")] if prefixed else []), normalizers.Replace(" ", "\u2581")]
    core = read.backend_tokenizer
    core.normalizer, core.pre_tokenizer = normalizers.Sequence(steps), None
    return PreTrainedTokenizerFast(tokenizer_object=core, **_special(file, tokens))


def _special(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """The special tokens, by their roles."""
    found = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[f"{role}_token"] = tokens[number]
    return found


def bytes_of(folder: Path) -> int | None:
    """The bytes of the weights in the GGUF file that a folder was made of; None if it was made otherwise."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["weight_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(found)
