"""Streaming: layer by layer gives what the whole model gives."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import compress
from compress.anatomy import ROWS
from compress.calibration.statistics.losses import streamed_losses
from compress.engine import stream as module
from compress.engine.skeleton import longest_input
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.kernels.codes.integer import quantize_weight
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.table import FORMATS
from compress.system.memory import give_back_memory

from .common import CASES, LAYERS, SIZE, Subject, everything, make_windows


def test_every_row_has_a_case():
    assert {build().model_type for _, build in CASES.values()} == set(ROWS)


@pytest.mark.parametrize(("padded", "batch_size"), [(False, 5), (True, 2)], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_layers_and_logits_are_those_of_the_plain_forward(
    subject_of: Callable[[str], Subject], case: str, padded: bool, batch_size: int
):
    """Bitwise, batch by batch."""
    subject, windows = subject_of(case), make_windows(padded=padded)
    plain: list[tuple[list[Tensor], Tensor]] = []
    for start in range(0, 5, batch_size):
        rows = slice(start, start + batch_size)
        plain.append(subject.forward(windows.tokens[rows], windows.mask[rows] if padded else None))
    wanted = [torch.cat(parts) for parts in zip(*(hidden for hidden, _ in plain), strict=True)]

    model = StreamedModel(Checkpoint.open(subject.folder))
    assert model.num_layers == LAYERS
    stream = model.stream(windows, batch_tokens=9 * batch_size)
    assert torch.equal(everything(stream), wanted[0])
    for layer in model.walk(None, stream):
        stream.advance(layer)
        assert torch.equal(everything(stream), wanted[layer.index + 1]), layer.name
    with model.head() as head:
        for (_, hidden, _), (_, logits) in zip(stream.batches(), plain, strict=True):
            found = head(hidden)
            assert torch.equal(found["logits"] if "logits" in found else found[0], logits)


@pytest.mark.parametrize("case", ["llama, tied", "gemma3_text", "gpt2", "gpt_neox", "opt", "opt, post-norm"])
def test_features_are_what_the_projection_is_given(subject_of: Callable[[str], Subject], case: str):
    model = StreamedModel(Checkpoint.open(subject_of(case).folder))
    hidden = torch.randn(2, 5, SIZE["hidden_size"], generator=torch.Generator().manual_seed(0))
    with model.head() as head:
        features = head.features(hidden)
        assert torch.equal(head.projection(features), head(hidden).logits)


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "opt", "mpnet"])
def test_batch_size_changes_nothing_but_rounding(subject_of: Callable[[str], Subject], case: str):
    model, windows = StreamedModel(Checkpoint.open(subject_of(case).folder)), make_windows(padded=True)
    found = []
    for batch_tokens in (1, 20, 4096):
        stream = model.stream(windows, batch_tokens=batch_tokens)
        for layer in model.walk(None, stream):
            stream.advance(layer)
        found.append(everything(stream)[windows.mask])
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found[0], found[2], rtol=1e-5, atol=1e-5)


def test_padding_does_not_reach_the_real_tokens(llama: Subject):
    model, windows = StreamedModel(Checkpoint.open(llama.folder)), make_windows(padded=True)
    other = Windows(torch.where(windows.mask, windows.tokens, 17), windows.mask, "made up")
    assert not torch.equal(windows.tokens, other.tokens)
    assert torch.equal(streamed_losses(model, windows), streamed_losses(model, other))


def test_losses_are_those_of_transformers(llama: Subject):
    windows = make_windows()
    found = streamed_losses(StreamedModel(Checkpoint.open(llama.folder)), windows)
    assert found.shape == (5 * 8,)
    with torch.no_grad():
        wanted = llama.model(windows.tokens, labels=windows.tokens).loss
    assert torch.allclose(found.mean().float(), wanted, rtol=1e-5)


# Memory


@pytest.mark.parametrize("case", ["llama, tied", "gpt2", "bert", "opt, post-norm"])
def test_weights_are_in_memory_inside_the_blocks_only(subject_of: Callable[[str], Subject], case: str):
    model = StreamedModel(Checkpoint.open(subject_of(case).folder))
    stream = model.stream(make_windows())

    def in_memory() -> set[str]:
        parts = {"outside": model.model} | {str(i): layer for i, layer in enumerate(model._layers)}
        return {
            name
            for name, part in parts.items()
            for parameter in part.parameters()
            if parameter.device.type != "meta"
        }

    assert in_memory() == set()
    for layer in model.walk(None, stream):
        assert in_memory() == {str(layer.index)}
        assert {p.device.type for p in layer.module.parameters()} == {"cpu"}
        stream.advance(layer)
        assert in_memory() == {str(layer.index)}
    assert in_memory() == set()
    with model.head() as head:
        head(stream.hidden.read(0, 1))
        assert in_memory() == {"outside"}
    assert in_memory() == set()
    with pytest.raises(ZeroDivisionError), model.layer(1):
        raise ZeroDivisionError
    assert in_memory() == set()
    for _ in model.walk(None, stream):
        break
    assert in_memory() == set()


def test_tied_head_is_not_read_twice(subject_of: Callable[[str], Subject]):
    """While text is embedded the head is not in memory; while logits are made the tensor is there once."""
    model = StreamedModel(Checkpoint.open(subject_of("llama, tied").folder))
    with model._outside(skip_head=True):
        assert model.model.lm_head.weight.device.type == "meta"
        assert model.model.get_input_embeddings().weight.device.type == "cpu"
    with model._outside(skip_embedding=True):
        assert model.model.lm_head.weight.device.type == "cpu"
        assert model.model.get_input_embeddings().weight.device.type == "meta"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can give memory back")
def test_what_lies_between_tensors_in_use_is_given_back() -> None:
    process, megabytes = psutil.Process(), 10**6
    torch.ones(7 * megabytes)  # once freed, blocks up to its size come from the heap
    kept, freed = [], []
    for _ in range(20):
        freed.append(torch.ones(3 * megabytes))
        kept.append(torch.ones(100_000))
    full = process.memory_info().rss
    del freed
    give_back_memory()
    assert process.memory_info().rss < full - 200 * megabytes
    assert len(kept) == 20


# Observers


def test_a_look_ends_with_what_was_looked_at(llama: Subject):
    model = StreamedModel(Checkpoint.open(llama.folder))
    stream = model.stream(make_windows(), batch_tokens=18)
    with model.layer(0) as layer:
        ran: list[str] = []
        for path, linear in layer.linears.items():
            linear.register_forward_hook(lambda *_, path=path: ran.append(path))
        stream.look(layer, {path: lambda *_: None for path in ("self_attn.q_proj", "self_attn.o_proj")})
        attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        assert ran == attention * len(stream.starts)


def test_observers_see_inputs_outputs_and_masks(llama: Subject):
    windows = make_windows(padded=True)
    model = StreamedModel(Checkpoint.open(llama.folder))
    stream = model.stream(windows, batch_tokens=18)
    seen: list[tuple[str, Tensor, Tensor, Tensor, int]] = []

    def look(path: str) -> module.Observer:
        return lambda what: seen.append((path, *what))

    before = everything(stream)
    with model.layer(0) as layer:
        assert tuple(layer.linears) == llama.anatomy.linear_paths
        observers = {"": look(""), "mlp.down_proj": look("mlp.down_proj")}
        stream.look(layer, observers)
        assert torch.equal(everything(stream), before)
        shown, seen[:] = list(seen), []
        stream.advance(layer, observe=observers)
        for one, other in zip(shown, seen, strict=True):
            assert all(a == b if isinstance(a, str | int) else torch.equal(a, b) for a, b in zip(one, other))
        weight, bias = layer.linears["mlp.down_proj"].weight, layer.linears["mlp.down_proj"].bias
        for path, inputs, outputs, mask, start in seen:
            rows = slice(start, start + len(inputs))
            assert torch.equal(mask, windows.mask[rows])
            if path:
                assert inputs.shape[-1] == 48
                assert torch.allclose(outputs, inputs @ weight.T + bias, atol=1e-5)
            else:
                assert torch.equal(inputs, before[rows])
                assert torch.equal(outputs, everything(stream)[rows])
        assert sorted((path, start) for path, *_, start in seen) == [
            (path, start) for path in ("", "mlp.down_proj") for start in (0, 2, 4)
        ]
        count = len(seen)
        stream.advance(layer)
        assert len(seen) == count  # the hooks are gone


def test_a_changed_layer_changes_the_stream(llama: Subject):
    model, windows = StreamedModel(Checkpoint.open(llama.folder)), make_windows()
    ends = []
    for scale in (1.0, 2.0):
        stream = model.stream(windows)
        for layer in model.walk(None, stream):
            if layer.index == 1:
                layer.linears["mlp.down_proj"].weight.data *= scale
            stream.advance(layer)
        ends.append(everything(stream))
    assert not torch.allclose(*ends)


@pytest.mark.parametrize("case", CASES)
def test_windows_longer_than_a_table_of_positions_are_refused(
    subject_of: Callable[[str], Subject], case: str
):
    subject = subject_of(case)
    model = module.StreamedModel(Checkpoint.open(subject.folder))
    longest = longest_input(subject.model)
    learned = any("position" in name or "wpe" in name for name, _ in subject.model.named_parameters())
    assert model.stream(make_windows(1, longest)).hidden.shape[1] == longest
    if learned:
        with pytest.raises(BadInput, match=f"positions for {longest} tokens"):
            model.stream(make_windows(1, longest + 1))
    else:
        assert model.stream(make_windows(1, longest + 1)).hidden.shape[1] == longest + 1


def test_what_cannot_be_streamed_is_refused(llama: Subject, tmp_path: Path):
    model = StreamedModel(Checkpoint.open(llama.folder))
    tokens = torch.tensor([[1, 60]])
    with pytest.raises(BadInput, match="outside the model's vocabulary"):
        model.stream(Windows(tokens, tokens > 0, "made up"))
    stream = model.stream(make_windows())
    with model.layer(1) as layer:
        layer.linears["mlp.down_proj"].weight.data[0, 0] = torch.inf
        with pytest.raises(CompressError, match=r"^Layer model\.layers\.1 puts out NaN or infinite values"):
            stream.advance(layer)


# Packed models


@pytest.mark.parametrize(("form", "bits"), [("compressed-tensors", 4), ("gptq", 2), ("gptq", 4)])
def test_packed_models_stream_as_they_load(llama: Subject, tmp_path: Path, form: str, bits: int):
    checkpoint = Checkpoint.open(llama.folder)
    packer = FORMATS[form](bits, 16, True)
    draft = Draft(checkpoint, tmp_path / "draft")
    names = []
    model = StreamedModel(checkpoint)
    for layer in model.walk(None):
        for path, linear in layer.linears.items():
            names.append(f"{layer.name}.{path}")
            scale_dtype = packer.scale_dtype(torch.float32)
            rounded = quantize_weight(linear.weight, bits, 16, True, scale_dtype, names[-1])
            draft.write(packer.tensors(names[-1], rounded))
            draft.drop(f"{names[-1]}.weight")
    draft.config["quantization_config"] = packer.quantization_config(names, [], ["lm_head"])
    draft.flush("step")
    folder = tmp_path / "packed"
    folder.mkdir()
    module_files = compress.storage.writer.write_weights(draft, folder)
    assert list(module_files) == ["model.safetensors"]
    (folder / "config.json").write_text(json.dumps(draft.config))

    windows = make_windows()
    loaded = compress.load(folder, dtype="float32")
    with torch.no_grad():
        wanted = loaded(windows.tokens).logits
        dense = llama.model(windows.tokens).logits
    for packed in (draft, Checkpoint.open(folder)):
        model = StreamedModel(packed)
        stream = model.stream(windows)
        kinds = set()
        for layer in model.walk(None, stream):
            kinds |= {type(linear).__name__ for linear in layer.linears.values()}
            stream.advance(layer)
        assert kinds == {"PackedLinear"}
        with model.head() as head:
            assert torch.equal(head(stream.hidden.read(0, 5)).logits, wanted)
    assert not torch.allclose(dense, wanted, atol=1e-3)
