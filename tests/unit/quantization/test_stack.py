"""BitStack and nested codes through the command line's way: every architecture, every size, while running."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.cli import cli
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.evaluation.evaluate import evaluate
from compress.kernels.codes.packing import pack_signs, unpack_signs
from compress.kernels.cpu.library import kernel_name
from compress.kernels.layers.stacked import FactorStack, PlaneStack, StackedLinear
from compress.method import StepContext
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.registry import find_method
from compress.pipeline.run import execute
from compress.quantization.parts.block_order import by_gain
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft
from compress.storage.formats.stacks import prefix, sizes, stack_of
from compress.system.memory import parse_memory

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
}
METHODS: dict[str, dict[str, Any]] = {
    "bitstack": {"blocks": 4, "rank": 4},
    "nested": {"bits": 5, "group_size": 16},
}


@pytest.fixture(scope="session")
def dense_of(shared_decoder: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda case: shared_decoder(CASES[case][0], **CASES[case][1])


def calibration(dense: Path) -> dict[str, Any]:
    return {"source": str(dense.parent / "text.txt"), "nsamples": 6, "seqlen": 48}


def compressed(dense: Path, output: Path, *steps: dict[str, Any]) -> Path:
    recipe = {"model": str(dense), "calibration": calibration(dense), "steps": list(steps)}
    execute(parse_recipe(recipe), output)
    return output


def stacked(dense: Path, output: Path, method: str, **options: object) -> Path:
    return compressed(dense, output, {"method": method, **METHODS[method], **options})


@cache
@torch.no_grad()
def predictions(dense: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the text, and log-probabilities of the dense model on them."""
    text = (dense.parent / "text.txt").read_text()[:200]
    tokens = hf.AutoTokenizer.from_pretrained(dense)(text, return_tensors="pt").input_ids
    return tokens, compress.load(dense)(tokens).logits.double().log_softmax(-1)


