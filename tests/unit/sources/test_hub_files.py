"""What is downloaded of a model on the hub, with the matching of the hub's own client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from compress.errors import BadInput
from compress.sources.find import find_model

COMMIT = "0123456789"

SETTINGS = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    *("special_tokens_map.json", "spiece.model", "qwen.tiktoken", "tekken.json", "tokenizer.model.v3"),
    *("merges.txt", "source.spm", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
    *("preprocessor_config.json", "LICENSE", "Notice.txt", "USE_POLICY.md", "README.md", "compression.json"),
}
NEVER = {
    *("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "modeling_x.py"),
    *("onnx/model.onnx", "onnx/config.json", "original/params.json", "checkpoint-5/model.safetensors"),
    *("custom_generate/generate.py", "model.Q4.gguf", "tf_model.h5", "optimizer.pt", "runs/events.out.1"),
    *("adapter_model.safetensors", "tokenizer.py", "unnamed.safetensors", "3_Unnamed/model.safetensors"),
    "1_Pooling/pytorch_model.bin",
}
SHARDS = {"model-00001-of-00002.safetensors", "weights/model-00002-of-00002.safetensors"}
MODULES = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a repository."""
    repository, here = tmp_path / "repository", tmp_path / "snapshots" / COMMIT

    def download(name: str, *, revision: str | None, **patterns: list[str]) -> str:
        assert (name, revision) in (("org/name", None), ("org/name", COMMIT))  # one commit for all files
        there = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for file in filter_repo_objects(there, **patterns):
            (here / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, here / file)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return repository


def write(hub: Path, *names: str) -> None:
    for name in names:
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).write_text("{}")


def downloaded() -> set[str]:
    source = find_model("org/name")
    assert source.revision == COMMIT
    return {str(file.relative_to(source.folder)) for file in source.folder.rglob("*") if file.is_file()}


def test_only_what_is_needed_is_downloaded(hub: Path):
    index = {"weight_map": {str(number): name for number, name in enumerate(SHARDS)}}
    write(hub, *SETTINGS, *NEVER, *SHARDS, *MODULES)
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    assert downloaded() == SETTINGS | SHARDS | MODULES | {"model.safetensors.index.json"}


def test_without_an_index_there_is_one_file_of_weights(hub: Path):
    write(hub, "model.safetensors", "config.json", *NEVER)
    assert downloaded() == {"model.safetensors", "config.json"}


def test_an_adapter_of_ours_comes_with_its_model(hub: Path):
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    write(hub, "model.safetensors", "config.json", *adapter)
    assert downloaded() == {"model.safetensors", "config.json", *adapter}


def test_an_index_or_modules_that_leave_the_folder_are_refused_before_more_is_downloaded(hub: Path):
    write(hub, "config.json")
    (hub / "modules.json").write_text(json.dumps([{"path": "/etc"}]))
    with pytest.raises(BadInput, match="outside of the model folder"):
        find_model("org/name")
