"""Model folders that are odd in ways in which published ones are. Each function changes a plain folder.

`SAME` leaves what the model computes as it was, so that whatever is done to the odd folder must come out as
if it had been done to the plain one. `REFUSED` breaks the model, and says what the user must be told before
any work is done. Both expect a Llama with a head of its own, as ``write_decoder`` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Oddity = Callable[[Path], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change_json(file: Path, **values: Any) -> None:
    """Set entries of a JSON file, which is made if it is missing."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | values))


def rename_tensors(folder: Path, name_of: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name_of(name): t for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def add_tensors(file: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def shard(folder: Path, under: str = "") -> list[str]:
    """Split the weights into two files and write their index; the names of the files."""
    tensors, files = (
        load_file(folder / WEIGHTS),
        [f"{under}model-0000{n}-of-00002.safetensors" for n in (1, 2)],
    )
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    (folder / under).mkdir(exist_ok=True)
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    (folder / WEIGHTS).unlink()
    return files


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# --- the same model, published oddly ---


def names_without_prefix(folder: Path) -> None:
    """As Qwen3-Embedding is published."""
    rename_tensors(folder, lambda name: name.removeprefix("model."))


def names_of_a_language_part(folder: Path) -> None:
    """As a model for images and text holds its language model."""
    rename_tensors(folder, lambda name: f"language_model.{name}")


def called_tied(folder: Path) -> None:
    """The head is its own, though the config says that it is the embedding."""
    change_json(folder / "config.json", tie_word_embeddings=True)


def more_layers_than_said(folder: Path) -> None:
    """The files go on behind the last layer, as with layers for speculative decoding."""
    tensors = load_file(folder / WEIGHTS)
    last = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    extra = {n.replace(".0.", f".{last}."): t.clone() for n, t in tensors.items() if ".layers.0." in n}
    add_tensors(folder / WEIGHTS, **extra)


def stale_shard(folder: Path) -> None:
    """A tensor is also in a file for which the index does not list it."""
    files = shard(folder)
    name = "model.norm.weight"
    where = json.loads((folder / INDEX).read_text())["weight_map"][name]
    other = next(file for file in files if file != where)
    add_tensors(folder / other, **{name: torch.zeros_like(load_file(folder / where)[name])})


def index_with_a_gap(folder: Path) -> None:
    """A file holds a tensor that the index does not list at all."""
    shard(folder)
    change_index(folder, lambda where: where.pop("model.norm.weight"))


def shards_in_a_subfolder(folder: Path) -> None:
    shard(folder, "weights/")


def stray_weights(folder: Path) -> None:
    """Files of weights that no index names, beside those that it does."""
    shard(folder)
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        save_file({"model.norm.weight": torch.zeros(3)}, folder / name)


def adapter_beside_weights(folder: Path) -> None:
    """What peft leaves in the folder of the model that an adapter was merged into."""
    change_json(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="x/y", r=4)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")


def empty_quantization(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config=None)


def code_of_its_own(folder: Path) -> None:
    """Python files, and configs that name classes in them."""
    for name in ("modeling_x.py", "tokenization_x.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise RuntimeError('this code was run')")
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.T", None]})


def a_full_folder(folder: Path) -> None:
    """Everything that trainers and exporters leave, and settings in every place where they may be."""
    for name in (
        *("pytorch_model.bin", "onnx/model.onnx", "original/params.json", "model.Q4_K_M.gguf", "tf_model.h5"),
        *("optimizer.pt", "trainer_state.json", "checkpoint-10/model.safetensors", "runs/x/events.out.1"),
        *("LICENSE", "NOTICE.txt", "USE_POLICY.md", ".gitattributes", "imatrix.dat", "whatever.xyz"),
        *(
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
            "tekken.json",
            "tokenizer.model.v3",
        ),
        "preprocessor_config.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}")
    change_json(folder / "generation_config.json", max_new_tokens=7)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [fun]\n---\n# A model\n")


def links(folder: Path) -> None:
    """The hub's cache, where files are links out of the folder, and a folder that goes round in a circle."""
    blobs = folder.with_name(f"{folder.name}-blobs")
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, folder))
    (folder / "loop").symlink_to("..")
    (folder / "additional_chat_templates").symlink_to("/")
    (folder / "vocab.json").symlink_to("nowhere")


