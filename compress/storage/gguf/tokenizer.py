"""The tokenizer of a model folder as metadata of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What kind of token it is, as llama.cpp counts."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "byte-level": "gpt-2",
    "digits, byte-level": "smollm",
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""How text is split into words before it is encoded -> llama.cpp's name for it."""
SAME_SPLIT = {
    "deepseek-r1-qwen": "qwen2",
    "falcon3": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
}
"""Other names that llama.cpp has for the same."""
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Where llama.cpp takes a word that is a token as it is, without merges, and begins with BOS unless told."""
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def splits_of(name: str) -> tuple[str, ...] | None:
    """The rules, one after the other, by which llama.cpp splits text where a file asks for ``name``; None if
    it is not known here. A rule is a regular expression, ``digits`` or ``byte-level``."""
    if name == "default":
        return _DEFAULT
    rule = next((rule for rule, theirs in SPLITS.items() if theirs == name), None)
    return None if rule is None else tuple(rule.split(", ")) if "byte-level" in rule else (rule,)


@dataclass
class TokenizerMetadata:
    """What a GGUF file says of a tokenizer.

    Attributes:
        values: key -> value.
        notes: what the file cannot say, in sentences.
    """

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def tokenizer_metadata(folder: Path, vocab_size: int) -> TokenizerMetadata:
    """Read the tokenizer of a model folder; one without a tokenizer gives token ids only.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json.
        vocab_size: rows of the token embedding; the file gets that many tokens.

    Raises:
        BadInput: the tokenizer is not one that llama.cpp has, or has more tokens than the model.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        note = "The model has no tokenizer.json, so the file has no tokenizer and is given token ids."
        return TokenizerMetadata({"tokenizer.ggml.model": "no_vocab"}, (note,))
    whole, settings = _read(file), _read(folder / "tokenizer_config.json")
    try:
        return _metadata(whole, settings, folder, vocab_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file} is damaged ({type(error).__name__}: {error}).") from None


def _metadata(
    whole: dict[str, Any], settings: dict[str, Any], folder: Path, vocab_size: int
) -> TokenizerMetadata:
    model = whole.get("model") or {}
    if model.get("type") != "BPE":
        raise BadInput(
            f"The tokenizer is of the type {model.get('type')}; those of models that GGUF files hold here "
            "are BPE. Export the model with --format huggingface."
        )
    tokens, kinds = _tokens(model["vocab"], whole.get("added_tokens") or [], vocab_size)
    notes: tuple[str, ...] = ()
    if model.get("byte_fallback"):
        values = _sentencepiece(whole, model, tokens, kinds)
    else:
        split = SPLITS.get(how_it_splits(whole.get("pre_tokenizer")))
        if split is None:
            notes = (
                "llama.cpp is not known to split text as this tokenizer does; the file asks for its default, "
                "so some text may become other tokens there.",
            )
        values = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": split or "default",
            # llama.cpp wants at least one merge; one whose result is no token does nothing.
            "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]]
            or [f"{tokens[0]} {tokens[0]}"],
        }
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    values |= _special(whole, settings, folder, {token: number for number, token in enumerate(tokens)})
    if template := _template(folder, settings):
        values["tokenizer.chat_template"] = template
    return TokenizerMetadata(values, notes)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise BadInput(f"{file} is not JSON ({error}).") from None
    return found if isinstance(found, dict) else {}


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _tokens(
    vocabulary: dict[str, int], added: list[dict[str, Any]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """The token and its kind for every id."""
    tokens, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    names = [(text, number, NORMAL) for text, number in vocabulary.items()]
    names += [
        (item["content"], item["id"], CONTROL if item.get("special") else USER_DEFINED) for item in added
    ]
    for text, number, kind in names:
        if number >= vocab_size:
            if kind == CONTROL:
                continue  # such as a padding token that the model never sees
            raise BadInput(
                f"The tokenizer has a token {number}, and the model has {vocab_size} only: it is the "
                "tokenizer of another model."
            )
        tokens[number], kinds[number] = text, kind
    return tokens, kinds


def how_it_splits(pre_tokenizer: dict[str, Any] | None) -> str:
    """The rule by which text is split into words: a key of `SPLITS`, if llama.cpp knows it."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or ([pre_tokenizer] if pre_tokenizer else [])
    found = []
    for part in parts:
        kind = part.get("type")
        if kind == "ByteLevel" and part.get("use_regex", True):
            found.append("byte-level")
        elif kind == "Digits" and part.get("individual_digits"):
            found.append("digits")
        elif kind == "Split":
            found.append(str((part.get("pattern") or {}).get("Regex")))
        elif kind != "ByteLevel":
            found.append(f"unknown {kind}")
    return ", ".join(found)


def _sentencepiece(
    whole: dict[str, Any], model: dict[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """Scores of a tokenizer whose merges came from SentencePiece: what is merged first has the highest."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(model["merges"]):
        rank.setdefault("".join(_pair(merge)), number)
    for number, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
        elif token == model.get("unk_token"):
            kinds[number] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(rank.get(token, 0)) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_space(whole),
    }


def _adds_space(whole: dict[str, Any]) -> bool:
    """Whether text gets a space in front of it."""

    def parts(section: str, inner: str) -> list[dict[str, Any]]:
        found = whole.get(section) or {}
        return found.get(inner) or [found]

    prepended = any(part.get("type") == "Prepend" for part in parts("normalizer", "normalizers"))
    schemes = [
        part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        for part in parts("pre_tokenizer", "pretokenizers")
        if part.get("type") == "Metaspace"
    ]
    return prepended or any(scheme != "never" for scheme in schemes)


def _special(
    whole: dict[str, Any], settings: dict[str, Any], folder: Path, numbers: dict[str, int]
) -> dict[str, Any]:
    """The ids of special tokens, and which of them are put around text."""
    config = _read(folder / "config.json")
    found: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(token) if token else config.get(f"{role}_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        if isinstance(number, int) and 0 <= number < len(numbers):
            found[f"tokenizer.ggml.{key}_token_id"] = number
    first, last = _around(whole)
    for role, there in (("bos", first), ("eos", last)):
        number = found.get(f"tokenizer.ggml.{role}_token_id")
        found[f"tokenizer.ggml.add_{role}_token"] = number is not None and number == there
    return found


def _around(whole: dict[str, Any]) -> tuple[int | None, int | None]:
    """The ids that the post-processor puts before and after a single text."""
    processor = whole.get("post_processor") or {}
    for part in processor.get("processors") or [processor]:
        if part.get("type") != "TemplateProcessing":
            continue
        ids: list[Any] = [
            ((part.get("special_tokens") or {}).get(item["SpecialToken"]["id"]) or {}).get("ids", [None])[0]
            if "SpecialToken" in item
            else "text"
            for item in part.get("single", [])
        ]
        if "text" in ids:
            at = ids.index("text")
            return (ids[at - 1] if at else None), (ids[at + 1] if at + 1 < len(ids) else None)
    return None, None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None
