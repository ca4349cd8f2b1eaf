"""``save_pretrained`` of a loaded model writes the folder it came from, with the values the model has now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import compress
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from tests.unit.engine.conftest import ARTEFACTS

TOKENS = torch.randint(1, 257, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS)[0]


def assert_same_files(copy: Path, original: Path) -> None:
    """Config and tensors are equal bit for bit, so every program that loads one loads the other."""
    saved, before = Checkpoint.open(copy), Checkpoint.open(original)
    assert saved.config == before.config
    assert list(saved.tensors.items()) == list(before.tensors.items())
    assert all(torch.equal(saved.read(name), before.read(name)) for name in before.tensors)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_copy_is_the_original(name: str, artefact: Callable[..., Path], tmp_path: Path) -> None:
    folder, copy = artefact(name), tmp_path / "copy"
    model = compress.load(folder)
    model.save_pretrained(copy)
    assert_same_files(copy, folder)
    assert torch.equal(logits(compress.load(copy)), logits(model))
    code = [file.name for file in folder.glob("*.py")]
    assert [file.read_text() for file in map(copy.joinpath, code)] == [(folder / f).read_text() for f in code]
    assert (copy / "generation_config.json").exists()


@pytest.mark.parametrize(
    "architecture", ["OPTForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM"]
)
@pytest.mark.parametrize("name", ["packed-embedding", "nested", "blockpruner-int4"])
def test_biases_fused_linears_and_other_names(
    name: str, architecture: str, artefact: Callable[..., Path], tmp_path: Path
) -> None:
    folder = artefact(name, architecture)
    compress.load(folder).save_pretrained(tmp_path / "copy")
    assert_same_files(tmp_path / "copy", folder)


def test_a_sentence_encoder(
    tiny_encoder: Callable[..., Path], carry_out: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = carry_out("rtn", tiny_encoder("BertModel"), bits=4, group_size=16)
    compress.load(folder).save_pretrained(tmp_path / "copy")
    assert_same_files(tmp_path / "copy", folder)


def test_the_model_below_the_head_can_be_saved_alone(artefact: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(artefact("blockpruner"), dtype="float32")
    model.base_model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(compress.load(tmp_path / "copy")), logits(model.base_model))


@pytest.mark.parametrize("name", ["packed-embedding", "apiq", "nested", "blockpruner-int4"])
def test_the_packed_model_below_the_head_cannot(
    name: str, artefact: Callable[..., Path], tmp_path: Path
) -> None:
    model = compress.load(artefact(name), dtype="float32")
    with pytest.raises(BadInput, match="save the whole model"):
        model.base_model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["flap", "blockpruner"])
def test_transformers_loads_the_copy_of_a_pruned_model(
    name: str, artefact: Callable[..., Path], tmp_path: Path
) -> None:
    model = compress.load(artefact(name), dtype="float32")
    model.save_pretrained(tmp_path / "copy")
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=True).eval()
    assert torch.allclose(logits(stock), logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "packed-embedding", "apiq", "nested", "blockpruner"])
def test_values_that_were_changed_are_saved(name: str, artefact: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(artefact(name))
    before = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.generation_config.max_new_tokens = 7
    assert not torch.allclose(logits(model), before)
    model.save_pretrained(tmp_path)
    copy = compress.load(tmp_path)
    assert torch.equal(logits(copy), logits(model))
    assert copy.generation_config.max_new_tokens == 7


def test_a_state_dict_given_is_what_is_saved(artefact: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(artefact("int4"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] *= 2
    model.save_pretrained(tmp_path, state_dict=state)
    model.load_state_dict(state)
    assert torch.equal(logits(compress.load(tmp_path)), logits(model))
    del state["model.norm.weight"]
    with pytest.raises(BadInput, match=r"'model\.norm\.weight' differs"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("name", ["bitstack", "nested"])
def test_a_stack_is_saved_with_the_blocks_it_has(
    name: str, artefact: Callable[..., Path], tmp_path: Path
) -> None:
    model = compress.load(artefact(name))
    whole = model.resize(None)
    less = model.resize(whole * 9 // 10)
    expected = logits(model)
    model.save_pretrained(tmp_path / "less")
    copy = compress.load(tmp_path / "less")
    assert torch.equal(logits(copy), expected)
    assert copy.resize(None) == less < whole
    model.resize(None)
    model.save_pretrained(tmp_path / "whole")
    assert_same_files(tmp_path / "whole", artefact(name))
    files = (folder / "model.safetensors" for folder in (artefact(name), tmp_path / "whole"))
    assert next(files).read_bytes() == next(files).read_bytes()  # in the order in which blocks are read
    copy = compress.load(tmp_path / "whole")
    copy.resize(less)
    with pytest.raises(BadInput, match="would remove the blocks"):
        copy.save_pretrained(tmp_path / "whole")
    copy.resize(None)
    copy.save_pretrained(tmp_path / "whole")
    assert_same_files(tmp_path / "whole", artefact(name))
    smaller = compress.load(artefact(name), memory=less)
    smaller.save_pretrained(tmp_path / "smaller")
    assert_same_files(tmp_path / "smaller", tmp_path / "less")


def test_shards_and_weights_of_an_earlier_model(artefact: Callable[..., Path], tmp_path: Path) -> None:
    model, folder = compress.load(artefact("int4")), artefact("int4")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(compress.load(tmp_path)), logits(model))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_files(tmp_path, folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB", is_main_process=False)
    assert_same_files(tmp_path, folder)


def test_a_save_that_fails_leaves_what_was_there(
    artefact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress.load(artefact("int8")).save_pretrained(tmp_path)
    model = compress.load(artefact("int4"))
    monkeypatch.setattr(model.generation_config, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert_same_files(tmp_path, artefact("int8"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "argument", [{"variant": "fp16"}, {"distributed_checkpoint": True}, {"safe_serialization": False}]
)
def test_arguments_that_cannot_be_followed_are_refused(
    argument: dict[str, Any], artefact: Callable[..., Path], tmp_path: Path
) -> None:
    model = compress.load(artefact("int4"))
    with pytest.raises(BadInput, match=f"{min(argument)}="):
        model.save_pretrained(tmp_path / "copy", **argument)
    assert not (tmp_path / "copy").exists()
    model.save_pretrained(tmp_path / "copy", variant=None, save_original_format=True)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_a_model_with_other_modules_is_not_saved_as_if_it_had_its_own(
    artefact: Callable[..., Path], tmp_path: Path
) -> None:
    model = compress.load(artefact("int4"))
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(BadInput, match=r"'model\.layers\.1\.mlp\.up_proj' is not the one"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_more_tokens(artefact: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(artefact("int4"))
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(compress.load(tmp_path)), logits(model))


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("name", ["apiq", "blockpruner"])
def test_what_is_pushed_is_what_is_saved(
    way: str,
    name: str,
    artefact: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.utils import hub

    seen: dict[str, Any] = {}

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> None:
        seen.update(kwargs, repo=repo_id)
        seen.update(
            logits=logits(compress.load(working_dir)), adapter=(Path(working_dir) / "adapter").exists()
        )

    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(hub, "hf_api", lambda *_, **__: api)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None)
    )
    monkeypatch.setattr(hf.PreTrainedModel, "_upload_modified_files", upload)
    model = compress.load(artefact(name))
    if way == "push_to_hub":
        model.push_to_hub("small", commit_message="hello")
    else:
        model.save_pretrained(tmp_path / "small", push_to_hub=True, commit_message="hello")
    assert seen["repo"] == "me/small"
    assert seen["commit_message"] == "hello"
    assert torch.equal(seen["logits"], logits(model))
    assert seen["adapter"] == (name == "apiq")


def test_a_plain_model_is_left_to_transformers(shared_decoder: Callable[..., Path], tmp_path: Path) -> None:
    model = compress.load(shared_decoder())
    model.save_pretrained(tmp_path, variant="fp16")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "model.fp16.safetensors").exists()