SAME: dict[str, Oddity] = {
    oddity.__name__: oddity
    for oddity in (
        *(names_without_prefix, names_of_a_language_part, called_tied, more_layers_than_said, stale_shard),
        *(index_with_a_gap, shards_in_a_subfolder, stray_weights, adapter_beside_weights, empty_quantization),
        *(code_of_its_own, a_full_folder, links),
    )
}


# --- not a whole model ---


def missing_shard(folder: Path) -> None:
    (folder / shard(folder)[0]).unlink()


def index_that_leaves_the_folder(folder: Path) -> None:
    outside = Path("..") / f"{folder.name}-outside.safetensors"
    (folder / shard(folder)[0]).rename(folder / outside)
    change_index(folder, lambda where: where.update(dict.fromkeys(where, str(outside))))


def shards_that_overlap(folder: Path) -> None:
    """Two files hold one tensor, and there is no index."""
    files = shard(folder)
    (folder / INDEX).unlink()
    for file in files:
        add_tensors(folder / file, **{"model.norm.weight": torch.ones(64)})


def fewer_layers_than_said(folder: Path) -> None:
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change_json(folder / "config.json", num_hidden_layers=count + 1)


def no_head(folder: Path) -> None:
    """The config says that the head is not the embedding, and the files do not hold it."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def other_shape(folder: Path) -> None:
    add_tensors(folder / WEIGHTS, **{"model.norm.weight": torch.ones(65)})


def one_name_twice(folder: Path) -> None:
    tensor = load_file(folder / WEIGHTS)["model.norm.weight"]
    rename_tensors(folder, lambda name: name.removeprefix("model."))
    add_tensors(folder / WEIGHTS, **{"module.norm.weight": tensor})


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def weights_that_cannot_be_read(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def adapter_only(folder: Path) -> None:
    adapter_beside_weights(folder)
    (folder / WEIGHTS).unlink()


def lineage_in_utf16(folder: Path) -> None:
    (folder / "compression.json").write_text('{"name": "x"}', encoding="utf-16")


def damaged_lineage(folder: Path) -> None:
    (folder / "compression.json").write_text('{"name": ')


def pickled_module(folder: Path) -> None:
    """A sentence encoder of which one module has only pickled weights."""
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").touch()


def module_outside(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))


def linked_module(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"path": "1_Pooling"}]))
    (folder / "1_Pooling").symlink_to("/")


def damaged_modules(folder: Path) -> None:
    (folder / "modules.json").write_text("[1]")


REFUSED: dict[Oddity, str] = {
    missing_shard: "is missing, though the index",
    index_that_leaves_the_folder: "which is outside of the model folder",
    shards_that_overlap: "no index says which of the two counts",
    fewer_layers_than_said: r"asks for a layer \d+, but the files hold \d+ layers; correct num_hidden_layers",
    no_head: "lacks the tensor 'lm_head.weight'; if the embedding is also the head, set tie_word_embeddings",
    other_shape: r"'model.norm.weight' has shape \[65\] where config.json asks for \[64\]",
    one_name_twice: "hold 'model.norm.weight' of LlamaForCausalLM twice",
    lfs_pointer: "run `git lfs pull`",
    weights_that_cannot_be_read: "cannot be read: Is a directory",
    adapter_only: r"merge it into its base model \(x/y\) first",
    lineage_in_utf16: "compression.json cannot be read",
    damaged_lineage: "compression.json cannot be read",
    pickled_module: "has only pickled weights, which can run code",
    module_outside: "which is outside of the model folder",
    linked_module: "which is outside of the model folder",
    damaged_modules: "is damaged: it is not a list of modules",
}
"""Oddity -> regular expression of what the user is told."""
