"""Narrower layers: surgery equals masking, and what is written loads, generates and saves elsewhere, too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import compress
from compress.anatomy import anatomy_of, layer_shapes, model_class, set_weight, weight
from compress.engine.logits import streamed_logits
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput, CompressError
from compress.pipeline.artefact import write_model
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.reload import reload_check
from compress.pipeline.run import execute
from compress.pruning.parts.width import (
    Kept,
    channels_of_groups,
    finish,
    narrow,
    plan_widths,
    skipped,
    write_layer,
)
from compress.storage.checkpoint import Checkpoint
from compress.storage.draft import Draft

LAYERS = 4
SIZE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 60}
SIZE |= {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLP = {"intermediate_size": 48}
GQA = {**SIZE, **MLP, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 12}
GEMMA = {**WIDE, "query_pre_attn_scalar": 12, "sliding_window": 4}
OPT = {**SIZE, "ffn_dim": 48}
DISTIL = {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60, "pad_token_id": 0}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}

CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GQA, tie_word_embeddings=True)),
    "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**WIDE, sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**GQA, **SLIDING)),
    "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**WIDE)),
    "gemma2": ("Gemma2ForCausalLM", lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**GEMMA, sliding_window_pattern=3)),
    "phi3": ("Phi3ForCausalLM", lambda: hf.Phi3Config(**GQA)),
    "opt": ("OPTForCausalLM", lambda: hf.OPTConfig(**OPT)),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**SIZE)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**SIZE, **MLP)),
    "bert": ("BertForSequenceClassification", lambda: hf.BertConfig(**SIZE, **MLP)),
    "roberta": ("RobertaForTokenClassification", lambda: hf.RobertaConfig(**SIZE, **MLP)),
    "distilbert": ("DistilBertForQuestionAnswering", lambda: hf.DistilBertConfig(**DISTIL)),
    "mpnet": ("MPNetForSequenceClassification", lambda: hf.MPNetConfig(**SIZE, **MLP)),
}

TOKENS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
MASK[2, 9:] = False
WINDOWS = Windows(TOKENS, MASK, source="random")


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = save(case, tmp_path_factory.mktemp("model") / "dense")
        return made[case]

    return get


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest, source_of: Callable[[str], Path]) -> Path:
    return source_of(request.param)


def save(case: str, folder: Path) -> Path:
    """A tiny random model with weights that matter, biases and norms included."""
    name, build = CASES[case]
    config = build()
    config.architectures = [name]
    torch.manual_seed(0)
    model = model_class(config)._from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def units(config: Any, index: int) -> tuple[int, int]:
    shape = layer_shapes(config)[index]
    return shape.num_key_value_heads, shape.intermediate_size


def every_other(config: Any) -> list[Kept]:
    """Other units in every layer, everything in layer 1."""
    kept = []
    for index in range(config.num_hidden_layers):
        groups, neurons = units(config, index)
        if index == 1:
            kept.append(Kept(torch.arange(groups), torch.arange(neurons)))
        else:
            kept.append(Kept(torch.arange(index % 2, groups, 2), torch.arange(index, neurons, 3)))
    return kept


def blocks_gone(config: Any) -> list[Kept]:
    """No attention in layers 0 and 2, no MLP in layers 1 and 2, the rest whole."""
    none = torch.arange(0)
    kept = []
    for index in range(config.num_hidden_layers):
        groups, neurons = (torch.arange(count) for count in units(config, index))
        kept.append(Kept(none if index in (0, 2) else groups, none if index in (1, 2) else neurons))
    return kept


def everything(config: Any) -> list[Kept]:
    return [
        Kept(*(torch.arange(count) for count in units(config, index)))
        for index in range(config.num_hidden_layers)
    ]


def uniform(config: Any) -> list[Kept]:
    groups, neurons = units(config, 0)
    return [
        Kept(torch.tensor([index % groups]), torch.arange(index, neurons - 8 + index))
        for index in range(config.num_hidden_layers)
    ]


def prune(source: Path, folder: Path, choose: Callable[[Any], list[Kept]], bias: float | None = None) -> Path:
    """Narrow every layer of the model, write the artefact into ``folder``."""
    checkpoint = Checkpoint.open(source)
    model = StreamedModel(checkpoint)
    draft = Draft(checkpoint, folder.with_name(f"{folder.name}-draft"))
    kept = choose(model.config)
    stream = model.stream(WINDOWS)
    for layer in model.walk(None, stream):
        narrow(model, layer, kept[layer.index])
        if bias is not None:
            for path in (model.anatomy.attention_output, model.anatomy.down):
                if path in layer.linears:
                    matrix = weight(layer.linears[path])
                    set_weight(layer.linears[path], matrix, torch.full(matrix.shape[:1], bias))
        stream.advance(layer)
        write_layer(draft, model, layer)
    finish(draft, model, kept)
    draft.flush("step")
    write_model(draft, source, folder, {})
    with model.head() as head:
        logits = head(stream.hidden.read(0, len(TOKENS)))[0]
    assert torch.equal(logits, streamed_logits(Checkpoint.open(folder), WINDOWS))
    return folder


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(TOKENS, attention_mask=MASK.long())[0]


@torch.no_grad()
def masked(source: Path, choose: Callable[[Any], list[Kept]], bias: float | None = None) -> Tensor:
    """The dense model's output with the removed units multiplied by zero, and biases of gone blocks too, and
    all other biases of output projections made ``bias`` if it is given."""
    model = compress.load(source)
    anatomy, kept = anatomy_of(model.config), choose(model.config)
    for index, layer in enumerate(model.base_model.get_submodule(anatomy.layers)):
        channels = channels_of_groups(model.config, index)[kept[index].groups].flatten()
        for path, stay in ((anatomy.attention_output, channels), (anatomy.down, kept[index].neurons)):
            linear = layer.get_submodule(path)
            mask = torch.zeros(weight(linear).shape[1]).index_fill(0, stay, 1)
            linear.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
            if len(stay) == 0 and linear.bias is not None:
                linear.bias.zero_()
            elif len(stay) and bias is not None:
                matrix = weight(linear)
                set_weight(linear, matrix, torch.full(matrix.shape[:1], bias))
    return run(model)


def assert_masked(source: Path, folder: Path, choose: Any, bias: float | None = None) -> None:
    """What was written computes what the masked model does, in transformers, too."""
    output, expected = run(compress.load(folder)), masked(source, choose, bias)
    real = MASK if output.ndim == 3 and output.shape[:2] == MASK.shape else ...
    torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-5)
    check = reload_check(Checkpoint.open(folder), folder, "cpu")
    assert check.max_difference < 1e-5
    assert check.promised is not None
    assert check.promised.loader.startswith("transformers ")
    assert check.promised.difference is not None
    assert check.promised.difference < 1e-5


def test_surgery_equals_masking_once_and_twice(source: Path, tmp_path: Path) -> None:
    once = prune(source, tmp_path / "once", every_other)
    check_plan(source, once, every_other, ())
    assert_masked(source, once, every_other)
    twice = prune(once, tmp_path / "twice", every_other)
    assert_masked(once, twice, every_other)


def test_removed_blocks_equal_masked_ones(source: Path, tmp_path: Path) -> None:
    """With biases, which architectures that have none are given."""
    folder = prune(source, tmp_path / "pruned", blocks_gone, bias=0.25)
    anatomy = ModelShape.of(Checkpoint.open(source)).anatomy
    check_plan(source, folder, blocks_gone, (anatomy.attention_output, anatomy.down))
    assert_masked(source, folder, blocks_gone, bias=0.25)
    if anatomy.kind == "decoder":
        check_generation(compress.load(folder))


def check_generation(model: Any) -> None:
    """With a cache as without, and a removed attention block caches one number per token."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = TOKENS[:1, :7]
    with torch.inference_mode():
        output = model.generate(prompt, use_cache=True, return_dict_in_generate=True, **settings)
        again = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(output.sequences, again)
    cache = getattr(output, "cache", None) or output.past_key_values
    assert [layer.keys[0, :, 0].numel() for layer in cache.layers].count(1) == 2


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_uniform_widths_are_the_plain_architecture(
    case: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = prune(source_of(case), tmp_path / "pruned", uniform)
    check_plan(source_of(case), folder, uniform, ())
    assert_masked(source_of(case), folder, uniform)
    config = json.loads((folder / "config.json").read_text())
    assert "pruned" not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["intermediate_size"] == 40
    assert not (folder / "modeling_pruned.py").exists()


def check_plan(source: Path, folder: Path, choose: Any, biased: tuple[str, ...]) -> None:
    shape = ModelShape.of(Checkpoint.open(source))
    planned = plan_widths(shape, choose(shape.pretrained_config), biased)
    written = ModelShape.of(Checkpoint.open(folder))
    assert planned.tensors == written.tensors
    assert planned.config == written.config
    assert planned.parameters == written.parameters


def test_everything_kept_is_the_same_model(source: Path, tmp_path: Path) -> None:
    folder = prune(source, tmp_path / "same", everything)
    before, after = Checkpoint.open(source), Checkpoint.open(folder)

    assert "pruned" not in after.config
    assert before.tensors == after.tensors
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_a_process_without_this_package_loads_generates_and_saves(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = prune(source_of("llama"), tmp_path / "pruned", every_other, bias=0.25)
    expected = run(compress.load(folder))
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, json, torch, transformers\n"
        "sys.modules['compress'] = None\n"
        "folder, again = sys.argv[1:]\n"
        "load = transformers.AutoModelForCausalLM.from_pretrained\n"
        f"tokens, mask = torch.tensor({TOKENS.tolist()}), torch.tensor({MASK.long().tolist()})\n"
        "model = load(folder, trust_remote_code=True)\n"
        "first = model(tokens, attention_mask=mask).logits\n"
        "model.generate(tokens[:1], max_new_tokens=3, do_sample=False)\n"
        "model.save_pretrained(again)\n"
        "second = load(again, trust_remote_code=True)(tokens, attention_mask=mask).logits\n"
        "assert torch.equal(first, second)\n"
        "print(json.dumps(first.tolist()))\n"
    )
    command = [sys.executable, "-P", str(program), str(folder), str(tmp_path / "again")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_WAIT_POLICY": "passive"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert child.returncode == 0, child.stderr
    torch.testing.assert_close(torch.tensor(json.loads(child.stdout)), expected, atol=1e-6, rtol=1e-6)
    # What transformers saved is read here like what we wrote.
    torch.testing.assert_close(run(compress.load(tmp_path / "again")), expected)


def test_without_its_code_it_is_refused(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = prune(source_of("llama"), tmp_path / "pruned", blocks_gone)
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_bias_is_plain_where_the_architecture_has_one(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = prune(source_of("llama"), tmp_path / "pruned", uniform, bias=0.5)
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.read("model.layers.0.self_attn.q_proj.bias").any()
    assert checkpoint.read("model.layers.0.self_attn.o_proj.bias").eq(0.5).all()


@pytest.mark.parametrize(
    ("case", "format", "loads_with"),
    [
        ("llama", "compressed-tensors", "transformers with compressed-tensors (trust_remote_code=True)"),
        ("bert", "compressed-tensors", "transformers with compressed-tensors (trust_remote_code=True)"),
        ("llama", "gptq", "compress-model only"),
        ("gpt2", "compressed-tensors", "compress-model only"),
    ],
)
def test_quantized_after_pruning(
    case: str, format: str, loads_with: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    pruned = prune(source_of(case), tmp_path / "pruned", blocks_gone)
    step = {"method": "rtn", "bits": 8, "group_size": "channel", "format": format}
    folder = tmp_path / "quantized"
    lineage = execute(parse_recipe({"model": str(pruned), "steps": [step]}), folder)

    assert lineage.result.loads_with == loads_with
    assert layer_shapes(compress.load(folder).config) == layer_shapes(compress.load(pruned).config)
    ours = run(compress.load(folder))
    torch.testing.assert_close(ours, run(compress.load(pruned)), atol=0.2, rtol=0)
    if loads_with.startswith("transformers"):
        auto = hf.AutoModelForCausalLM if case == "llama" else hf.AutoModelForSequenceClassification
        theirs = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(run(theirs), ours, atol=1e-4, rtol=1e-4)


def test_layers_leave_a_model_whose_layers_differ(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    pruned = prune(source_of("llama"), tmp_path / "pruned", blocks_gone)
    step = {"method": "replaceme", "layers": 1, "transform": "none"}
    recipe = {"model": str(pruned), "steps": [step], "calibration": {"source": "x"}}
    shape = ModelShape.of(Checkpoint.open(pruned))
    planned = make_plan(Checkpoint.open(pruned), parse_recipe(recipe).steps).after

    assert layer_shapes(planned.pretrained_config) == [
        layer_shapes(shape.pretrained_config)[index] for index in (0, 2, 3)
    ]
    assert planned.parameters < shape.parameters


def test_what_is_too_large_for_its_dtype_is_not_written(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = source_of("llama")
    checkpoint = Checkpoint.open(folder, dtype="F16")
    model = StreamedModel(checkpoint)
    with model.layer(0) as layer:
        down = layer.linears[model.anatomy.down]
        set_weight(down, weight(down) * 1e7)
        with pytest.raises(CompressError, match="too large or not a number"):
            write_layer(Draft(checkpoint, tmp_path / "draft"), model, layer)


def test_narrowing_leaves_the_whole_layer_as_it_is(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = StreamedModel(Checkpoint.open(source_of("llama")))
    with model.layer(0) as layer:
        whole = layer.module
        before = {name: parameter.clone() for name, parameter in whole.named_parameters()}
        narrow(model, layer, every_other(model.config)[0])
        for linear in layer.linears.values():
            set_weight(linear, weight(linear) + 1)
        assert layer.module is not whole
        assert all(torch.equal(parameter, before[name]) for name, parameter in whole.named_parameters())


@pytest.mark.parametrize(
    ("case", "choose", "biased", "reason"),
    [
        ("llama", every_other, (), "different widths"),
        ("llama", blocks_gone, (), "different widths"),
        ("gpt2", uniform, (), "as wide as hidden_size / heads"),
        ("qwen2", uniform, ("self_attn.o_proj",), "has no bias in 'self_attn.o_proj'"),
        ("qwen3", uniform, ("mlp.down_proj",), "has no bias in 'mlp.down_proj'"),
    ],
)
def test_what_is_not_plain_is_refused_with_the_reason(
    case: str, choose: Any, biased: tuple[str, ...], reason: str, source_of: Callable[[str], Path]
) -> None:
    shape = ModelShape.of(Checkpoint.open(source_of(case)))
    kept = choose(shape.pretrained_config)
    assert "pruned" in plan_widths(shape, kept, biased).config
    with pytest.raises(BadInput, match=reason):
        plan_widths(shape, kept, biased, uniform=True)


def test_skipping_a_block(source: Path) -> None:
    model = StreamedModel(Checkpoint.open(source))
    stream = model.stream(WINDOWS)
    with model.layer(1) as layer:
        hidden = stream.hidden.read(0, 3)
        whole = stream.call(layer, 0, hidden)
        with skipped(layer, model.anatomy, "attention"):
            without_attention = stream.call(layer, 0, hidden)
            with skipped(layer, model.anatomy, "mlp"):
                nothing = stream.call(layer, 0, hidden)
        assert torch.equal(stream.call(layer, 0, hidden), whole)
    assert not torch.allclose(without_attention, whole)
    if model.anatomy.norm_first:
        assert torch.equal(nothing, hidden)
