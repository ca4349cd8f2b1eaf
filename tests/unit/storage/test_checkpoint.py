"""Checkpoints and drafts: lazy, byte-exact, atomic, and clear about what is wrong with a folder."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.engine.loading import load
from compress.engine.stream import StreamedModel
from compress.errors import BadInput
from compress.storage import checkpoint as module
from compress.storage import writer
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.tensors import DTYPES, TensorInfo
from compress.storage.writer import write_tensors, write_weights
from compress.system.files import atomic, file_sha256, write_atomically

SIZE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "max_position_embeddings": 32}
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bytes, so NaN and subnormal numbers too; 0 or 1 for booleans."""
    generator = torch.Generator().manual_seed(seed)
    info = TensorInfo(dtype, shape)
    values = torch.randint(0, 2 if dtype == "BOOL" else 256, (info.nbytes,), generator=generator)
    return values.to(torch.uint8).view(DTYPES[dtype]).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny Llama as transformers writes it."""
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(tmp_path, {"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.float16)})
    read: list[str] = []

    class Spy:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(module, "safe_open", Spy)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors == {"a": TensorInfo("F32", (3, 4)), "b": TensorInfo("F16", (5,))}
    assert checkpoint.nbytes == 4 * 12 + 2 * 5
    assert read == []
    assert torch.equal(checkpoint.read("b"), torch.ones(5, dtype=torch.float16))
    assert read == ["b"]


def test_tensors_outlive_their_file(tmp_path: Path):
    make_folder(tmp_path, {"a": torch.arange(6.0)})
    tensor = Checkpoint.open(tmp_path).read("a")
    tensor += 1  # its own memory, not the file's
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 200)
    assert torch.equal(tensor, torch.arange(6.0) + 1)


def test_floats_are_cast_when_read_and_the_rest_is_not(tmp_path: Path):
    tensors = {"a": torch.randn(4, 4), "b": torch.randn(4).half(), "c": torch.arange(4)}
    make_folder(tmp_path, tensors, {"model_type": "llama", "torch_dtype": "float32"})
    checkpoint = Checkpoint.open(tmp_path, "BF16")
    for name, wanted in tensors.items():
        wanted = wanted if name == "c" else wanted.to(torch.bfloat16)
        assert torch.equal(checkpoint.read(name), wanted)
        assert DTYPES[checkpoint.tensors[name].dtype] == wanted.dtype
    assert checkpoint.config == {"model_type": "llama", "dtype": "bfloat16"}
    assert checkpoint.sha256 != Checkpoint.open(tmp_path).sha256


def test_hash_is_of_the_bytes_not_of_the_place(tmp_path: Path):
    one = make_folder(tmp_path / "one", {"a": torch.ones(3)})
    other = make_folder(tmp_path / "other", {"a": torch.ones(3)})
    assert Checkpoint.open(one).sha256 == Checkpoint.open(other).sha256
    make_folder(other, {"a": torch.tensor([1, 1, 1 + 2**-23])})
    assert Checkpoint.open(one).sha256 != Checkpoint.open(other).sha256


def test_a_relative_folder_is_found_from_another_one(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny.parent)
    checkpoint = Checkpoint.open(tiny.name)
    monkeypatch.chdir(tiny)
    assert checkpoint.read(WEIGHT).shape == (16, 24)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        min_size=1,
        max_size=6,
    ),
    limit=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_what_is_written_is_what_the_library_reads(tensors: dict, limit: int, seed: int):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = {key: random_tensor(*what, seed) for key, what in tensors.items()}
        source = make_folder(folder / "source", values)
        checkpoint = Checkpoint.open(source)
        out = folder / "out"
        out.mkdir()
        hashes = write_weights(checkpoint, out, limit)

        (out / "config.json").write_text("{}")
        found: dict[str, torch.Tensor] = {}
        for file, sha256 in hashes.items():
            assert file_sha256(out / file) == sha256
            part = load_file(out / file)
            assert not found.keys() & part.keys()
            sizes = [value.nbytes for value in part.values()]
            assert sum(sizes) <= limit or len(sizes) == 1 or sum(sizes) == max(sizes)
            found |= part
        assert {key: (value.dtype, value.shape, raw(value)) for key, value in found.items()} == {
            key: (value.dtype, value.shape, raw(value)) for key, value in values.items()
        }
        again = Checkpoint.open(out)
        assert again.tensors == checkpoint.tensors
        if len(hashes) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["weight_map"].keys() == values.keys()
            assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())


def test_tensors_are_aligned_to_their_items(tmp_path: Path):
    make_folder(tmp_path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)})
    (tmp_path / "out").mkdir()
    write_weights(Checkpoint.open(tmp_path), tmp_path / "out")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"][0] % 8 == 0


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_transformers_loads_the_shards(tiny: Path, tmp_path: Path, limit: int):
    out = tmp_path / "out"
    out.mkdir()
    files = write_weights(Checkpoint.open(tiny), out, limit)
    (out / "config.json").write_text((tiny / "config.json").read_text())
    assert (len(files) > 1) == (limit < 10**9)
    wanted = hf.LlamaForCausalLM.from_pretrained(tiny).state_dict()
    found = hf.LlamaForCausalLM.from_pretrained(out).state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_one_whole_file_goes_before_copies_in_other_layouts(tiny: Path):
    save_file({"layers.0.wo": torch.ones(2)}, tiny / "consolidated.safetensors")
    assert "layers.0.wo" not in Checkpoint.open(tiny)


# Drafts


@pytest.fixture
def parent(tmp_path: Path) -> Checkpoint:
    tensors = {name: torch.full((2, 2), float(number)) for number, name in enumerate("abc")}
    return Checkpoint.open(make_folder(tmp_path / "parent", tensors, {"model_type": "llama", "layers": [1]}))


def contents(checkpoint: Checkpoint) -> dict[str, list]:
    return {name: checkpoint.read(name).tolist() for name in checkpoint.tensors}


def test_draft_changes_its_table_and_not_its_parent(parent: Checkpoint, tmp_path: Path):
    before = contents(parent)
    draft = Draft(parent, tmp_path / "draft")
    assert contents(draft) == before
    assert draft.config == parent.config
    draft.write({"a": torch.ones(3, dtype=torch.bfloat16), "new": torch.tensor(7)})
    draft.alias("d", "c")
    draft.alias("c", "b")
    draft.drop("b")
    draft.config["layers"].append(2)
    expected = {"a": [1, 1, 1], "c": before["b"], "new": 7, "d": before["c"]}
    for _ in ("in memory", "flushed"):
        assert contents(draft) == expected
        assert draft.tensors["a"] == TensorInfo("BF16", (3,))
        draft.flush("step")
    assert contents(parent) == before
    assert parent.config["layers"] == [1]

    again = Draft(parent, tmp_path / "draft")
    assert contents(again) == before
    again.restore()
    assert contents(again) == expected
    assert again.config["layers"] == [1, 2]
    assert list(again.tensors) == list(draft.tensors)
    again.reset()
    assert contents(again) == before
    assert again.config == parent.config


def test_drafts_that_differ_have_different_hashes(parent: Checkpoint, tmp_path: Path):
    """Models without different layers of the same model use different tensors of the same files."""
    drafts = [Draft(parent, tmp_path / "draft") for _ in range(3)]
    for draft, kept in zip(drafts, ("ab", "ac", "ac"), strict=True):
        draft.rename(dict(zip(kept, "ab", strict=True)))
    one, other, same = (draft.sha256 for draft in drafts)
    assert one != other == same


def test_a_draft_is_restored_where_it_and_its_parent_were_moved_to(parent: Checkpoint, tmp_path: Path):
    draft = Draft(parent, tmp_path / "work" / "draft")
    draft.write({"a": torch.ones(3)})
    draft.alias("d", "c")
    draft.flush("step")
    expected = contents(draft)
    (tmp_path / "work").rename(tmp_path / "moved")
    again = Draft(Checkpoint.open(parent.folder.rename(tmp_path / "elsewhere")), tmp_path / "moved" / "draft")
    again.restore()
    assert contents(again) == expected


def test_last_change_of_a_name_wins(parent: Checkpoint, tmp_path: Path):
    draft = Draft(parent, tmp_path / "draft")
    draft.write({"a": torch.zeros(1)})
    draft.alias("a", "c")
    draft.write({"b": torch.zeros(1)})
    draft.drop("b")
    draft.drop("no such tensor")
    draft.alias("c", "a")
    draft.write({"c": torch.zeros(1)})
    draft.flush("step")
    assert contents(draft) == {"a": [[2, 2], [2, 2]], "c": [0]}


def test_a_tag_is_replaced_and_other_tags_stay(parent: Checkpoint, tmp_path: Path):
    draft = Draft(parent, tmp_path / "draft")
    for tag, name, value in (("1", "a", 10.0), ("2", "b", 20.0), ("2", "b", 30.0)):
        draft.write({name: torch.full((2,), value)})
        draft.flush(tag)
    assert contents(draft)["a"] == [10, 10]
    assert contents(draft)["b"] == [30, 30]


def test_what_was_written_is_a_copy_and_may_share_memory(parent: Checkpoint, tmp_path: Path):
    draft = Draft(parent, tmp_path / "draft")
    value = torch.arange(6.0).reshape(2, 3)
    draft.write({"a": value, "b": value, "c": value.T, "row": value[1]})
    value.zero_()
    draft.flush("step")
    assert contents(draft) == {"a": [[0, 1, 2], [3, 4, 5]], "b": [[0, 1, 2], [3, 4, 5]],
                               "c": [[0, 3], [1, 4], [2, 5]], "row": [3, 4, 5]}  # fmt: skip


def test_a_flush_that_fails_leaves_the_last_one(
    parent: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draft = Draft(parent, tmp_path / "draft")
    draft.write({"a": torch.zeros(1)})
    draft.flush("step")

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_file", full)
    draft.write({"a": torch.ones(1)})
    with pytest.raises(OSError, match="No space"):
        draft.flush("step")
    again = Draft(parent, tmp_path / "draft")
    again.restore()
    assert contents(again)["a"] == [0]
    assert {file.name for file in (tmp_path / "draft").iterdir()} == {"step.safetensors", "draft.json"}


def test_atomic_shows_the_old_file_or_the_new_one(tmp_path: Path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    killed = False
    try:
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        killed = True
    assert killed
    assert path.read_text() == "old"
    write_atomically(path, "new: ä")
    assert path.read_text(encoding="utf-8") == "new: ä"
    assert list(tmp_path.iterdir()) == [path]


def test_write_tensors_takes_views(tmp_path: Path):
    value = torch.arange(6.0).reshape(2, 3)
    write_tensors({"t": value.T, "first": value[0], "number": torch.tensor(3), "": value[:0]}, tmp_path / "f")
    found = load_file(tmp_path / "f")
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["number"].shape == ()
    assert found[""].shape == (0, 3)


# What may be wrong with a folder: one sentence each.


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lora(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


BROKEN = {
    "no config.json": (lambda f: (f / "config.json").unlink(), r"no config\.json\.$"),
    "config.json is not JSON": (lambda f: (f / "config.json").write_text("{1"), r"config\.json is not JSON"),
    "config.json is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"is not JSON"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), r"is not a JSON object\.$"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), r"damaged or not a safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"damaged or not a safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no \*\.safetensors weights\.$"),
    "pickles": (only_pickles, r"only pickled weights, which can run code; convert them to safetensors\.$"),
    "adapter": (lora, r"holds an adapter, not a model; merge it into its base model \(.*\) first"),
    "index of a missing file": (lambda f: write_index(f, {"x": "gone.safetensors"}), r"gone.* is missing"),
    "index of a missing tensor": (
        lambda f: write_index(f, {"x": "part.safetensors"}),
        r"lacks the tensor 'x' that the index lists",
    ),
    "index is a list": (lambda f: write_index(f, [1]), r"is not a safetensors index\.$"),
    "index of numbers": (lambda f: write_index(f, {"x": 1}), r"is not a safetensors index\.$"),
}  # fmt: skip


def test_weights_that_may_not_be_read(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    may_open = Path.open

    def deny(file: Path, *how: Any, **more: Any) -> Any:
        if file.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return may_open(file, *how, **more)

    monkeypatch.setattr(Path, "open", deny)  # root, who may run this, may read everything
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read: Permission denied\.$"):
        Checkpoint.open(tiny)


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_section_on_quantization_that_says_nothing_is_none(tiny: Path, nothing: object):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"quantization_config": nothing}))
    assert "quantization_config" not in Checkpoint.open(tiny).config


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(tiny: Path, problem: str):
    damage, message = BROKEN[problem]
    Checkpoint.open(tiny)
    damage(tiny)
    with pytest.raises(BadInput, match=message) as caught:
        Checkpoint.open(tiny)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path):
    with pytest.raises(BadInput, match="no model folder"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="no model folder"):
        Checkpoint.open(tmp_path / "file")


def spoil(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: value for name, value in tensors.items() if value is not None},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


UNFIT = {
    "missing": (None, rf"lacks the tensor '{WEIGHT}'\.$"),
    "wrong shape": (torch.ones(16, 23), r"has shape \[16, 23\] where config\.json asks for \[16, 24\]\.$"),
    "NaN": (torch.full((16, 24), torch.nan), rf"'{WEIGHT}' holds NaN or infinite values\.$"),
    "inf": (torch.ones(16, 24).index_fill(1, torch.tensor([3]), torch.inf), r"holds NaN or infinite values"),
    "bfloat16 NaN": (torch.full((16, 24), torch.nan, dtype=torch.bfloat16), r"holds NaN or infinite values"),
}


@pytest.mark.parametrize("problem", UNFIT)
def test_weights_that_do_not_fit_are_refused_where_they_are_used(tiny: Path, problem: str):
    value, message = UNFIT[problem]
    spoil(tiny, {WEIGHT: value})
    with pytest.raises(BadInput, match=message):
        load(tiny)
    model = StreamedModel(Checkpoint.open(tiny))
    with model.layer(0):
        pass
    with pytest.raises(BadInput, match=message), model.layer(1):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "does not name a model_type"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "mamba"}, "'mamba' is not supported"),
        ({"num_attention_heads": 3}, "is not a valid llama config"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(tiny: Path, change: dict, message: str):
    config = json.loads((tiny / "config.json").read_text()) | change
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        load(tiny)