@torch.no_grad()
def divergence(dense: Path, model: torch.nn.Module) -> float:
    """KL from the dense model to a loaded one on the text, nats for each token."""
    tokens, p = predictions(dense)
    q = model(tokens).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def folders(dense_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama and its stacks."""
    root, dense = tmp_path_factory.mktemp("stack"), dense_of("llama")
    return {"dense": dense} | {name: stacked(dense, root / name, name) for name in METHODS}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "bitstack") for case in CASES),
        *((case, "nested") for case in ("llama", "phi3", "gpt2", "opt")),
    ],
)
def test_every_architecture_gets_nearer_with_every_level(
    case: str, method: str, dense_of: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    dense = dense_of(case)
    folder = folders[method] if case == "llama" else stacked(dense, tmp_path / "stack", method)
    steps = sizes(Checkpoint.open(folder))
    found = [divergence(dense, compress.load(folder, memory=steps[at])) for at in (0, len(steps) // 2, -1)]

    assert found[0] > found[1] > found[2]
    assert found[2] < 0.15 * found[0]


def test_pruned_models_whose_layers_differ(dense_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Pruned and stored in blocks by two runs, and by one."""
    dense, prune = dense_of("llama"), {"method": "flap", "ratio": 0.3, "width_multiple": 1}
    pruned = compressed(dense, tmp_path / "pruned", prune)
    layers = Checkpoint.open(pruned).config["pruned"]["layers"]
    assert len({json.dumps(layer) for layer in layers}) > 1
    (tmp_path / "text.txt").write_text((dense.parent / "text.txt").read_text())
    stacked(pruned, tmp_path / "bitstack", "bitstack")
    compressed(dense, tmp_path / "nested", prune, {"method": "nested", **METHODS["nested"]})
    for method in METHODS:
        stack = Checkpoint.open(tmp_path / method)
        assert stack.config["pruned"]["layers"] == layers
        found = [
            divergence(pruned, compress.load(stack.folder, memory=memory))
            for memory in (sizes(stack)[0], None)
        ]
        assert found[1] < 0.3 * found[0]


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_head_and_embedding_may_be_packed_too(
    case: str, dense_of: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    dense = dense_of(case)  # tied, and not
    plain = folders["nested"] if case == "llama" else stacked(dense, tmp_path / "plain", "nested")
    bits = {"embedding_bits": 8} | ({"lm_head_bits": 4} if case == "qwen2" else {})
    folder = stacked(dense, tmp_path / "packed", "nested", **bits)
    before, after = (sizes(Checkpoint.open(each)) for each in (plain, folder))
    saved = 257 * 64 * (3 + (3.5 if case == "qwen2" else 0)) - 257 * 4 * len(bits) - 16 * len(bits)
    assert [one - other for one, other in zip(before, after, strict=True)] == [saved] * len(before)
    model = compress.load(folder, memory=after[7])
    assert model.resize(after[7]) == after[7]
    assert divergence(dense, compress.load(folder)) < 1.5 * divergence(dense, compress.load(plain)) + 0.01
    lineage = json.loads((folder / "compression.json").read_text())
    assert lineage["result"]["bytes"] == lineage["result"]["predicted_bytes"] == after[-1]


@pytest.mark.parametrize("method", METHODS)
def test_encoders(method: str, tiny_encoder: Callable[..., Path], tmp_path: Path) -> None:
    """Their order follows how much their output changes; they have no perplexity."""
    folder = tiny_encoder("MPNetModel")
    checkpoint = Checkpoint.open(folder)
    tokens = torch.randint(5, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), "random")
    chosen = find_method(method)
    options = chosen.Options(**METHODS[method])
    run = StepContext(
        Draft(checkpoint, tmp_path / "work"), windows, 0, tmp_path / "work", "cpu", lambda *_: None
    )
    chosen.apply(StreamedModel(checkpoint), options, run)
    run.draft.flush("step")
    dense = streamed_logits(checkpoint, windows)
    steps = len(run.draft.config["quantization_config"]["order"])
    assert steps == 12 * (options.model_dump().get("blocks", 4) - 1)
    found = [
        float((streamed_logits(prefix(run.draft, count), windows) - dense).norm() / dense.norm())
        for count in (0, steps // 2, steps)
    ]
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.4 * found[0]
    with pytest.raises(BadInput, match="Only causal language models"):
        chosen.plan(ModelShape.of(checkpoint), chosen.Options(importance="perplexity"))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_fits_and_is_the_largest_that_does(method: str, folders: dict[str, Path]) -> None:
    whole = Checkpoint.open(folders[method])
    steps = sizes(whole)
    assert steps == sorted(steps)
    assert steps[-1] == whole.nbytes
    for memory in (steps[0], steps[3] + 1, steps[-1] - 1, 10 * steps[-1]):
        model = compress.load(folders[method], memory=memory)
        held = sum(tensor.nbytes for tensor in {*model.parameters(), *stored_buffers(model)})
        assert held == max(size for size in steps if size <= memory)
    with pytest.raises(BadInput, match=f"its smallest size is {steps[0] / 1e6:,.1f} MB"):
        compress.load(folders[method], memory=steps[0] - 1)


def stored_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those of blocks; the others are computed."""
    linears = [module for module in model.modules() if isinstance(module, StackedLinear)]
    return [part for linear in linears for part in linear.blocks.buffers()]


@pytest.mark.parametrize("method", METHODS)
def test_a_running_model_grows_and_shrinks(method: str, folders: dict[str, Path]) -> None:
    steps = sizes(Checkpoint.open(folders[method]))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        small, middle = (compress.load(folders[method], memory=size) for size in (steps[0], steps[5]))
        expected = {steps[0]: small(tokens).logits, steps[5]: middle(tokens).logits}
        model = compress.load(folders[method])
        expected[steps[-1]] = model(tokens).logits
        kept = model.model.layers[0].self_attn.q_proj.blocks[0].signs
        dropped = [
            weakref.ref(part)
            for module in model.modules()
            if isinstance(module, StackedLinear)
            for block in module.blocks[1:]
            for part in block.buffers()
        ]
        for memory in (steps[0], steps[5] + 1, None, steps[5], steps[-1]):
            took = model.resize(memory)
            assert torch.equal(model(tokens).logits, expected[took])
            others = sum(parameter.nbytes for parameter in model.parameters())
            assert took == others + sum(part.nbytes for part in stored_buffers(model))
            if memory == steps[0]:
                assert not any(part() is not None for part in dropped)
    assert model.model.layers[0].self_attn.q_proj.blocks[0].signs is kept
    with pytest.raises(BadInput, match="its smallest size"):
        model.resize("1kB")
    assert torch.equal(model(tokens).logits, expected[steps[-1]])


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_changes_what_fits_and_no_block(method: str, folders: dict[str, Path]) -> None:
    steps = sizes(Checkpoint.open(folders[method]))
    whole = compress.load(folders[method], memory=steps[-1])
    half = compress.load(folders[method], dtype="bfloat16", memory=steps[-1] - 20_000)
    assert half.resize(None) < steps[-1] - 20_000
    for one, other in zip(stored_buffers(whole), stored_buffers(half.to(torch.float16)), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_only_what_is_stored_in_blocks_has_several_sizes(folders: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="has one size only"):
        compress.load(folders["dense"], memory="90MB")
    assert not hasattr(compress.load(folders["dense"]), "resize")


@pytest.mark.parametrize("method", METHODS)
def test_the_files_hold_the_blocks_in_the_order_they_are_read(method: str, folders: dict[str, Path]) -> None:
    with (folders[method] / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    whole = Checkpoint.open(folders[method])
    config = whole.config["quantization_config"]
    counts = Counter(range(len(config["modules"])))
    wanted = [(name, 0) for name in config["modules"]]
    for index in config["order"]:
        wanted.append((config["modules"][index], counts[index]))
        counts[index] += 1
    assert len(wanted) == stack_of(whole).blocks * len(config["modules"])
    offsets = [header[f"{name}.signs_{index}"]["data_offsets"][0] for name, index in wanted]
    assert offsets == sorted(offsets)


def test_signs_are_not_read_before_they_are_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    """What lies behind the blocks of a prefix may be missing from the disk altogether."""
    whole = Checkpoint.open(folders["nested"])
    small = prefix(whole, 3)
    left_out = whole.tensors.keys() - small.tensors.keys()
    file = folders["nested"] / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in left_out:
        start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
        data[start:stop] = bytes(255 for _ in range(stop - start))
    for other in folders["nested"].iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    (tmp_path / file.name).write_bytes(data)
    tokens = torch.arange(40)[None]
    memory = sizes(whole)[3]
    with torch.no_grad():
        first, second = (
            compress.load(f, memory=memory)(tokens).logits for f in (folders["nested"], tmp_path)
        )
    assert torch.equal(first, second)


def test_the_published_order_keeps_all_linears_within_one_block(
    dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = dense_of("llama")
    folder = stacked(
        dense, tmp_path / "stack", "bitstack", blocks=3, importance="perplexity", order_windows=2
    )
    config = Checkpoint.open(folder).config["quantization_config"]
    linears = len(config["modules"])
    assert [sorted(config["order"][at : at + linears]) for at in (0, linears)] == [list(range(linears))] * 2


@pytest.mark.parametrize(("method", "options"), [("bitstack", {"blocks": 1}), ("nested", {"bits": 2})])
@pytest.mark.parametrize("importance", ["gradient", "perplexity"])
def test_stacks_of_one_block_have_one_size(
    method: str, options: dict, importance: str, dense_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = stacked(dense_of("llama"), tmp_path / "stack", method, **options, importance=importance)
    assert len(sizes(Checkpoint.open(folder))) == 1


def test_a_damaged_order_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["bitstack"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for order, reason in (([99], "names blocks that it does not have"), (None, "lacks its modules")):
        config["quantization_config"]["order"] = order
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadInput, match=reason):
            compress.load(tmp_path)


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_signs_come_back(rows: int, count: int, seed: int) -> None:
    signs = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_signs(signs)
    assert packed.shape == (rows, -(-count // 8))
    assert torch.equal(unpack_signs(packed, count), signs.float() * 2 - 1)


def test_the_first_sign_is_the_most_significant_bit() -> None:
    assert pack_signs(torch.tensor([[True] + [False] * 7 + [False, True]])).tolist() == [[128, 64]]


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_the_order_takes_every_block_once_and_the_best_first(losses: list[list[float]], seed: int) -> None:
    costs = torch.randint(1, 9, (len(losses), 3), generator=torch.Generator().manual_seed(seed)).tolist()
    order = by_gain(losses, costs)
    assert Counter(order) == dict.fromkeys(range(len(losses)), 2)
    if order:
        first = order[0]
        best = max(
            (loss[0] - loss[stop]) / sum(cost[1 : stop + 1])
            for loss, cost in zip(losses, costs, strict=True)
            for stop in (1, 2)
        )
        loss, cost = losses[first], costs[first]
        gains = [(loss[0] - loss[stop]) / sum(cost[1 : stop + 1]) for stop in (1, 2)]
        assert max(gains) == pytest.approx(best)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90MB", 90_000_000), ("1.5 gb", 1_500_000_000), ("2KiB", 2048), ("7", 7), (7, 7), ("3M", 3_000_000)],
)
def test_amounts_of_memory(text: str | int, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "90 apples", "-5MB", "MB", "1e9"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(BadInput, match="is not an amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FactorStack, PlaneStack])
def test_a_stacked_linear_multiplies_with_its_dense_weight(kind: type, dtype: torch.dtype, folders) -> None:
    name = "bitstack" if kind is FactorStack else "nested"
    for linear in compress.load(folders[name]).modules():
        if isinstance(linear, StackedLinear):
            assert isinstance(linear, kind)
            x = torch.randn(3, linear.in_features, dtype=dtype)
            expected = x.double() @ linear.dense().to(dtype).double().T
            bound = 2e-6 if dtype == torch.float32 else 8e-3
            assert float((linear(x) - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_model(
    method: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second layer, and then again while the order is being found."""
    name = {"bitstack": "decompose", "nested": "nested_codes"}[method]
    module = import_module(f"compress.quantization.{method}")
    work, calls = getattr(module, name), []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == {"bitstack": 9, "nested": 6}[method]:
            raise RuntimeError("killed")
        return work(*arguments)

    def unordered(*_: object) -> list[int]:
        raise RuntimeError("killed later")

    monkeypatch.setattr(module, name, killed)
    with monkeypatch.context() as later:
        later.setattr(module, "find_order", unordered)
        for reason in ("^killed$", "later"):
            with pytest.raises(RuntimeError, match=reason):
                stacked(folders["dense"], tmp_path / "stack", method)
    before = len(calls)
    stacked(folders["dense"], tmp_path / "stack", method)
    assert len(calls) == before  # all layers were there
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "stack" / file).read_bytes() == (folders[method] / file).read_bytes()


@pytest.mark.usefixtures("measured_here")
def test_the_command_line_evaluates_and_inspects_a_size(folders: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long. " * 20)
    whole = Checkpoint.open(folders["bitstack"])
    steps = sizes(whole)
    dense, model = evaluate(
        str(folders["bitstack"]),
        baseline=str(folders["dense"]),
        text=str(text),
        context=32,
        windows=2,
        memory=f"{steps[4] + 5}B",
    )
    assert model.cost.weight_bytes == steps[4]
    assert model.model.name == f"bitstack in {steps[4] + 5}B"
    assert model.model.sha256 not in (whole.sha256, dense.model.sha256)
    assert model.fidelity.kl_mean.value > 0
    assert model.cost.measured.kernel == kernel_name()
    shown = CliRunner().invoke(cli, ["inspect", str(folders["bitstack"])]).output
    smallest, largest = steps[0] / 1e6, steps[-1] / 1e6
    assert f"loads in any memory from {smallest:,.1f} MB to {largest:,.1f} MB ({len(steps):,} sizes)" in shown
    assert "compress-model only" in shown
