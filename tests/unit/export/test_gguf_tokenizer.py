"""Tokenizers of GGUF files: what is read of a file gives the ids that the model's own and llama.cpp give."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compress.cli import cli
from compress.engine.tokenizer import load_tokenizer
from compress.errors import BadInput
from compress.sources.find import find_model
from compress.storage.gguf.tokenizer import SPLITS, WHOLE_WORDS, splits_of
from compress.storage.lineage import record_of

pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = (
    "It was the best of times,  it was the worst of times",
    " 1234 it's 12345678 I'LL\n\n\tx<s>the</s> end",
    "$a+b=c^d|e, 'tis... ~x~ CamelCase //path/to\r\n\r\n  x",
    "\u00fcn\u00ef \u65e5\u672c \u0663\u0664\u0665 \u00bd x\u00b2",
    "",
)


@pytest.fixture
def exported(tmp_path: Path, shared_decoder: Callable[..., Path]) -> Callable[[Tokenizer], tuple[Path, Path]]:
    """The folder of a model with that tokenizer, and its GGUF file."""

    def make(core: Tokenizer) -> tuple[Path, Path]:
        folder, file = tmp_path / "model", tmp_path / "model.gguf"
        shutil.copytree(shared_decoder(vocab_size=600), folder)
        hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(
            folder
        )
        arguments = ["export", str(folder), "--format", "gguf", "-o", str(file), "--no-verify", "-q"]
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
        return folder, file

    return make


def byte_level(rules: tuple[str, ...], around: str = "$A", whole_words: bool = False) -> Tokenizer:
    """With merges that no rule for splitting text lets happen everywhere."""
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=590, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(TEXTS * 9, trainer)
    parts: list[Any] = []
    for rule in rules:
        if rule == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif rule != "byte-level":
            parts.append(pre_tokenizers.Split(Regex(rule), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="byte-level" in rules))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    ends = [(name, core.token_to_id(name)) for name in special]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ends)
    return core


def sentencepiece() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{at:02X}>" for at in range(256))]
    core.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=590, special_tokens=symbols))
    values = json.loads(core.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(values))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def ids(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


def ids_of_llama_cpp(file: Path) -> list[list[int]]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 64, 1
    settings.n_gpu_layers, settings.port, settings.warmup, settings.fit_params = 0, 0, False, False
    server, found = xllamacpp.Server(settings), []
    for text in TEXTS:
        asked = json.dumps({"content": text, "add_special": True}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(
                f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
            ),
            timeout=60,
        ) as answer:
            found.append(json.load(answer)["tokens"])
    return found


CASES = {
    **{name: (splits_of(name), "<s> $A", name in WHOLE_WORDS) for name in SPLITS.values()},
    "both ends": (splits_of("gpt-2"), "<s> $A </s>", False),
    "no end": (splits_of("llama-bpe"), "$A", True),
}


@pytest.mark.parametrize("name", [*CASES, "sentencepiece"])
def test_a_tokenizer_comes_back(name: str, exported: Callable[[Tokenizer], tuple[Path, Path]]) -> None:
    folder, file = exported(sentencepiece() if name == "sentencepiece" else byte_level(*CASES[name]))
    assert ids(find_model(str(file)).folder) == ids(folder)


@pytest.mark.loaders
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("name", ["default", "llama-bpe", "both ends", "sentencepiece"])
def test_ids_are_those_of_llama_cpp(name: str, exported: Callable[[Tokenizer], tuple[Path, Path]]) -> None:
    """The file asks for the default way where llama.cpp has no name for how text is split."""
    if name == "sentencepiece":
        core = sentencepiece()
    else:
        core = byte_level(*CASES.get(name, (("[aeiou]",), "$A", False)))
    _, file = exported(core)
    assert ids(find_model(str(file)).folder) == ids_of_llama_cpp(file)


def test_a_way_to_split_text_that_is_not_known_is_refused(
    exported: Callable[[Tokenizer], tuple[Path, Path]],
) -> None:
    _, file = exported(byte_level(splits_of("qwen2")))
    file.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0qwen2", b"\x05\0\0\0\0\0\0\0qwen9"))
    record_of(file).unlink()  # it is of the file as it was
    with pytest.raises(BadInput, match="splits text as 'qwen9', which is not known here"):
        find_model(str(file))
