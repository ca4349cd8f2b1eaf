"""Streaming: layer by layer gives what the whole model gives, in memory or in files, unbroken or resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as hf
from torch import Tensor

import compress
from compress import activations
from compress import stream as module
from compress.activations import Activations
from compress.anatomy import ROWS, anatomy_of, model_class
from compress.anatomy import weight as anatomy_weight
from compress.backward import Tape
from compress.calibration.windows import Windows
from compress.checkpoint import Checkpoint, Draft
from compress.errors import BadInput, CompressError
from compress.memory import give_back_memory
from compress.modeling import longest_input
from compress.quantization.formats import FORMATS
from compress.quantization.quantizer import quantize_weight
from compress.stream import Journal, StreamedModel, next_token_loss

LAYERS = 3
SIZE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 48}
GQA = {**SIZE, **MLP, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}
GEMMA = {**WIDE, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48}
DISTIL = {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "pad_token_id": 0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}

# Every row of the anatomy table, with the variants that change what is around the layers or given to them.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True)),
    "llama, tied": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**WIDE, sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**GQA, **SLIDING)),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**WIDE, tie_word_embeddings=True)),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3_text": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)),
    "phi3": ("Phi3ForCausalLM", lambda: hf.Phi3Config(**GQA)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**OPT)),
    "opt, post-norm": (
        "OPTForCausalLM",
        lambda: hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**SIZE)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**SIZE, **MLP)),
    "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**SIZE, **MLP)),
    "bert, bare": ("BertModel", lambda: hf.BertConfig(**SIZE, **MLP)),
    "bert, classifier": ("BertForSequenceClassification", lambda: hf.BertConfig(**SIZE, **MLP)),
    "distilbert": ("DistilBertForMaskedLM", lambda: hf.DistilBertConfig(**DISTIL)),
    "roberta": ("RobertaForMaskedLM", lambda: hf.RobertaConfig(**SIZE, **MLP)),
    "mpnet": ("MPNetForMaskedLM", lambda: hf.MPNetConfig(**SIZE, **MLP)),
}


class Subject:
    """A tiny model in memory, and the folder it was saved in."""

    def __init__(self, case: str, folder: Path) -> None:
        name, build = CASES[case]
        config = build()
        config.architectures = [name]
        torch.manual_seed(0)
        self.model = model_class(config)._from_config(config, dtype=torch.float32).eval()
        for parameter in self.model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        if config.pad_token_id is not None:
            self.model.get_input_embeddings().weight.data[config.pad_token_id] = 0
        self.model.save_pretrained(folder)
        self.folder = folder
        self.anatomy = anatomy_of(config)
        self.layers = self.model.base_model.get_submodule(self.anatomy.layers)

    @torch.no_grad()
    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Hidden states before the first layer and after every layer, and the first output."""
        hidden: list[Tensor] = []
        handles = [
            self.layers[0].register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].clone()))
        ]
        handles += [
            layer.register_forward_hook(lambda _, __, output: hidden.append(module.first(output).clone()))
            for layer in self.layers
        ]
        options = {"use_cache": False} if self.anatomy.kind == "decoder" else {}
        output = self.model(tokens, attention_mask=mask, **options)
        for handle in handles:
            handle.remove()
        return hidden, output["logits"] if "logits" in output else output[0]


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def get(case: str) -> Subject:
        if case not in made:
            made[case] = Subject(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return get


@pytest.fixture
def llama(subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of("llama")


def make_windows(count: int = 5, length: int = 9, padded: bool = False) -> Windows:
    tokens = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        for row in range(count):
            mask[row, length - 2 * row + row // 2 : length] = row == 0
        tokens = torch.where(mask, tokens, 0)
    return Windows(tokens, mask, "made up")


def everything(stream: module.Stream) -> Tensor:
    return torch.cat([hidden for _, hidden, _ in stream.batches()])


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
    assert torch.equal(next_token_loss(model, windows), next_token_loss(model, other))


def test_next_token_loss_is_that_of_transformers(llama: Subject):
    windows = make_windows()
    found = next_token_loss(StreamedModel(Checkpoint.open(llama.folder)), windows)
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


# Activations in memory and in files


MEMORY, FILES = 1 << 30, 0


@pytest.fixture(params=[MEMORY, FILES], ids=["memory", "files"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(activations, "MEMORY_LIMIT", request.param)
    return request.param


def test_limit_is_in_bytes(tmp_path: Path):
    assert not Activations((2, 3, 4), tmp_path / "x", memory_limit=96).spilled
    assert Activations((2, 3, 4), tmp_path / "x", memory_limit=95).spilled
    assert not Activations((2, 3, 4), None, memory_limit=0).spilled


def test_activations_hold_what_was_written(limit: int, tmp_path: Path):
    values = [torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    held = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
    for value in values:
        for start, stop in ((0, 2), (2, 4), (4, 5)):
            held.write(start, value[start:stop])
        held.flip()
        assert torch.equal(held.read(0, 5), value)
        assert torch.equal(held.read(3, 5), value[3:])
        name = held.save()
        assert held.save() == name
        again = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
        again.write(0, values[0])  # as a resumed run does before it restores
        again.flip()
        again.restore(name)
        assert torch.equal(again.read(0, 5), value)
        again.write(0, torch.ones(1, 3, 4))  # and then is killed again
        third = Activations((5, 3, 4), tmp_path / "sub" / "hidden")
        third.restore(name)
        assert torch.equal(third.read(0, 5), value)


def test_activations_that_are_cut_short_are_noticed(limit: int, tmp_path: Path):
    held = Activations((2, 3, 4), tmp_path / "hidden")
    held.write(0, torch.ones(2, 3, 4))
    held.flip()
    name = held.save()
    (tmp_path / name).write_bytes(b"\0" * 90)
    again = Activations((2, 3, 4), tmp_path / "hidden")

    def use() -> None:
        again.restore(name)
        again.read(0, 2)

    with pytest.raises(CompressError, match="cut short"):
        use()


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_spilled_is_bitwise_the_same(
    subject_of: Callable[[str], Subject], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, windows = StreamedModel(Checkpoint.open(subject_of(case).folder)), make_windows(padded=True)
    found = []
    for memory_limit in (1 << 30, 0):
        monkeypatch.setattr(activations, "MEMORY_LIMIT", memory_limit)
        stream = model.stream(windows, tmp_path, batch_tokens=18)
        assert stream.hidden.spilled == (memory_limit == 0)
        states = [everything(stream)]
        for layer in model.walk(None, stream):
            stream.advance(layer)
            states.append(everything(stream))
        found.append(states)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len({state.sum().item() for state in found[0]}) == LAYERS + 1


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
        return lambda *what: seen.append((path, *what))

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


# Resuming


class Killed(Exception):
    """Stands for a SIGKILL: nothing is tidied up but what Python does when objects go away."""


def body(model: StreamedModel, journal: Journal, folder: Path) -> Iterator[int]:
    """A walk that keeps results in every way there is: stream, extra activations, state and draft. What it
    writes depends on what was there, so a layer done twice shows."""
    stream = model.stream(make_windows(padded=True), folder / "streams", batch_tokens=18)
    extra = journal.activations("extra", stream.hidden.shape)
    journal.state["sum"] = torch.zeros((), dtype=torch.float64)
    for layer in model.walk(journal, stream, extra):
        stream.advance(layer)
        for start, hidden, _ in stream.batches():
            extra.write(start, hidden + extra.read(start, start + len(hidden)) if layer.index else hidden)
        extra.flip()
        journal.state["sum"] += everything(stream).double().sum()
        journal.state[f"view.{layer.index}"] = torch.arange(6.0).reshape(2, 3).T * layer.index
        journal.state.pop(f"view.{layer.index - 2}", None)
        norm = "model.norm.weight"
        journal.draft.write({norm: 2 * journal.draft.read(norm), f"layer.{layer.index}": extra.read(0, 1)})
        journal.draft.drop(f"{layer.name}.mlp.down_proj.weight")
        journal.draft.config["walked"] = layer.index + 1
        yield layer.index
    journal.state["end"], journal.state["extra"] = everything(stream), extra.read(0, 5)


def outcome(journal: Journal) -> dict[str, Any]:
    draft = journal.draft
    draft.flush("step")
    return {
        "state": {name: value.tolist() for name, value in journal.state.items()},
        "draft": {name: draft.read(name).tolist() for name in draft.tensors},
        "config": draft.config,
    }


def begin(llama: Subject, folder: Path) -> tuple[Journal, Iterator[int]]:
    checkpoint = Checkpoint.open(llama.folder)
    journal = Journal(folder / "walk", Draft(checkpoint, folder))
    return journal, body(StreamedModel(checkpoint), journal, folder)


@pytest.fixture(scope="module")
def unbroken(
    subject_of: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    llama = subject_of("llama")
    journal, walk = begin(llama, tmp_path_factory.mktemp("unbroken"))
    assert list(walk) == list(range(LAYERS))
    end = outcome(journal)
    norm = "model.norm.weight"
    assert torch.allclose(torch.tensor(end["draft"][norm]), 8 * llama.model.state_dict()[norm])
    assert set(end["state"]) == {"sum", "view.1", "view.2", "end", "extra"}
    return end


# With activations in files, of which two take turns, at every layer; in memory at one.
@pytest.mark.parametrize("moment", ["in the body", "after the draft", "after the state"])
@pytest.mark.parametrize(
    ("limit", "kill_at"), [*((FILES, index) for index in range(LAYERS)), (MEMORY, 1)], indirect=["limit"]
)
def test_a_walk_killed_anywhere_ends_the_same(
    llama: Subject,
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    kill_at: int,
    moment: str,
):
    def killed(walk: Iterator[int]) -> bool:
        done: list[int] = []
        with monkeypatch.context() as patch:
            if name := {"after the draft": "write_tensors", "after the state": "write_atomically"}.get(
                moment
            ):
                original = getattr(module, name)

                def write(*args: Any) -> None:
                    if kill_at in done:
                        raise Killed
                    original(*args)

                patch.setattr(module, name, write)
            try:
                for index in walk:
                    done.append(index)
                    if index == kill_at and moment == "in the body":
                        return True
            except Killed:
                return True
        return False

    for _ in range(2):  # killed twice at the same place
        assert killed(begin(llama, tmp_path)[1])

    journal, walk = begin(llama, tmp_path)
    assert list(walk) == list(range(kill_at, LAYERS))
    assert outcome(journal) == unbroken


def test_progress_is_told(llama: Subject, tmp_path: Path):
    told: list[tuple[str, float]] = []
    model = StreamedModel(Checkpoint.open(llama.folder), progress=lambda *what: told.append(what))
    for _ in model.walk(Journal(tmp_path), label="looking"):
        pass
    assert told == [("looking", 1 / 3), ("looking", 2 / 3), ("looking", 1.0)]
    assert json.loads((tmp_path / "progress.json").read_text())["finished"] == LAYERS
    assert list(model.walk(Journal(tmp_path))) == []


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
    module_files = compress.checkpoint.write_weights(draft, folder)
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


# The way back


def channel_masks(layer: module.Layer, count: int) -> Any:
    """Ones that multiply the inputs of a layer's last linear, one row for each window."""

    @contextmanager
    def put() -> Iterator[dict[str, Tensor]]:
        linear = list(layer.linears.values())[-1]
        mask = torch.ones(count, 1, anatomy_weight(linear).shape[1], requires_grad=True)

        def multiply(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            (given,) = inputs
            return ((given.view(count, -1, given.shape[-1]) * mask).view(given.shape),)

        handle = linear.register_forward_pre_hook(multiply)
        try:
            yield {"mask": mask}
        finally:
            handle.remove()

    return put()


@contextmanager
def last_weight(layer: module.Layer, count: int) -> Iterator[dict[str, Tensor]]:
    """The weight of a layer's last linear."""
    weight = list(layer.linears.values())[-1].weight.requires_grad_()
    yield {"weight": weight}
    weight.requires_grad_(False)


def loss_of(windows: Windows) -> Callable[[Any, int], Tensor]:
    """Squares of the first output at real tokens with random coefficients that belong to the window."""

    def loss(output: Any, start: int) -> Tensor:
        values = output["logits"] if "logits" in output else output[0]
        total = values.new_zeros(())
        for row, value in enumerate(values):
            generator = torch.Generator().manual_seed(start + row)
            if value.ndim > 1:
                value = value[windows.mask[start + row]]
            total = total + (torch.randn(value.shape, generator=generator) * value.square()).sum()
        return total

    return loss


# Padded in every case, with states in files; without a mask in three, as layers are called like that above.
@pytest.mark.parametrize(
    ("case", "padded"),
    [*((case, True) for case in CASES), *((case, False) for case in ("llama", "gpt2", "bert"))],
)
def test_gradients_are_those_of_autograd(
    subject_of: Callable[[str], Subject],
    case: str,
    padded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With respect to the embeddings, to masks that each belong to one window, and to shared weights."""
    subject, windows = subject_of(case), make_windows(padded=padded)
    loss = loss_of(windows)

    # The whole model at once.
    masks = [
        channel_masks(module.Layer(i, "", each, subject.anatomy.linears(each)), 5)
        for i, each in enumerate(subject.layers)
    ]
    embedded: list[Tensor] = []

    def keep(_: Any, inputs: tuple[Tensor, ...], kwargs: Any) -> Any:
        embedded.append(inputs[0].detach().requires_grad_())
        return (embedded[0], *inputs[1:]), kwargs

    with ExitStack() as stack:
        stack.callback(subject.layers[0].register_forward_pre_hook(keep, with_kwargs=True).remove)
        leaves = [stack.enter_context(mask)["mask"] for mask in masks]
        weights = [list(subject.anatomy.linears(each).values())[-1].weight for each in subject.layers]
        options = {"use_cache": False} if subject.anatomy.kind == "decoder" else {}
        output = subject.model(windows.tokens, attention_mask=windows.mask if padded else None, **options)
        value = loss(output, 0)
        wanted = torch.autograd.grad(value, [*embedded, *leaves, *weights])
    by_mask, by_weight = wanted[1 : LAYERS + 1], wanted[LAYERS + 1 :]

    monkeypatch.setattr(activations, "MEMORY_LIMIT", 0 if padded else 1 << 30)
    model = StreamedModel(Checkpoint.open(subject.folder))
    stream = model.stream(windows, tmp_path, batch_tokens=18)
    before = everything(stream)
    tape = Tape(model, stream, tmp_path)
    tape.forward()
    found = tape.differentiate(loss)
    assert found == pytest.approx(value.item(), rel=1e-4)
    rows: dict[int, list[Tensor]] = {index: [] for index in range(LAYERS)}
    tape.backward(channel_masks, lambda layer, _, given: rows[layer.index].append(given["mask"]))
    gradient = tape.gradient.read(0, 5)
    assert close(gradient[windows.mask], wanted[0][windows.mask])
    for index, wanted_mask in enumerate(by_mask):
        assert close(torch.cat(rows[index]), wanted_mask), index

    tape.differentiate(loss)
    sums = [torch.zeros_like(weight) for weight in weights]
    tape.backward(last_weight, lambda layer, _, given: sums[layer.index].add_(given["weight"]))
    for index, wanted_weight in enumerate(by_weight):
        assert close(sums[index], wanted_weight), index
    assert torch.equal(everything(stream), before)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Within 1e-4 of the largest value."""
    assert wanted.abs().max() > 0
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_way_back_from_a_changed_layer(llama: Subject, tmp_path: Path):
    """Only what is behind the stream is walked, with the layer that is in memory as it is now."""
    windows = make_windows(padded=True)
    model = StreamedModel(Checkpoint.open(llama.folder))
    found = {}
    for scale in (1.0, 3.0):
        stream = model.stream(windows, batch_tokens=18)
        for layer in model.walk(None, stream, stop=2):
            if layer.index == 1:
                layer.linears["mlp.down_proj"].weight.data *= scale
                tape = Tape(model, stream, tmp_path, held=layer)
                seen: list[int] = []
                tape.forward(observe=lambda each, seen=seen: seen.append(each.index) or {})
                found[scale] = tape.differentiate(loss_of(windows))
                tape.backward(channel_masks, lambda each, start, _, seen=seen: seen.append(each.index))
                assert seen == [1, 2, 2, 2, 2, 1, 1, 1]
                assert layer.linears["mlp.down_proj"].weight.device.type == "cpu"
            stream.advance(layer)
    assert found[1.0] != pytest.approx(found[3.0], rel=1e-3)


def test_a_tape_keeps_to_one_memory_limit(llama: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = StreamedModel(Checkpoint.open(llama.folder))
    stream = model.stream(make_windows(), tmp_path)
    size = 5 * 9 * 32 * 4
    for limit, spilled in ((4 * size, False), (4 * size - 1, True)):
        monkeypatch.setattr(activations, "MEMORY_LIMIT", limit)
        tape = Tape(model, stream, tmp_path)
        held = [*(tape.states[index] for index in range(1, LAYERS + 1)), tape.gradient]
        assert [each.spilled for each in held] == [spilled] * 4


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
